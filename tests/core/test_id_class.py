"""Ids that count as one: every term and statistic against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from tutelage.core import EXTRAS, LazyLogits, composite_objective, kernels, token_stats
from tutelage.core.id_class import IdClass
from tutelage.core.partial import PartialLogits
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

Make = Callable[..., Any]

VOCAB, ROWS = 23, 5
CLASSES = [(3, 17), (0, 22), (21, 22), (0, 1, 20, 22), (4, 21)]
TOKENS = [0, 22, 3, 20, 17]
WEIGHTS = [1.0, 0.0, 0.3, -0.5, 2.0]
OLD = [-1.0, -2.0, -0.4, -3.0, -2.5]
TERMS: dict[str, tuple[Term, reference.Function]] = {
    "reverse": (ReverseKL(), reference.reverse_kl),
    "forward": (ForwardKL(), reference.forward_kl),
    "gated": (
        ForwardKL(lambda h: torch.sigmoid(h - 2.0)),
        lambda p, q: torch.sigmoid(reference.entropy(q) - 2.0) * reference.forward_kl(p, q),
    ),
    "jsd": (JSD(0.3), lambda p, q: reference.jsd(p, q, 0.3)),
    "skew": (SkewReverseKL(0.1), lambda p, q: reference.skew_reverse_kl(p, q, 0.1)),
    "topk": (TopKReverseKL(4), lambda p, q: reference.topk_kl(p, q, 4, False)),
    "topk_student": (
        TopKReverseKL(4, "student"),
        lambda p, q: reference.topk_kl(p, q, 4, False, "student"),
    ),
    "topk_forward": (TopKForwardKL(4), lambda p, q: reference.topk_kl(p, q, 4, True)),
    "topk_renorm": (
        TopKForwardKL(4, tail=False),
        lambda p, q: reference.topk_renormalized(p, q, 4),
    ),
}


def column(token: int, ids: Sequence[int]) -> int:
    """Where the reference has an id: the class first, then the others in order."""
    rest = [i for i in range(VOCAB) if i not in ids]
    return 0 if token in ids else 1 + rest.index(token)


def merged(function: reference.Function, ids: Sequence[int]) -> reference.Function:
    """The divergence between rows in which some ids are one outcome."""
    return lambda p, q: function(reference.one_class(p, ids), reference.one_class(q, ids))


def sampled(ids: Sequence[int], dtype: torch.dtype) -> tuple[Term, reference.Function]:
    """The sampled token's term and its reference."""
    tokens = [column(token, ids) for token in TOKENS]
    old = torch.tensor(OLD, dtype=dtype)
    term = SampledReverseKL(torch.tensor(TOKENS), old, 50.0)
    function = lambda p, q: reference.sampled(p, q, tokens, old.tolist(), 50.0)  # noqa: E731
    return term, function


