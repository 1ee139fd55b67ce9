"""Every term of the fused objective against the materialised reference: values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from tutelage.core import LazyLogits, Objective, composite_objective, select_tokens, token_stats
from tutelage.core.terms import (
    JSD,
    ForwardKL,
    ReverseKL,
    SampledReverseKL,
    SkewReverseKL,
    Term,
    TopKForwardKL,
    TopKReverseKL,
)
from tutelage.core.weighting import entropy_gate

Make = Callable[..., Any]
DTYPES = [(torch.float64, 1e-10), (torch.float32, 1e-5)]
ROWS, VOCAB = 7, 23
TOKENS = [0, 22, 3, 3, 17, 9, 1]
PER_ROW = [1.0, 0.0, 0.3, 0.0, 2.0, 0.0, -0.5]
# Away from log p: ratios far above, far below and within the clip, with either sign of advantage.
SHIFTS = [0.0, 1.0, -1.0, 0.1, -0.1, 3.0, -3.0]


def soft_gate(teacher_entropy: Tensor) -> Tensor:
    """A gate that is neither open nor shut."""
    return torch.sigmoid((teacher_entropy - 2.0) / 0.3)


def gate_of(log_q: Tensor) -> Tensor:
    """The same from the teacher's log-probabilities."""
    return 1 / (1 + torch.exp((2.0 - reference.entropy(log_q)) / 0.3))


TERMS: dict[str, tuple[Term, reference.Function]] = {
    "reverse": (ReverseKL(), reference.reverse_kl),
    "forward": (ForwardKL(), reference.forward_kl),
    "forward_gated": (ForwardKL(soft_gate), lambda p, q: gate_of(q) * reference.forward_kl(p, q)),
    "jsd": (JSD(), lambda p, q: reference.jsd(p, q, 0.5)),
    "jsd_0.1": (JSD(0.1), lambda p, q: reference.jsd(p, q, 0.1)),
    "jsd_0.9": (JSD(0.9), lambda p, q: reference.jsd(p, q, 0.9)),
    "skew": (SkewReverseKL(), lambda p, q: reference.skew_reverse_kl(p, q, 0.1)),
    "skew_0": (SkewReverseKL(0.0), reference.reverse_kl),
    "skew_0.7": (SkewReverseKL(0.7), lambda p, q: reference.skew_reverse_kl(p, q, 0.7)),
    "topk_tail": (TopKForwardKL(5), lambda p, q: reference.topk_kl(p, q, 5, True)),
    "topk_tail_1": (TopKForwardKL(1), lambda p, q: reference.topk_kl(p, q, 1, True)),
    "topk_tail_all": (TopKForwardKL(99), reference.forward_kl),
    "topk_renorm": (
        TopKForwardKL(5, tail=False),
        lambda p, q: reference.topk_renormalized(p, q, 5),
    ),
    "topk_renorm_all": (TopKForwardKL(VOCAB, tail=False), reference.forward_kl),
    "topk_reverse": (TopKReverseKL(5), lambda p, q: reference.topk_kl(p, q, 5, False)),
    "topk_reverse_all": (TopKReverseKL(VOCAB), reference.reverse_kl),
    "topk_student": (
        TopKReverseKL(5, "student"),
        lambda p, q: reference.topk_kl(p, q, 5, False, "student"),
    ),
    "topk_student_tail": (
        TopKForwardKL(5, support="student"),
        lambda p, q: reference.topk_kl(p, q, 5, True, "student"),
    ),
}


def distance(found: Tensor | None, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    assert found is not None
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-300))


