"""Peak bytes of the objective, counted allocation by allocation; nothing is timed."""

from __future__ import annotations

import torch
from live_bytes import LiveBytes
from torch import Tensor

from tutelage.core import LazyLogits, distillation_objective, token_stats

N, V, D = 2048, 49152, 64
LOGITS = N * V * 4
"""Bytes of one `[N, V]` float32 tensor."""


def heads(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((N, D), (V, D), (N, D), (V, D))
    student, head, teacher, teacher_head = (torch.randn(s, device=device) / 8 for s in shapes)
    return student.requires_grad_(), head.requires_grad_(), teacher, teacher_head


def materialised(h: Tensor, w: Tensor, teacher: Tensor, teacher_w: Tensor) -> Tensor:
    log_p = (h @ w.t()).log_softmax(-1)
    log_q = (teacher @ teacher_w.t()).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def chunked_by_autograd(h: Tensor, w: Tensor, teacher: Tensor, teacher_w: Tensor) -> Tensor:
    """What many chunked losses do: every chunk is small, and all are saved for backward."""
    pairs = zip(h.split(128), teacher.split(128), strict=True)
    return torch.stack([materialised(a, w, b, teacher_w) for a, b in pairs]).sum()


def materialised_peak() -> float:
    inputs = heads("meta")
    with LiveBytes(inputs) as meter:
        materialised(*inputs).backward()
    return float(meter.peak)


def test_the_meter_counts_what_is_known() -> None:
    with LiveBytes() as meter:
        x = torch.zeros(1000)
        y = x.view(10, 100)[2:]  # shares the storage
        z = torch.exp(x)
        del z
        torch.ones(250)
    assert meter.live == 4000
    assert meter.peak == 8000
    assert y.numel() == 800


def test_objective_peaks_below_a_quarter_of_the_materialised_computation() -> None:
    limit = materialised_peak() / 4
    student, head, teacher, teacher_head = inputs = heads("cpu")
    with LiveBytes(inputs) as meter:
        objective = distillation_objective(
            LazyLogits(student, head), LazyLogits(teacher, teacher_head)
        )
        objective.total.backward()
    assert meter.peak < limit
    assert meter.largest < LOGITS / 4
    assert head.grad is not None


def test_scoring_and_learning_without_gradient_allocate_buffers_only() -> None:
    student, head, teacher, teacher_head = inputs = heads("cpu")
    rows = torch.arange(64)
    chunk_bytes = 16 * V * 4
    with LiveBytes(inputs) as meter, torch.no_grad():
        sides = LazyLogits(student, head)[rows], LazyLogits(teacher, teacher_head)[rows]
        token_stats(*sides, torch.zeros(64, dtype=torch.long), chunk_bytes)
        distillation_objective(*sides, chunk_bytes=chunk_bytes)
    # Two buffers, three scratch blocks of at most 2 MiB, and small change; no [V, D] gradient.
    assert meter.largest <= chunk_bytes
    assert meter.peak <= chunk_bytes + (6 << 20) + (1 << 20)
    assert meter.peak < V * D * 4


def test_computations_that_save_their_logits_are_over_the_limit() -> None:
    """Negative control, on the meta device: no arithmetic, the same allocations."""
    peak = materialised_peak()
    assert peak >= 4 * LOGITS
    inputs = heads("meta")
    with LiveBytes(inputs) as meter:
        chunked_by_autograd(*inputs).backward()
    assert meter.peak > peak / 4
