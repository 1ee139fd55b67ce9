"""Who computes the objective, from the same hidden states and heads, and how exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import tutelage.models.llama_cpu.products  # noqa: F401, registers the CPU's products
from tutelage.core import (
    RULES,
    LazyLogits,
    composite_objective,
    distillation_objective,
    select_tokens,
    token_stats,
)
from tutelage.core._block import CHUNK_BYTES, rows_per_chunk
from tutelage.core.products import add_product_, product, product_
from tutelage.core.terms import ForwardKL, ReverseKL
from tutelage.core.weighting import entropy_gate

CHECK_ROWS = 128
COMPLETION_LENGTH = 128
"""Rows of one completion, for the contestants that select."""


@dataclass(frozen=True)
class Inputs:
    """Hidden states `[N, D]` and heads `[V, D]` of both sides."""

    student: Tensor
    head: Tensor
    teacher: Tensor
    teacher_head: Tensor

    @property
    def sides(self) -> tuple[LazyLogits, LazyLogits]:
        """Both sides as lazy logits."""
        return LazyLogits(self.student, self.head), LazyLogits(self.teacher, self.teacher_head)

    def first(self, rows: int) -> Inputs:
        """The same heads over the first rows, with gradients of their own."""
        return self.at(torch.arange(rows))

    def at(self, rows: Tensor) -> Inputs:
        """The same heads over the given rows, with gradients of their own."""
        student, head = (x.detach().clone() for x in (self.student[rows], self.head))
        return Inputs(
            student.requires_grad_(True),
            head.requires_grad_(True),
            self.teacher[rows],
            self.teacher_head,
        )


def make_inputs(rows: int, vocab_size: int, width: int) -> Inputs:
    """A teacher near the student, logits with a standard deviation of about 3 nats."""
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int, size: float) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(size)

    student, head = new(rows, width, size=1.0), new(vocab_size, width, size=3 * width**-0.5)
    teacher = new(rows, width, size=0.3).add_(student)
    teacher_head = head.clone()
    return Inputs(student.requires_grad_(True), head.requires_grad_(True), teacher, teacher_head)


def all_tokens(x: Inputs) -> Tensor:
    """Ours: every row."""
    total = distillation_objective(*x.sides).total
    total.backward()
    return total


def kept_rows(x: Inputs, rule: str, keep: float) -> Tensor:
    """Ours: score all rows, keep a share of each completion. The teacher is read if it matters."""
    student, teacher = x.sides
    device = x.student.device
    tokens = torch.zeros(len(x.student), dtype=torch.long, device=device)
    stats = token_stats(student, teacher if RULES[rule].needs_teacher else None, tokens)
    completion = torch.arange(len(x.student), device=device) // COMPLETION_LENGTH
    return select_tokens(stats, completion, rule, keep).rows


def selected(x: Inputs, rule: str, keep: float) -> Tensor:
    """Ours: the rows that a rule keeps."""
    rows = kept_rows(x, rule, keep)
    student, teacher = x.sides
    total = distillation_objective(student[rows], teacher[rows]).total
    total.backward()
    return total


def eopd(x: Inputs) -> Tensor:
    """Ours: exact EOPD; the teacher is unsure everywhere here, so its gate is open on every row."""
    total = composite_objective(
        *x.sides, [(ReverseKL(), 1.0), (ForwardKL(entropy_gate), 1.0)]
    ).total
    total.backward()
    return total


def materialised(x: Inputs) -> Tensor:
    """Plain torch: both logits, both log-softmaxes, autograd."""
    log_p = (x.student @ x.head.t()).log_softmax(-1)
    with torch.no_grad():
        log_q = (x.teacher @ x.teacher_head.t()).log_softmax(-1)
    total = (log_p.exp() * (log_p - log_q)).sum()
    total.backward()
    return total


TRL_TILES = ((4096, 32768), (4096, 4096), (1024, 8192), (256, 8192), (64, 32768))
"""Tokens and ids of a tile that are tried on TRL; the first are its own."""


@contextmanager
def trl_tiles(tile: tuple[int, int]) -> Iterator[None]:
    """TRL computing in other tiles than its own, which suit a GPU; its constants are put back."""
    from trl.kernels import chunked_divergence

    before = chunked_divergence.TOKEN_CHUNK_SIZE, chunked_divergence.VOCAB_CHUNK_SIZE
    chunked_divergence.TOKEN_CHUNK_SIZE, chunked_divergence.VOCAB_CHUNK_SIZE = tile
    try:
        yield
    finally:
        chunked_divergence.TOKEN_CHUNK_SIZE, chunked_divergence.VOCAB_CHUNK_SIZE = before


def trl(x: Inputs, tile: tuple[int, int] = TRL_TILES[0]) -> Tensor:
    """TRL's chunked divergence, by Triton where there is a GPU; beta = 1 is its reverse KL."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    apply = ChunkedDivergenceFunction.apply
    with trl_tiles(tile):
        rows: Tensor = apply(x.student, x.head, None, x.teacher, x.teacher_head, None, 1.0)[0]
        total = rows.sum()
        total.backward()
    return total


LIGER_CHUNKS = (1024, 512, 256, 128, 64)
"""Rows of a chunk that are tried on Liger; the first is its own."""