def distance(found: Tensor | None, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    assert found is not None
    return float((found.double() - expected).norm() / expected.norm())


def assert_parity(
    pair: Any, ids: tuple[int, ...], named: Sequence[str], limit: float, **options: Any
) -> None:
    """Value and gradients of a sum of terms, in chunks of two rows."""
    dtype = pair.student.dtype
    known = {**TERMS, "sampled": sampled(ids, dtype)}
    terms = [known[name] for name in named]
    expected, gradients = reference.composite(
        pair.reference, [(merged(f, ids), WEIGHTS) for _, f in terms]
    )
    student = replace(pair.student, one_class=ids)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    weighted = [(term, weights) for term, _ in terms]
    found = composite_objective(student, pair.teacher, weighted, **options)
    (found.total * 3).backward()
    assert distance(found.value, expected) <= limit
    leaves = [x for x in (student.hidden, student.weight, student.bias) if x is not None]
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert distance(leaf.grad, 3 * gradient) <= limit


@pytest.mark.parametrize("ids", CLASSES, ids=str)
@pytest.mark.parametrize("name", [*TERMS, "sampled"])
def test_a_term_equals_the_reference(make_pair: Make, name: str, ids: tuple[int, ...]) -> None:
    pair = make_pair(rows=ROWS, vocab_size=VOCAB, has_bias=True, scale=0.7, softcap=4.0)
    assert_parity(pair, ids, [name], 1e-10, chunk_bytes=2 * 2 * VOCAB * 8)


@pytest.mark.parametrize("names", [("reverse", "forward", "topk"), ("jsd", "sampled")])
def test_sums_of_terms_equal_the_reference(make_pair: Make, names: tuple[str, ...]) -> None:
    assert_parity(make_pair(rows=ROWS, vocab_size=VOCAB), (3, 21), names, 1e-10)


@pytest.mark.parametrize("ids", CLASSES, ids=str)
def test_statistics_equal_the_reference(make_pair: Make, ids: tuple[int, ...]) -> None:
    pair = make_pair(rows=ROWS, vocab_size=VOCAB, has_bias=True, softcap=5.0)
    student, tokens = replace(pair.student, one_class=ids), torch.tensor(TOKENS)
    found = token_stats(student, pair.teacher, tokens, extras=tuple(EXTRAS))
    z, y = (head.logits() for head in pair.reference)
    log_p, log_q = (reference.one_class(reference.log_softmax(x), ids) for x in (z, y))
    places = [column(token, ids) for token in TOKENS]
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
    more = [reference.extras(*row) for row in zip(log_p, log_q, places, strict=True)]
    for name, values in found.extras.items():
        exact = torch.tensor([row[name] for row in more], dtype=torch.float64)
        torch.testing.assert_close(values, exact, rtol=1e-9, atol=1e-12)
    alone = token_stats(student, None, tokens)
    for name in ("entropy", "log_p"):
        torch.testing.assert_close(vars(alone)[name], expected[name], rtol=1e-10, atol=1e-12)


def test_the_record_of_the_clip_is_the_terms_own(make_pair: Make) -> None:
    pair = make_pair(rows=ROWS, vocab_size=VOCAB)
    term = SampledReverseKL(torch.tensor(TOKENS), torch.full((ROWS,), -40.0), 0.2)
    student = replace(pair.student, one_class=(3, 17))
    composite_objective(student, pair.teacher, [(term, 1.0)])
    assert term.is_clipped.all()


def test_a_class_hides_how_its_mass_is_spread(make_pair: Make) -> None:
    """What the option is for: one side ends with one id, the other with another."""
    z = torch.zeros(1, 5, dtype=torch.float64)
    student, teacher = z.clone(), z.clone()
    student[0, 1], teacher[0, 3] = 9.0, 9.0
    eye = torch.eye(5, dtype=torch.float64)
    sides = LazyLogits(student.requires_grad_(True), eye), LazyLogits(teacher, eye)
    apart = composite_objective(*sides, [(ReverseKL(), 1.0)])
    together = composite_objective(
        replace(sides[0], one_class=(1, 3)), sides[1], [(ReverseKL(), 1.0)]
    )
    assert apart.total.item() > 8.0
    assert abs(together.total.item()) < 1e-15
    together.total.backward()
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-15


def test_ids_that_both_sides_rule_out(make_pair: Make) -> None:
    """A class without mass, or with one member of no mass, leaves all numbers finite."""
    for out in ((3,), (3, 17)):
        pair = make_pair(rows=ROWS, vocab_size=VOCAB, has_bias=True)
        with torch.no_grad():
            pair.student.bias[list(out)] = -torch.inf
            pair.teacher.bias[list(out)] = -torch.inf
        student = replace(pair.student, one_class=(3, 17))
        found = composite_objective(student, pair.teacher, [(ReverseKL(), 1.0), (ForwardKL(), 1.0)])
        found.total.backward()
        log_p, log_q = (
            reference.one_class(reference.log_softmax(head.logits()), (3, 17))
            for head in pair.reference
        )
        exact = reference.reverse_kl(log_p, log_q) + reference.forward_kl(log_p, log_q)
        torch.testing.assert_close(found.value, exact, rtol=1e-10, atol=1e-12)
        assert torch.isfinite(pair.student.weight.grad).all()
        assert (pair.student.weight.grad[list(out)] == 0).all()


def test_what_is_no_class_is_refused(make_pair: Make) -> None:
    for wrong in ((3,), (3, 3), (5, 3), (3, VOCAB), (-1, 2)):
        with pytest.raises(ValueError, match="needs two or more ids below 23"):
            IdClass(wrong, VOCAB)
    pair = make_pair(rows=ROWS, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="are those of the student's logits"):
        token_stats(pair.student, replace(pair.teacher, one_class=(1, 2)), torch.tensor(TOKENS))
    tokens = torch.zeros(ROWS, dtype=torch.long)
    known = PartialLogits(tokens[:, None], torch.zeros(ROWS, 1), tokens, torch.zeros(ROWS), VOCAB)
    with pytest.raises(ValueError, match="of the teacher only some ids are known"):
        token_stats(replace(pair.student, one_class=(1, 2)), known, tokens)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, at −inf − −inf
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [None, 1 << 11])
@pytest.mark.parametrize("names", [*((name,) for name in TERMS), ("reverse", "topk"), ("sampled",)])
def test_the_kernels_compute_the_same(
    make_pair: Make, launches: list[str], names: Any, chunk_bytes: int | None, dtype: torch.dtype
) -> None:
    pytest.importorskip("triton")
    if dtype == torch.bfloat16 and names not in (("reverse", "topk"), ("sampled",)):
        pytest.skip("two sums are enough to see narrow gradients")
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    pair = make_pair(rows=ROWS, vocab_size=VOCAB, dtype=dtype, has_bias=True, scale=0.7)
    assert_parity(pair, (0, 4, 20, 21), names, limit, chunk_bytes=chunk_bytes)
    assert launches


@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, at −inf − −inf
def test_the_kernels_score_the_same_and_leave_soft_caps_to_torch(
    make_pair: Make, launches: list[str]
) -> None:
    pytest.importorskip("triton")
    tokens = torch.tensor(TOKENS)
    for softcap in (None, 4.0):
        pair = make_pair(
            rows=ROWS, vocab_size=VOCAB, dtype=torch.float32, has_bias=True, softcap=softcap
        )
        sides = replace(pair.student, one_class=(3, 21)), pair.teacher
        launches.clear()
        found = (
            token_stats(*sides, tokens, extras=tuple(EXTRAS)),
            token_stats(sides[0], None, tokens),
        )
        assert bool(launches) == (softcap is None)
        assert kernels.suits(*sides) == (softcap is None)
        wide = [
            replace(x, hidden=x.hidden.double(), weight=x.weight.double(), bias=x.bias.double())
            for x in sides
        ]
        exact = token_stats(*wide, tokens, extras=tuple(EXTRAS)), token_stats(wide[0], None, tokens)
        for ours, theirs in zip(found, exact, strict=True):
            torch.testing.assert_close(
                ours.stack(), theirs.stack(), rtol=2e-5, atol=2e-6, equal_nan=True
            )
