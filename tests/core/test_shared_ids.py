"""Two vocabularies compared over what they share, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from tutelage.core import LazyLogits, composite_objective, token_stats
from tutelage.core.shared_ids import SharedIds
from tutelage.core.terms import ReverseKL, TopKForwardKL, TopKReverseKL

OURS, THEIRS, ROWS = 19, 13, 5
PAIRS = [(0, 12), (3, 1), (4, 0), (7, 7), (9, 2), (10, 11), (18, 5)]
STOPS = ((7, 1), (6, 2))
"""7 is shared with the teacher's 7, which therefore is a stop too, and so is 9 for the 2."""


def sides(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[LazyLogits, LazyLogits]:
    generator = torch.Generator().manual_seed(seed)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    student = LazyLogits(
        new(ROWS, 4).requires_grad_(), new(OURS, 4).requires_grad_(), new(OURS).requires_grad_(),
        0.8, 6.0,
    )  # fmt: skip
    return student, LazyLogits(new(ROWS, 6), new(THEIRS, 6))


def outcomes(log_x: Tensor, side: int, stops: tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
    """Rows over the shared ids, the stops if any, and everything else."""
    ends = [set(ids) for ids in stops]
    for pair in PAIRS:
        if any(v in end for v, end in zip(pair, ends, strict=True)):
            for v, end in zip(pair, ends, strict=True):
                end.add(v)
    shared = [pair[side] for pair in PAIRS if pair[side] not in ends[side]]
    others = [v for v in range(log_x.shape[1]) if v not in shared and v not in ends[side]]
    groups = [[v] for v in shared] + [sorted(end) for end in ends[side : side + 1] if end]
    masses = [torch.stack([log_x[:, v].exp() for v in g]).sum(0) for g in [*groups, others]]
    return torch.stack(masses, 1).log()


def expected_kl(log_p: Tensor, log_q: Tensor, k: int, is_forward: bool) -> Tensor:
    """Over the student's k likeliest shared outcomes, never everything else, and a tail."""
    rows = []
    for a, b in zip(log_p, log_q, strict=True):
        ids = reference.top_ids(a[:-1], k)
        coarse = [reference.buckets(x, ids)[None] for x in (a, b)]
        rows.append((reference.forward_kl if is_forward else reference.reverse_kl)(*coarse)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("k", [1, 3, 99])
@pytest.mark.parametrize("is_forward", [False, True])
@pytest.mark.parametrize("stops", [((), ()), STOPS], ids=["ids", "stops"])
def test_a_top_k_of_shared_ids_equals_the_reference(k: int, is_forward: bool, stops: Any) -> None:
    student, teacher = sides()
    shared = SharedIds.of(PAIRS, (OURS, THEIRS), stops)
    term = TopKForwardKL(k, support="student") if is_forward else TopKReverseKL(k, "student")
    found = composite_objective(
        replace(student, shared=shared), teacher, [(term, 1.0)], chunk_bytes=2 * 2 * OURS * 8
    )
    found.total.backward()

    def function(log_p: Tensor, log_q: Tensor) -> Tensor:
        merged = outcomes(log_p, 0, stops), outcomes(log_q, 1, stops)
        return expected_kl(*merged, min(k, merged[0].shape[1] - 1), is_forward)

    heads = [
        reference.Head(
            x.hidden.detach(), x.weight.detach(), None if x.bias is None else x.bias.detach(),
            x.scale, x.softcap,
        )
        for x in (student, teacher)
    ]  # fmt: skip
    value, gradients = reference.composite((heads[0], heads[1]), [(function, [1.0] * ROWS)])
    torch.testing.assert_close(found.value, value, rtol=1e-10, atol=1e-12)
    for leaf, gradient in zip(
        (student.hidden, student.weight, student.bias), gradients, strict=True
    ):
        assert leaf is not None
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_vocabularies_give_the_objective_of_one_vocabulary(dtype: torch.dtype) -> None:
    pairs = [(v, v) for v in range(OURS)]
    generator = torch.Generator().manual_seed(1)
    teacher = LazyLogits(*(torch.randn(n, 6, generator=generator).to(dtype) for n in (ROWS, OURS)))
    results = []
    for shared in (None, SharedIds.of(pairs, (OURS, OURS))):
        student, _ = sides(dtype)
        term = [(TopKReverseKL(4, "student"), 1.0)]
        found = composite_objective(replace(student, shared=shared), teacher, term)
        found.total.backward()
        results.append([found.value, student.hidden.grad, student.weight.grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_statistics_are_over_the_shared_outcomes() -> None:
    student, teacher = sides()
    shared, tokens = SharedIds.of(PAIRS, (OURS, THEIRS), STOPS), torch.tensor([3, 1, 2, 18, 7])
    found = token_stats(replace(student, shared=shared), teacher, tokens)
    logs = [reference.log_softmax(x.block(0, ROWS).detach()) for x in (student, teacher)]
    log_p, log_q = (outcomes(x, side, STOPS) for side, x in enumerate(logs))
    places = [1, 5, 6, 4, 5]  # 3 and 18 are shared, 1 and 7 are stops, 2 is something else
    rows = torch.arange(ROWS)
    expected = {
        "entropy": reference.entropy(log_p),
        "teacher_entropy": reference.entropy(log_q),
        "reverse_kl": reference.reverse_kl(log_p, log_q),
        "forward_kl": reference.forward_kl(log_p, log_q),
        "log_p": log_p[rows, places],
        "log_q": log_q[rows, places],
    }
    for name, exact in expected.items():
        torch.testing.assert_close(vars(found)[name], exact, rtol=1e-10, atol=1e-12)


def test_a_side_whose_ids_are_all_shared_leaves_one_to_everything_else() -> None:
    pairs = [(v, v) for v in range(THEIRS)]
    shared = SharedIds.of(pairs, (OURS, THEIRS))
    assert shared.num_ids == THEIRS - 1
    assert shared.num_columns == THEIRS
    student, teacher = sides()
    found = token_stats(replace(student, shared=shared), teacher, torch.zeros(ROWS).long())
    assert found.is_finite().all()


def test_what_cannot_be_compared_is_refused() -> None:
    for pairs in ([(0, 0), (0, 1)], [(0, 3), (1, 3)], [(OURS, 0)], [(-1, 0)]):
        with pytest.raises(ValueError, match="must be distinct and below"):
            SharedIds.of(pairs, (OURS, THEIRS))
    for pairs, stops in (([], ((), ())), (PAIRS, ((1,), ()))):
        with pytest.raises(ValueError, match="both sides need shared ids"):
            SharedIds.of(pairs, (OURS, THEIRS), stops)
    student, teacher = sides()
    shared = replace(student, shared=SharedIds.of(PAIRS, (OURS, THEIRS)))
    for term in (ReverseKL(), TopKReverseKL(3)):
        with pytest.raises(ValueError, match="the student's likeliest ids that they share"):
            composite_objective(shared, teacher, [(term, 1.0)])
    with pytest.raises(ValueError, match="shared ids are of vocabularies of"):
        token_stats(shared, teacher.cut(5), torch.zeros(ROWS).long())