def _liger(x: Inputs, compiled: bool, chunk: int = LIGER_CHUNKS[0]) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled, chunk_size=chunk
    )
    labels = torch.zeros(len(x.student), dtype=torch.long, device=x.student.device)
    mean: Tensor = loss(x.student, x.head, x.teacher, x.teacher_head, labels)
    total = mean * len(x.student)  # it divides by the rows itself
    total.backward()
    return total


def liger(x: Inputs, chunk: int = LIGER_CHUNKS[0]) -> Tensor:
    """Liger's fused linear JSD without torch.compile; beta = 1 is its reverse KL.

    It computes its cross-entropy too: the loss has a weight for it, here 0, but no switch.
    """
    return _liger(x, compiled=False, chunk=chunk)


def liger_compiled(x: Inputs) -> Tensor:
    """The same with torch.compile."""
    return _liger(x, compiled=True)


@contextmanager
def torch_library() -> Iterator[None]:
    """Products by the library that torch takes, as everybody but us has them."""
    before = bool(torch.backends.mkldnn.enabled)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before  # type: ignore[assignment]


def all_tokens_torch(x: Inputs) -> Tensor:
    """Ours with torch's own products: what is left of it on other processors."""
    with torch_library():
        return all_tokens(x)


@torch.no_grad()
def bare_products(x: Inputs) -> None:
    """The four matrix products nobody can do without, chunked and done as ours; no loss."""
    chunk = rows_per_chunk(len(x.student), len(x.head), x.head.dtype, CHUNK_BYTES)
    buffers = torch.empty(2, chunk, len(x.head))
    gradient, head_gradient = torch.empty_like(x.student), torch.zeros_like(x.head)
    for start in range(0, len(x.student), chunk):
        rows = slice(start, start + chunk)
        hidden = x.student[rows]
        z = buffers[0, : len(hidden)]
        product_(z, hidden, x.head)
        product_(buffers[1, : len(hidden)], x.teacher[rows], x.teacher_head)
        gradient[rows] = product(z, x.head.t())
        add_product_(head_gradient, z.t(), hidden.t())


def torch_products(x: Inputs) -> None:
    """The same by the library that torch takes."""
    with torch_library():
        bare_products(x)


SELECTIONS = {
    f"{rule}_{percent}": (rule, percent / 100)
    for rule in ("soft_or", "entropy")
    for percent in (50, 20, 10)
}
"""Rule and share of the contestants that select."""

OURS = ("all_tokens", *SELECTIONS, "eopd")

CONTESTANTS: dict[str, Callable[[Inputs], Tensor | None]] = {
    "bare_products": bare_products,
    "torch_products": torch_products,
    "all_tokens": all_tokens,
    "all_tokens_torch": all_tokens_torch,
    **{k: partial(selected, rule=rule, keep=keep) for k, (rule, keep) in SELECTIONS.items()},
    "eopd": eopd,
    "materialised": materialised,
    "trl": trl,
    "liger": liger,
    "liger_compiled": liger_compiled,
}
NEEDS = {
    "trl": "trl",
    "trl_tuned": "trl",
    "liger": "liger_kernel",
    "liger_tuned": "liger_kernel",
    "liger_compiled": "liger_kernel",
}


def contestants(
    tile: tuple[int, int] | None, chunk: int | None
) -> dict[str, Callable[[Inputs], Tensor | None]]:
    """All contestants; with a tile for TRL or a chunk for Liger, these too."""
    tuned: dict[str, Callable[[Inputs], Tensor | None]] = {}
    if tile:
        tuned["trl_tuned"] = partial(trl, tile=tile)
    if chunk:
        tuned["liger_tuned"] = partial(liger, chunk=chunk)
    return CONTESTANTS | tuned


def exact(x: Inputs) -> tuple[float, Tensor, Tensor]:
    """Sum of the reverse KL and its two gradients in float64, by autograd, 64 rows at a time."""
    hidden, head = (y.detach().double().requires_grad_(True) for y in (x.student, x.head))
    teacher_head, total = x.teacher_head.double(), 0.0
    for h, teacher in zip(hidden.split(64), x.teacher.split(64), strict=True):
        log_p = (h @ head.t()).log_softmax(-1)
        log_q = (teacher.double() @ teacher_head.t()).log_softmax(-1)
        part = (log_p.exp() * (log_p - log_q)).sum()
        part.backward()
        total += part.item()
    assert hidden.grad is not None
    assert head.grad is not None
    return total, hidden.grad, head.grad


def gradient_errors(
    inputs: Inputs, runs: dict[str, Callable[[Inputs], Tensor | None]]
) -> dict[str, float]:
    """Largest relative distance of each contestant's gradients and value from float64.

    Everyone's is the reverse KL but EOPD's; its parity is a test of the package.
    """
    errors = {}
    sample = inputs.first(min(CHECK_ROWS, len(inputs.student)))
    truth = exact(sample)
    for name, run in runs.items():
        x = sample.first(len(sample.student))
        total = None if name == "eopd" else run(x)
        if total is None:
            continue
        expected = truth
        found = [x.student.grad, x.head.grad]
        if name in SELECTIONS:
            rows = kept_rows(sample, *SELECTIONS[name])
            expected = exact(sample.at(rows))
            found[0] = None if found[0] is None else found[0][rows]
        value = abs(total.item() - expected[0]) / expected[0]
        errors[name] = max(value, *map(_distance, found, expected[1:]))
    return errors


def _distance(found: Tensor | None, expected: Tensor) -> float:
    if found is None:
        raise RuntimeError("a contestant computed no gradient.")
    return float((found.double() - expected).norm() / expected.norm())
