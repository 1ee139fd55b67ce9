"""Advantages among a prompt's completions, and the clipped term: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from tutelage.core import Objective, composite_objective
from tutelage.core.policy import (
    ClippedPolicy,
    group_advantages,
    is_uniform,
    sharpening_advantages,
)
from tutelage.core.terms import ReverseKL, TopKForwardKL

Make = Callable[..., Any]
ROWS, VOCAB = 7, 23
TOKENS = [0, 22, 3, 3, 17, 9, 1]
PER_ROW = [1.0, 0.0, 0.3, 0.0, 2.0, 0.0, -0.5]
SHIFTS = [0.0, 1.0, -1.0, 0.25, -0.25, 3.0, -3.0]
"""Away from log p: within both bounds, beyond one of them, far beyond."""
ADVANTAGES = [0.7, 0.7, -1.2, 0.7, -1.2, 0.0, -1.2]
CLIPS = [(0.2, 0.2), (0.2, 0.28), (0.25, 0.05), (1.0, 9.0)]


def term_and_reference(pair: Any, clips: tuple[float, float]) -> tuple[ClippedPolicy, Any]:
    """The term, and the same by the reference; p_old is e^-shift of the student's own p."""
    log_p = reference.log_softmax(pair.reference[0].logits())
    old = [float(log_p[n, y]) - SHIFTS[n] for n, y in enumerate(TOKENS)]
    tables = (torch.tensor(x, dtype=torch.float64) for x in (old, ADVANTAGES))
    term = ClippedPolicy(torch.tensor(TOKENS), *tables, *clips)
    return term, lambda p, q: reference.policy(p, TOKENS, old, ADVANTAGES, clips)


def run(pair: Any, terms: Any, has_teacher: bool, chunk_bytes: int | None = None) -> Objective:
    """The objective, back-propagated."""
    weighted = [(term, torch.tensor(w, dtype=torch.float64)) for term, w in terms]
    teacher = pair.teacher if has_teacher else None
    found = composite_objective(pair.student, teacher, weighted, chunk_bytes=chunk_bytes)
    found.total.backward()
    return found


def assert_equal(pair: Any, found: Objective, expected: Any, limit: float) -> None:
    values, gradients = expected
    torch.testing.assert_close(found.value.double(), values, atol=limit, rtol=limit)
    assert abs(found.total.item() - float(values.sum())) <= limit * float(values.abs().sum())
    leaves = (pair.student.hidden, pair.student.weight, pair.student.bias)
    for leaf, gradient in zip((x for x in leaves if x is not None), gradients, strict=True):
        assert float((leaf.grad.double() - gradient).norm()) <= limit * float(gradient.norm())


