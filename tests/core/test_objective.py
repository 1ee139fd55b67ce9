"""The fused objective against the materialised float64 reference, and its refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from tutelage.core import (
    LazyLogits,
    Objective,
    counter_uniform,
    distillation_objective,
    select_tokens,
    token_stats,
)

Make = Callable[..., Any]
INF = math.inf
DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5)]
ROWS = 7
# Both divergences, one alone, weights of 0 and a negative one.
WEIGHTS = {
    "reverse": ([1.0] * ROWS, [0.0] * ROWS),
    "forward": ([0.0] * ROWS, [1.0] * ROWS),
    "both": ([0.5] * ROWS, [2.0] * ROWS),
    "per_row": ([1.0, 0.0, 0.3, 0.0, 2.0, 0.0, -0.5], [0.0, 0.0, 0.7, 1.5, 0.0, 0.0, 0.1]),
}


def as_weights(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def distance(found: Tensor | None, expected: Tensor | None) -> float:
    """‖found − expected‖ / ‖expected‖."""
    assert found is not None
    assert expected is not None
    difference = (found.double() - expected).norm()
    return float(difference / expected.norm().clamp(min=1e-300))


def run(pair: Any, a: Any = 1.0, b: Any = 0.0, **options: Any) -> Objective:
    """The objective, back-propagated."""
    objective = distillation_objective(pair.student, pair.teacher, a, b, **options)
    objective.total.backward()
    return objective


def assert_equal(pair: Any, found: Objective, expected: reference.Gradients, limit: float) -> None:
    student = pair.student
    # A sum may cancel; its rounding is that of its largest terms.
    size = max(1.0, float(expected.reverse_kl.abs().sum() + expected.forward_kl.abs().sum()))
    assert abs(found.total.item() - expected.total) <= limit * size
    assert distance(found.reverse_kl, expected.reverse_kl) <= limit
    assert distance(found.forward_kl, expected.forward_kl) <= limit
    assert distance(found.entropy, expected.entropy) <= limit
    assert distance(found.teacher_entropy, expected.teacher_entropy) <= limit
    assert distance(student.hidden.grad, expected.hidden) <= limit
    assert distance(student.weight.grad, expected.weight) <= limit
    if student.bias is not None:
        assert distance(student.bias.grad, expected.bias) <= limit


@pytest.mark.parametrize(("dtype", "limit"), DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradients_equal_the_reference(
    make_pair: Make,
    dtype: torch.dtype,
    limit: float,
    has_bias: bool,
    scale: float,
    softcap: float | None,
    weights: str,
) -> None:
    pair = make_pair(dtype=dtype, has_bias=has_bias, scale=scale, softcap=softcap)
    a, b = WEIGHTS[weights]
    expected = reference.objective(pair.reference, a, b, range(ROWS))
    rows_a_chunk = 3
    found = run(
        pair, as_weights(a), as_weights(b), chunk_bytes=rows_a_chunk * 2 * 11 * dtype.itemsize
    )
    assert_equal(pair, found, expected, limit)


@pytest.mark.parametrize(("dtype", "limit"), DTYPES)
@pytest.mark.parametrize("rows_a_chunk", [0, *range(1, ROWS + 2)])
def test_gradients_do_not_depend_on_the_chunk_size(
    make_pair: Make, dtype: torch.dtype, limit: float, rows_a_chunk: int
) -> None:
    pair = make_pair(dtype=dtype, has_bias=True, softcap=4.0)
    expected = reference.objective(pair.reference, [1.0] * ROWS, [0.5] * ROWS, range(ROWS))
    found = run(pair, 1.0, 0.5, chunk_bytes=rows_a_chunk * 2 * 11 * dtype.itemsize)
    assert_equal(pair, found, expected, limit)


@pytest.mark.parametrize(("dtype", "limit"), DTYPES)
@pytest.mark.parametrize("rule", reference.RULES)
def test_gradients_of_selected_rows_equal_the_reference(
    make_pair: Make, dtype: torch.dtype, limit: float, rule: str
) -> None:
    pair = make_pair(rows=24, dtype=dtype)
    position = torch.arange(24)
    completion = torch.tensor([0] * 5 + [1] * 13 + [2] * 6)
    stats = token_stats(pair.student, pair.teacher, position % 11)
    uniform = counter_uniform((1, 2), completion, position)
    rows = select_tokens(stats, completion, rule, 0.4, uniform=uniform).rows
    assert len(rows) == (24 if rule == "all" else 2 + 5 + 2)
    ones = [1.0] * len(rows)
    expected = reference.objective(pair.reference, ones, [0.0] * len(rows), rows.tolist())
    found = distillation_objective(pair.student[rows], pair.teacher[rows])
    found.total.backward()
    assert_equal(pair, found, expected, limit)
    left_out = torch.ones(24, dtype=torch.bool)
    left_out[rows] = False
    assert (pair.student.hidden.grad[left_out] == 0).all()


@pytest.mark.parametrize("size", [1, 8, 11])
def test_gradients_over_a_cut_vocabulary_equal_the_reference(make_pair: Make, size: int) -> None:
    pair = make_pair(has_bias=True)
    weight, bias = pair.student.weight, pair.student.bias
    whole = pair.student
    pair.student, pair.teacher = whole.cut(size), pair.teacher.cut(size)
    expected = reference.objective(pair.reference, [1.0] * ROWS, [1.0] * ROWS, range(ROWS))
    run(pair, 1.0, 1.0)
    if size > 1:
        assert distance(weight.grad[:size], expected.weight) <= 1e-12
        assert distance(whole.hidden.grad, expected.hidden) <= 1e-12
    assert (weight.grad[size:] == 0).all()
    assert (bias.grad[size:] == 0).all()


def test_a_tied_head_receives_both_of_its_gradients(make_pair: Make) -> None:
    """The embedding table that also projects: hidden states are made from it."""
    teacher = make_pair().teacher
    table = torch.randn(11, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    ids = torch.tensor([0, 3, 3, 10, 7, 1, 2])
    ours, theirs = (table.clone().requires_grad_(True) for _ in "ab")
    hidden = torch.tanh(ours[ids])
    distillation_objective(LazyLogits(hidden, ours), teacher, 1.0, 0.5).total.backward()
    log_p = reference.log_softmax(torch.tanh(theirs[ids]) @ theirs.t())
    log_q = reference.log_softmax(teacher.hidden @ teacher.weight.t())
    kls = reference.reverse_kl(log_p, log_q) + 0.5 * reference.forward_kl(log_p, log_q)
    kls.sum().backward()
    assert distance(ours.grad, theirs.grad) <= 1e-12


@pytest.mark.parametrize("frozen", [("weight",), ("hidden",), ("bias",), ("weight", "bias")])
def test_frozen_inputs_get_no_gradient_and_change_no_other(
    make_pair: Make, frozen: tuple[str, ...]
) -> None:
    pair = make_pair(has_bias=True, softcap=3.0)
    expected = reference.objective(pair.reference, [1.0] * ROWS, [0.0] * ROWS, range(ROWS))
    for name in frozen:
        pair.student.__dict__[name].requires_grad_(False)
    run(pair)
    for name in ("hidden", "weight", "bias"):
        leaf = pair.student.__dict__[name]
        if name in frozen:
            assert leaf.grad is None
        else:
            assert distance(leaf.grad, expected.__dict__[name]) <= 1e-12


def test_the_teacher_never_gets_a_gradient(make_pair: Make) -> None:
    pair = make_pair()
    pair.teacher = replace(
        pair.teacher,
        hidden=pair.teacher.hidden.requires_grad_(True),
        weight=pair.teacher.weight.requires_grad_(True),
    )
    run(pair)
    assert pair.teacher.hidden.grad is None
    assert pair.teacher.weight.grad is None


def test_nothing_to_train_gives_a_plain_number(make_pair: Make) -> None:
    pair = make_pair()
    student = LazyLogits(pair.student.hidden.detach(), pair.student.weight.detach())
    assert not distillation_objective(student, pair.teacher).total.requires_grad


@pytest.mark.parametrize("factor", [1.0, 0.25, -3.0])
def test_dividing_the_sum_divides_the_gradient(make_pair: Make, factor: float) -> None:
    pair = make_pair(has_bias=True)
    expected = reference.objective(pair.reference, [1.0] * ROWS, [0.0] * ROWS, range(ROWS))
    (distillation_objective(pair.student, pair.teacher).total * factor).backward()
    assert distance(pair.student.hidden.grad, factor * expected.hidden) <= 1e-12
    assert distance(pair.student.weight.grad, factor * expected.weight) <= 1e-12


@given(
    values=st.lists(st.floats(-20, 20), min_size=24, max_size=24),
    a=st.floats(0, 3),
    b=st.floats(0, 3),
)
def test_logit_gradients_of_a_row_sum_to_zero(values: list[float], a: float, b: float) -> None:
    """Adding a constant to a row changes no distribution, so it can change no loss."""
    both = torch.tensor(values, dtype=torch.float64).reshape(2, 3, 4)
    student = both[0].clone().requires_grad_(True)
    eye = torch.eye(4, dtype=torch.float64)
    distillation_objective(
        LazyLogits(student, eye), LazyLogits(both[1], eye), a, b
    ).total.backward()
    assert student.grad is not None
    assert student.grad.sum(-1).abs().max() <= 1e-12 * max(1.0, a, b) * 40


def test_gradient_is_the_derivative_of_the_value(make_pair: Make) -> None:
    """Central differences of the objective itself; independent of any reference."""
    pair = make_pair(has_bias=True, scale=0.7, softcap=3.0)
    a, b = torch.linspace(0, 2, ROWS).double(), torch.linspace(1, 0, ROWS).double()
    run(pair, a, b)
    generator = torch.Generator().manual_seed(1)
    for name in ("hidden", "weight", "bias"):
        leaf = pair.student.__dict__[name]
        for _ in range(5):
            direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)

            def value(step: float, name: str = name, way: Tensor = direction) -> float:
                moved = {name: pair.student.__dict__[name].detach() + step * way}
                with torch.no_grad():
                    side = replace(pair.student, **moved)
                    return float(distillation_objective(side, pair.teacher, a, b).total)

            numeric = (value(1e-5) - value(-1e-5)) / 2e-5
            assert float((leaf.grad * direction).sum()) == pytest.approx(numeric, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_head_wide", [False, True])
@settings(max_examples=15)
@given(seed=st.integers(0, 1000), spread=st.sampled_from([0.3, 1.0]), b=st.sampled_from([0.0, 1.0]))
def test_narrow_inputs_are_no_worse_than_plain_code_in_the_same_dtype(
    make_pair: Make, dtype: torch.dtype, is_head_wide: bool, seed: int, spread: float, b: float
) -> None:
    """Also with a float32 head under narrow hidden states, as with master weights."""
    pair = make_pair(rows=32, vocab_size=200, width=16, dtype=dtype, seed=seed, spread=spread)
    if is_head_wide:
        wide = pair.student.weight.detach().float().requires_grad_(True)
        pair.student = replace(pair.student, weight=wide)
    expected = reference.objective(pair.reference, [1.0] * 32, [b] * 32, range(32))
    hidden, weight = (
        x.detach().clone().requires_grad_(True) for x in (pair.student.hidden, pair.student.weight)
    )
    log_p = (hidden @ weight.to(dtype).t()).float().log_softmax(-1)
    log_q = (pair.teacher.hidden @ pair.teacher.weight.t()).float().log_softmax(-1)
    plain = (log_p.exp() * (log_p - log_q)).sum() + b * (log_q.exp() * (log_q - log_p)).sum()
    plain.backward()
    found = run(pair, 1.0, b, chunk_bytes=5 * 2 * 200 * 4)
    assert found.total.dtype == torch.float32
    assert pair.student.hidden.grad.dtype == dtype
    assert pair.student.weight.grad.dtype == pair.student.weight.dtype
    for ours, theirs, truth in (
        (pair.student.hidden.grad, hidden.grad, expected.hidden),
        (pair.student.weight.grad, weight.grad, expected.weight),
    ):
        # The logits are rounded alike, so errors are alike; what differs is their last digit.
        assert distance(ours, truth) <= 1.1 * distance(theirs, truth)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["wide", "opposite", "one_hot", "equal"])
def test_extreme_logits_have_finite_gradients(
    temperature: float, dtype: torch.dtype, case: str
) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = {
        "wide": 1e4 * torch.randn(2, 6, 8, generator=generator).clamp(-1, 1),
        "opposite": torch.tensor([1e4, -1e4])[:, None, None] * torch.eye(8)[:6],
        "one_hot": torch.stack([1e4 * torch.eye(8)[:6], 1e4 * torch.eye(8)[2:]]),
        "equal": torch.full((2, 6, 8), 1e4),
    }[case].to(dtype)
    eye = torch.eye(8, dtype=dtype)
    student = logits[0].clone().requires_grad_(True)
    weight = eye.clone().requires_grad_(True)
    sides = LazyLogits(student, weight, scale=1 / temperature), LazyLogits(logits[1], eye)
    objective = distillation_objective(sides[0], replace(sides[1], scale=1 / temperature), 1.0, 0.5)
    (objective.total / 6).backward()
    assert student.grad is not None
    assert weight.grad is not None
    assert objective.total.isfinite()
    limit = torch.finfo(dtype).max
    for gradient, size in ((student.grad, 1e4), (weight.grad, 1e8)):
        # What float16 cannot hold is not our doing; everything it can hold must be a number.
        if size / temperature**2 < limit:
            assert gradient.isfinite().all()
    if case == "equal":
        assert (student.grad == 0).all()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_ids_that_both_sides_exclude_change_nothing(make_pair: Make, weights: str) -> None:
    a, b = (as_weights(x) for x in WEIGHTS[weights])
    narrow, wide = make_pair(has_bias=True), make_pair(has_bias=True)
    with torch.no_grad():
        wide.student.bias[8:] = -INF
        wide.teacher.bias[8:] = -INF
    narrow.student, narrow.teacher = narrow.student.cut(8), narrow.teacher.cut(8)
    expected = reference.objective(narrow.reference, a.tolist(), b.tolist(), range(ROWS))
    found = run(wide, a, b)
    assert abs(found.total.item() - expected.total) <= 1e-12 * max(1, abs(expected.total))
    assert distance(wide.student.hidden.grad, expected.hidden) <= 1e-12
    assert distance(wide.student.weight.grad[:8], expected.weight) <= 1e-12
    for leaf in (wide.student.weight, wide.student.bias):
        assert (leaf.grad[8:] == 0).all()


def test_rows_of_weight_zero_add_nothing_even_when_their_divergence_is_infinite(
    make_pair: Make,
) -> None:
    pair = make_pair(has_bias=True)
    with torch.no_grad():
        pair.teacher.bias[4] = -INF  # the student can say what the teacher cannot
    ones = [1.0] * ROWS
    expected = reference.objective(pair.reference, [0.0] * ROWS, ones, range(ROWS))
    found = run(pair, 0.0, 1.0)
    assert (found.reverse_kl == INF).all()
    assert abs(found.total.item() - expected.total) <= 1e-12 * expected.total
    assert distance(pair.student.hidden.grad, expected.hidden) <= 1e-12
    assert distance(pair.student.weight.grad, expected.weight) <= 1e-12


def test_an_infinite_divergence_that_counts_is_reported_as_such(make_pair: Make) -> None:
    pair = make_pair(has_bias=True)
    with torch.no_grad():
        pair.teacher.bias[4] = -INF
    assert distillation_objective(pair.student, pair.teacher).total.item() == INF