def assert_parity(
    pair: Any,
    terms: Sequence[tuple[Term, reference.Function, Sequence[float]]],
    limit: float,
) -> Objective:
    """Value and gradients of a composite objective equal the reference's."""
    heads = pair.reference
    heads = heads[0], replace(heads[1], swap=pair.teacher.swap)
    expected, gradients = reference.composite(heads, [(f, w) for _, f, w in terms])
    weighted = [(term, torch.tensor(w, dtype=torch.float64)) for term, _, w in terms]
    rows_a_chunk = 3 * 2 * VOCAB * pair.student.dtype.itemsize
    found = composite_objective(pair.student, pair.teacher, weighted, chunk_bytes=rows_a_chunk)
    found.total.backward()
    assert distance(found.value, expected) <= limit
    assert abs(found.total.item() - float(expected.sum())) <= limit * float(expected.abs().sum())
    leaves = (pair.student.hidden, pair.student.weight, pair.student.bias)
    for leaf, gradient in zip((x for x in leaves if x is not None), gradients, strict=True):
        assert distance(leaf.grad, gradient) <= limit
    return found


@pytest.mark.parametrize(("dtype", "limit"), DTYPES)
@pytest.mark.parametrize("weights", [[1.0] * ROWS, PER_ROW], ids=["ones", "per_row"])
@pytest.mark.parametrize("name", TERMS)
def test_a_term_equals_the_reference(
    make_pair: Make, name: str, weights: list[float], dtype: torch.dtype, limit: float
) -> None:
    term, function = TERMS[name]
    pair = make_pair(vocab_size=VOCAB, dtype=dtype, has_bias=True, scale=0.7, softcap=4.0)
    assert_parity(pair, [(term, function, weights)], limit)


@pytest.mark.parametrize("name", TERMS)
def test_a_term_equals_the_reference_on_peaked_rows(make_pair: Make, name: str) -> None:
    """Probabilities down to e^-55: nothing overflows, nothing drowns."""
    term, function = TERMS[name]
    pair = make_pair(vocab_size=VOCAB, spread=2.0)
    assert_parity(pair, [(term, function, PER_ROW)], 1e-10)


def sampled_pair(pair: Any, shifts: Sequence[float], clip: float) -> tuple[Term, Any]:
    """The sampled term and its reference, p_old being e^-shift of the student's own p."""
    log_p = reference.log_softmax(pair.reference[0].logits())
    old = [float(log_p[n, y]) - shifts[n] for n, y in enumerate(TOKENS)]
    term = SampledReverseKL(torch.tensor(TOKENS), torch.tensor(old, dtype=torch.float64), clip)
    return term, lambda p, q: reference.sampled(p, q, TOKENS, old, clip)


@pytest.mark.parametrize(("dtype", "limit"), DTYPES)
@pytest.mark.parametrize("clip", [0.2, 0.05, 10.0])
@pytest.mark.parametrize("shifts", [[0.0] * ROWS, SHIFTS], ids=["on_policy", "off_policy"])
def test_the_sampled_estimator_equals_the_reference(
    make_pair: Make, shifts: list[float], clip: float, dtype: torch.dtype, limit: float
) -> None:
    pair = make_pair(vocab_size=VOCAB, dtype=dtype)
    assert_parity(pair, [(*sampled_pair(pair, shifts, clip), PER_ROW)], limit)


@pytest.mark.parametrize(
    ("shift", "sign", "is_clipped"),
    [(0.5, 1, True), (0.5, -1, False), (-0.5, 1, False), (-0.5, -1, True), (0.1, 1, False)],
)
def test_the_clip_binds_only_where_it_would_go_too_far(
    shift: float, sign: int, is_clipped: bool
) -> None:
    """A row of two ids; the clip cuts the gradient where r has moved the way A wants it."""
    student = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    eye = torch.eye(2, dtype=torch.float64)
    old = math.log(0.5) - shift
    teacher = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    teacher[0, 0] = 40.0 if sign > 0 else -40.0
    term = SampledReverseKL(torch.tensor([0]), torch.tensor([old], dtype=torch.float64))
    composite_objective(
        LazyLogits(student, eye), LazyLogits(teacher, eye), [(term, 1.0)]
    ).total.backward()
    assert student.grad is not None
    assert bool((student.grad == 0).all()) == is_clipped
    if not is_clipped:  # descent raises the id exactly when the teacher likes it
        assert -math.copysign(1, float(student.grad[0, 0])) == sign