@pytest.mark.parametrize("has_teacher", [True, False])
@pytest.mark.parametrize("clips", CLIPS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_value_and_gradient_equal_the_reference(
    make_pair: Make, clips: tuple[float, float], has_teacher: bool, dtype: Any, limit: float
) -> None:
    pair = make_pair(vocab_size=VOCAB, dtype=dtype, has_bias=True, scale=0.7, softcap=4.0)
    term, function = term_and_reference(pair, clips)
    expected = reference.composite(pair.reference, [(function, PER_ROW)])
    rows_a_chunk = 3 * 2 * VOCAB * dtype.itemsize
    found = run(pair, [(term, PER_ROW)], has_teacher, rows_a_chunk)
    assert_equal(pair, found, expected, limit)
    assert bool(found.reverse_kl.isnan().all()) == (not has_teacher)
    log_p = reference.log_softmax(pair.reference[0].logits())
    torch.testing.assert_close(found.entropy.double(), reference.entropy(log_p))


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, at −inf − −inf
@pytest.mark.parametrize("has_teacher", [True, False])
def test_the_kernels_compute_the_same(
    make_pair: Make, interpreted: None, launches: list[str], has_teacher: bool
) -> None:
    pair = make_pair(vocab_size=VOCAB, dtype=torch.float32, has_bias=True, scale=0.7, softcap=4.0)
    term, function = term_and_reference(pair, (0.2, 0.28))
    terms, known = [(term, PER_ROW)], [(function, PER_ROW)]
    if has_teacher:
        terms, known = (
            [*terms, (ReverseKL(), [0.5] * ROWS)],
            [
                *known,
                (reference.reverse_kl, [0.5] * ROWS),
            ],
        )
    found = run(pair, terms, has_teacher)
    assert set(launches) == {"statistics_kernel", "gradient_kernel"}
    assert_equal(pair, found, reference.composite(pair.reference, known), 1e-5)
    assert bool(found.reverse_kl.isnan().all()) == (not has_teacher)


def test_ids_that_count_as_one_do_so_without_a_teacher_too(make_pair: Make) -> None:
    found = []
    for has_teacher in (True, False):
        pair = make_pair(vocab_size=VOCAB, has_bias=True, softcap=4.0)
        term, _ = term_and_reference(pair, (0.2, 0.2))
        student = replace(pair.student, one_class=(3, 17, 22))
        teacher = pair.teacher if has_teacher else None
        composite_objective(student, teacher, [(term, 1.0)], chunk_bytes=999).total.backward()
        assert term.is_clipped.any()
        found.append([pair.student.hidden.grad, pair.student.weight.grad, pair.student.bias.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    plain = make_pair(vocab_size=VOCAB, has_bias=True, softcap=4.0)
    run(plain, [(term_and_reference(plain, (0.2, 0.2))[0], [1.0] * ROWS)], False)
    assert float((plain.student.hidden.grad - found[0][0]).norm()) > 0.1


def test_distillation_is_added_to_it(make_pair: Make) -> None:
    pair = make_pair(vocab_size=VOCAB)
    term, function = term_and_reference(pair, (0.2, 0.2))
    known = [(function, [1.0] * ROWS), (reference.reverse_kl, [0.3] * ROWS)]
    found = run(pair, [(term, [1.0] * ROWS), (ReverseKL(), [0.3] * ROWS)], True)
    assert_equal(pair, found, reference.composite(pair.reference, known), 1e-10)


@pytest.mark.parametrize("has_teacher", [True, False])
def test_the_gradient_is_that_of_finite_differences(make_pair: Make, has_teacher: bool) -> None:
    pair = make_pair(vocab_size=VOCAB, has_bias=True)
    term, _ = term_and_reference(pair, (0.3, 0.31))
    run(pair, [(term, [1.0] * ROWS)], has_teacher)
    generator = torch.Generator().manual_seed(3)
    hidden, weight = pair.student.hidden.detach(), pair.student.weight.detach()
    moves = [torch.randn(x.shape, generator=generator).double() for x in (hidden, weight)]

    def total(step: float) -> float:
        moved = [x + step * move for x, move in zip((hidden, weight), moves, strict=True)]
        student = replace(pair.student, hidden=moved[0], weight=moved[1])
        teacher = pair.teacher if has_teacher else None
        return float(composite_objective(student, teacher, [(term, 1.0)]).total.detach())

    grads = (pair.student.hidden.grad, pair.student.weight.grad)
    slope = sum(float((g * move).sum()) for g, move in zip(grads, moves, strict=True))
    assert (total(1e-5) - total(-1e-5)) / 2e-5 == pytest.approx(slope, rel=1e-6)


def test_the_rows_that_are_clipped_are_told(make_pair: Make) -> None:
    pair = make_pair(vocab_size=VOCAB)
    term, _ = term_and_reference(pair, (0.2, 0.3))
    assert not term.is_clipped.any()
    run(pair, [(term, [1.0] * ROWS)], False)
    # e^1 > 1.3 with A > 0; e^-1 < 0.8 with A < 0; e^0.25 < 1.3; e^-0.25 < 0.8 with A < 0; A = 0
    assert term.is_clipped.tolist() == [False, True, True, False, True, False, True]


def test_what_reads_a_teacher_needs_one(make_pair: Make) -> None:
    pair = make_pair(vocab_size=VOCAB)
    term, _ = term_and_reference(pair, (0.2, 0.2))
    with pytest.raises(ValueError, match=r"only ClippedPolicy needs no teacher.*TopKForwardKL"):
        composite_objective(pair.student, None, [(term, 1.0), (TopKForwardKL(), 1.0)])
    with pytest.raises(ValueError, match=r"no teacher.*teacher_top_mass"):
        composite_objective(pair.student, None, [(term, 1.0)], extras=["teacher_top_mass"])


# --- advantages -----------------------------------------------------------------------------------

REWARDS = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.25, 0.5, 0.7]


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("num_samples", [2, 3, 4, 6])
def test_advantages_are_over_the_prompts_own_completions(num_samples: int, scale: str) -> None:
    found = group_advantages(torch.tensor(REWARDS, dtype=torch.float64), num_samples, scale)
    expected = reference.advantages(REWARDS, num_samples, scale == "std")
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert found.view(-1, num_samples).sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("scale", ["std", "none"])
def test_equal_rewards_give_exactly_no_advantage(scale: str) -> None:
    """0.1 · 3 / 3 is not 0.1: without the rule the middle group would move."""
    rewards = torch.tensor([0.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.0, 1.0, 1.0], dtype=torch.float64)
    found = group_advantages(rewards, 3, scale)
    assert found[:6].tolist() == [0.0] * 6
    assert found[6] < 0 < found[7] == found[8]
    assert is_uniform(rewards, 3).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("count", "num_samples", "scale", "message"),
    [(4, 1, "std", "2 or more"), (5, 2, "std", "got 5 completions"), (4, 2, "max", "got 'max'")],
)
def test_advantages_of_nothing_are_refused(
    count: int, num_samples: int, scale: str, message: str
) -> None:
    rewards: Tensor = torch.ones(count)
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, num_samples, scale)


@pytest.mark.parametrize("entropies", [[0.3, 2.0, 0.0, 1.1, 2.0], [0.7], [0.2, 0.2], []])
def test_a_token_of_high_entropy_is_sharpened_most(entropies: list[float]) -> None:
    found = sharpening_advantages(torch.tensor(entropies, dtype=torch.float64)).tolist()
    assert found == pytest.approx(reference.sharpening(entropies) if entropies else [], abs=1e-12)
    assert all(-1 <= a <= -0.5 for a in found)
    assert found[1:2] == ([-1.0] if len(entropies) > 2 else [-0.5] * (len(entropies) > 1))