@pytest.mark.parametrize(("dtype", "limit"), DTYPES)
def test_sums_of_terms_equal_the_reference(
    make_pair: Make, dtype: torch.dtype, limit: float
) -> None:
    """Every term at once, each with other weights, zeros among them."""
    pair = make_pair(vocab_size=VOCAB, dtype=dtype, has_bias=True)
    generator = torch.Generator().manual_seed(5)
    terms: list[Any] = []
    for term, function in [*TERMS.values(), sampled_pair(pair, SHIFTS, 0.2)]:
        weights = torch.rand(ROWS, generator=generator)
        weights[torch.rand(ROWS, generator=generator) < 0.4] = 0.0
        terms.append((term, function, weights.tolist()))
    assert_parity(pair, terms, limit)


@pytest.mark.parametrize(("dtype", "limit"), DTYPES)
@pytest.mark.parametrize("name", ["reverse", "forward", "jsd", "topk_tail", "topk_renorm"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_swapped_stop_ids_are_swapped_columns_of_the_teacher(
    make_pair: Make, name: str, softcap: float | None, dtype: torch.dtype, limit: float
) -> None:
    term, function = TERMS[name]
    pair = make_pair(vocab_size=VOCAB, dtype=dtype, has_bias=True, softcap=softcap)
    plain = composite_objective(pair.student, pair.teacher, [(term, 1.0)]).value
    pair.teacher = replace(pair.teacher, swap=(3, 22))
    found = assert_parity(pair, [(term, function, [1.0] * ROWS)], limit)
    assert distance(found.value, plain.double()) > 1e-3  # the swap is seen


def test_statistics_follow_the_swap(make_pair: Make) -> None:
    pair = make_pair(vocab_size=VOCAB)
    pair.teacher = replace(pair.teacher, swap=(3, 22))
    found = token_stats(pair.student, pair.teacher, torch.tensor(TOKENS), extras=["compatibility"])
    logits = [head.logits() for head in pair.reference]
    log_p, log_q = (reference.log_softmax(z) for z in logits)
    log_q[:, [3, 22]] = log_q[:, [22, 3]]
    expected = torch.stack([log_q[n, y] for n, y in enumerate(TOKENS)])
    torch.testing.assert_close(found.log_q, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.reverse_kl, reference.kl(log_p, log_q), rtol=1e-12, atol=0)
    extra = [reference.extras(z, q)["compatibility"] for z, q in zip(logits[0], log_q, strict=True)]
    assert found.extras["compatibility"].tolist() == pytest.approx(extra, rel=1e-12)


def test_a_student_is_never_swapped(make_pair: Make) -> None:
    pair = make_pair()
    with pytest.raises(ValueError, match="only the teacher's ids can be swapped"):
        composite_objective(replace(pair.student, swap=(0, 1)), pair.teacher, [(JSD(), 1.0)])


@pytest.mark.parametrize(
    "name", ["jsd", "skew", "topk_tail", "topk_renorm", "topk_reverse", "topk_student"]
)
def test_an_infinite_bias_is_refused_where_it_would_be_misread(make_pair: Make, name: str) -> None:
    for side in ("student", "teacher"):
        pair = make_pair(vocab_size=VOCAB, has_bias=True)
        with torch.no_grad():
            pair.__dict__[side].bias[4] = -math.inf
        with pytest.raises(ValueError, match="need finite logits, got an infinite bias"):
            composite_objective(pair.student, pair.teacher, [(TERMS[name][0], 1.0)])
        allowed = composite_objective(pair.student, pair.teacher, [(ReverseKL(), 0.0)])
        assert allowed.total.item() == 0.0


@pytest.mark.parametrize("name", TERMS)
def test_equal_distributions_cost_nothing_and_pull_nowhere(make_pair: Make, name: str) -> None:
    if name == "topk_renorm":
        pytest.skip("it pulls mass onto the top k even then: see the tests of the theory")
    pair = make_pair(vocab_size=VOCAB)
    teacher = LazyLogits(pair.student.hidden.detach(), pair.student.weight.detach())
    found = composite_objective(pair.student, teacher, [(TERMS[name][0], 1.0)])
    found.total.backward()
    assert found.value.abs().max() <= 1e-14
    assert pair.student.hidden.grad.abs().max() <= 1e-13


@pytest.mark.parametrize("name", TERMS)
def test_weight_0_silences_a_row_bit_for_bit(make_pair: Make, name: str) -> None:
    pair = make_pair(vocab_size=VOCAB)
    weights = torch.tensor(PER_ROW, dtype=torch.float64)
    composite_objective(pair.student, pair.teacher, [(TERMS[name][0], weights)]).total.backward()
    assert (pair.student.hidden.grad[weights == 0] == 0).all()
    assert (pair.student.hidden.grad[weights != 0] != 0).any(-1).all()


def test_terms_refuse_what_they_cannot_mean(make_pair: Make) -> None:
    for wrong in (0.0, 1.0, -0.1, 2.0, math.nan):
        with pytest.raises(ValueError, match="teacher_weight must be strictly between 0 and 1"):
            JSD(wrong)
    for wrong in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\)"):
            SkewReverseKL(wrong)
    for term in (TopKForwardKL, TopKReverseKL):
        with pytest.raises(ValueError, match="k must be at least 1, got 0"):
            term(0)
    with pytest.raises(ValueError, match="renormalises the teacher on its own top k"):
        TopKForwardKL(tail=False, support="student")
    with pytest.raises(ValueError, match="needs at least one term, got none"):
        composite_objective(make_pair().student, make_pair().teacher, [])


@pytest.mark.parametrize("rule", ["soft_or", "first_n", "entropy_sample"])
@pytest.mark.parametrize("is_corrected", [False, True])
def test_selected_and_weighted_terms_equal_the_reference(
    make_pair: Make, rule: str, is_corrected: bool
) -> None:
    """What a step learns from: kept rows, each with its own weight, of a mixture of terms."""
    if is_corrected and rule != "entropy_sample":
        pytest.skip("only rules that sample can be corrected")
    pair = make_pair(rows=24, vocab_size=VOCAB)
    completion, position = torch.arange(24) // 8, torch.arange(24) % 8
    stats = token_stats(pair.student, pair.teacher, position)
    uniform = torch.rand(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    chosen = select_tokens(
        stats, completion, rule, 0.4, uniform=uniform, position=position,
        correct_sampling=is_corrected,
    )  # fmt: skip
    weights = chosen.weights * torch.linspace(0.0, 2.0, len(chosen.rows)).double()
    everywhere = torch.zeros(24, dtype=torch.float64)
    everywhere[chosen.rows] = weights
    expected, gradients = reference.composite(
        pair.reference,
        [(f, everywhere.tolist()) for f in (TERMS["jsd"][1], TERMS["topk_tail"][1])],
    )
    terms = [(TERMS[name][0], weights) for name in ("jsd", "topk_tail")]
    found = composite_objective(pair.student[chosen.rows], pair.teacher[chosen.rows], terms)
    found.total.backward()
    assert found.total.item() == pytest.approx(float(expected.sum()), rel=1e-12)
    assert distance(pair.student.hidden.grad, gradients[0]) <= 1e-11
    assert distance(pair.student.weight.grad, gradients[1]) <= 1e-11


@pytest.mark.parametrize(("dtype", "limit"), DTYPES)
@pytest.mark.parametrize("others", [(), (JSD(),), (ForwardKL(),)])
def test_gated_forward_kl_on_top_of_others_equals_the_reference(
    make_pair: Make, dtype: torch.dtype, limit: float, others: tuple[Term, ...]
) -> None:
    """On the fast path (no others) and on the general one."""
    functions = {JSD: TERMS["jsd"][1], ForwardKL: reference.forward_kl}
    terms = [(ReverseKL(), reference.reverse_kl, PER_ROW), (*TERMS["forward_gated"], [0.7] * ROWS)]
    terms += [(term, functions[type(term)], [0.2] * ROWS) for term in others]
    assert_parity(make_pair(rows=ROWS, vocab_size=VOCAB, dtype=dtype), terms, limit)


def test_a_gate_inside_equals_weights_from_a_scoring_pass(make_pair: Make) -> None:
    pair, other = (make_pair(rows=40, vocab_size=VOCAB, spread=0.7) for _ in "ab")
    stats = token_stats(other.student, other.teacher, torch.zeros(40, dtype=torch.long))
    threshold = float(stats.teacher_entropy.median())

    def gate(teacher_entropy: Tensor) -> Tensor:
        return entropy_gate(teacher_entropy, threshold)

    inside = [(ReverseKL(), 1.0), (ForwardKL(gate), 0.5)]
    composite_objective(pair.student, pair.teacher, inside).total.backward()
    weight = 0.5 * gate(stats.teacher_entropy)
    assert 5 < int((weight > 0).sum()) < 35  # the gate does something
    composite_objective(
        other.student, other.teacher, [(ReverseKL(), 1.0), (ForwardKL(), weight)]
    ).total.backward()
    assert distance(pair.student.weight.grad, other.student.weight.grad) <= 1e-12
    assert distance(pair.student.hidden.grad, other.student.hidden.grad) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_top_of_a_certain_teacher_is_found_among_underflowed_probabilities(
    dtype: torch.dtype,
) -> None:
    """Beyond 104 nats float32 gives every id probability 0, but the top k is still the top k."""
    teacher = torch.tensor([[-900.0, 0.0, -150.0, -800.0, -120.0, -700.0]], dtype=dtype)
    z = torch.tensor([[40.0, 0.0, 0.0, 0.0, 0.0, 0.0]], dtype=dtype)
    eye = torch.eye(6, dtype=dtype)
    log_p, log_q = reference.log_softmax(z.double()), reference.log_softmax(teacher.double())
    for term, is_forward in ((TopKForwardKL(3), True), (TopKReverseKL(3), False)):
        found = composite_objective(LazyLogits(z, eye), LazyLogits(teacher, eye), [(term, 1.0)])
        expected = float(reference.topk_kl(log_p, log_q, 3, is_forward)[0])
        assert float(found.total) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("term", "function"),
    [
        (TopKForwardKL(3, tail=False), lambda p, q: reference.topk_renormalized(p, q, 3)),
        (SkewReverseKL(0.0), reference.reverse_kl),
        (SkewReverseKL(), lambda p, q: reference.skew_reverse_kl(p, q, 0.1)),
        (JSD(), lambda p, q: reference.jsd(p, q, 0.5)),
    ],
    ids=["renorm", "skew_0", "skew", "jsd"],
)
def test_ratios_beyond_the_range_of_float32_stay_numbers(
    term: Term, function: reference.Function, dtype: torch.dtype
) -> None:
    """The teacher's second id has probability 0 in float32, and p/q overflows."""
    teacher = torch.tensor([[0.0, -150.0, -160.0, -170.0, -180.0]], dtype=dtype)
    z = torch.tensor([[0.0, 1.0, 0.5, -1.0, 2.0]], dtype=dtype).requires_grad_(True)
    eye = torch.eye(5, dtype=dtype)
    expected, gradients = reference.composite(
        (
            reference.Head(z.detach().double(), eye.double()),
            reference.Head(teacher.double(), eye.double()),
        ),
        [(function, [1.0])],
    )
    found = composite_objective(LazyLogits(z, eye), LazyLogits(teacher, eye), [(term, 1.0)])
    found.total.backward()
    assert found.total.item() == pytest.approx(float(expected.sum()), rel=1e-5)
    assert distance(z.grad, gradients[0]) <= 1e-5
