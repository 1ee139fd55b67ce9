"""What the papers derive, as tests: blind spot, Soft-OR's limits, oracle weight, bias of top k."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from tutelage.core import (
    LazyLogits,
    TokenStats,
    composite_objective,
    importance,
    select_tokens,
    token_stats,
)
from tutelage.core.terms import (
    ForwardKL,
    ReverseKL,
    SampledReverseKL,
    Support,
    Term,
    TopKForwardKL,
    TopKReverseKL,
)
from tutelage.core.weighting import entropy_gate

Make = Callable[..., Any]

SUPPORTS: tuple[Support, ...] = ("teacher", "student")


def lazy(logits: Tensor) -> LazyLogits:
    """Logits that are given directly."""
    return LazyLogits(logits, torch.eye(logits.shape[1], dtype=torch.float64))


def plane(entropy: Tensor, divergence: Tensor) -> TokenStats:
    """Statistics that differ on the two axes of the quadrants only."""
    return TokenStats(entropy, entropy, divergence, divergence, -divergence, -divergence)


@given(
    steps=st.lists(st.floats(0, 5), min_size=1, max_size=8),
    knots=st.lists(st.floats(0.01, 2.5), min_size=8, max_size=8),
    confidence=st.floats(8, 25),
)
def test_blind_spot_of_every_score_that_grows_with_entropy_alone(
    steps: list[float], knots: list[float], confidence: float
) -> None:
    """Any non-decreasing f, f(0) = 0, ranks Q3 below every token that is less sure.

    f is piecewise linear with random knots; the Q3 tokens are real rows: the student is sure of
    an id that the teacher rules out.
    """
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    teacher = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    z[:4] = 0.0
    z[:4, 0] = confidence
    teacher[:4, 0] = -8.0
    stats = token_stats(lazy(z), lazy(teacher), torch.zeros(40).long())
    xs = [0.0, *sorted(knots)[: len(steps)]]
    f = [sum(steps[:i]) for i in range(len(xs))]

    def score(h: float) -> float:
        for (x0, y0), (x1, y1) in zip(zip(xs, f), zip(xs[1:], f[1:])):  # noqa: B905
            if h <= x1:
                return y0 + (y1 - y0) * (h - x0) / max(x1 - x0, 1e-300)
        return f[-1]

    scores = [score(h) for h in stats.entropy.tolist()]
    assert max(scores[:4]) <= min(scores[4:])  # never above anyone else's
    slope = max((b - a) / max(x1 - x0, 1e-300) for a, b, x0, x1 in zip(f, f[1:], xs, xs[1:]))  # noqa: B905
    assert max(scores[:4]) <= slope * float(stats.entropy[:4].max()) + 1e-12  # → 0 with h
    soft_or = importance(stats, "soft_or")
    delta = reference.normalize(stats.reverse_kl.tolist(), "minmax_p98", False)
    assert soft_or[:4].tolist() == pytest.approx(delta[:4], abs=1e-6)
    assert min(delta[:4]) > 0.9
    assert float(importance(stats, "q3")[:4].min()) > float(importance(stats, "q3")[4:].max())


@given(
    h=st.floats(0.0, 1.0), d=st.floats(0.0, 1.0), size=st.floats(0.1, 12), scale=st.floats(0.1, 12)
)
def test_soft_or_is_the_probability_of_either(
    h: float, d: float, size: float, scale: float
) -> None:
    """1 − (1 − ĥ)(1 − δ̂): ≈ δ̂ where ĥ = 0, ≈ 1 where either is 1, ≈ 0 where both are 0."""
    entropy = size * torch.tensor([0.0, 1.0, h, 0.0, 1.0, h], dtype=torch.float64)
    divergence = scale * torch.tensor([0.0, 1.0, d, d, d, 1.0], dtype=torch.float64)
    found = importance(plane(entropy, divergence), "soft_or", "minmax").tolist()
    expected = [0.0, 1.0, 1 - (1 - h) * (1 - d), d, 1.0, 1.0]
    assert found == pytest.approx(expected, abs=1e-9)


def minimal_student(log_p: Tensor, log_q: Tensor, step: float, direction: Tensor) -> float:
    """Diagnostic forward KL of one token after a step along −direction in logits."""
    moved = reference.log_softmax((log_p - step * direction)[None])
    return float(reference.forward_kl(moved, log_q[None])[0])


@pytest.mark.parametrize("seed", range(6))
def test_the_local_oracle_weight_is_the_best_step_of_a_second_order_model(seed: int) -> None:
    """One softmax token, loss KL(q‖p), step −s·g: the quadratic model is least at |g|²/(gᵀHg).

    The curvature comes from finite differences of the loss itself. For a teacher near the student
    the step is also the numeric minimum along the line.
    """
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(1, 9, generator=generator, dtype=torch.float64)
    teacher = z + 0.02 * torch.randn(1, 9, generator=generator, dtype=torch.float64)
    found = token_stats(lazy(z), lazy(teacher), torch.tensor([0]), extras=["local_oracle"])
    best = float(found.extras["local_oracle"][0])
    log_p, log_q = reference.log_softmax(z)[0], reference.log_softmax(teacher)[0]
    g = log_p.exp() - log_q.exp()

    def loss(step: float) -> float:
        return minimal_student(log_p, log_q, step, g)

    h = 0.05 * best
    slope, bend = (loss(h) - loss(-h)) / (2 * h), (loss(h) - 2 * loss(0) + loss(-h)) / h**2
    assert best == pytest.approx(-slope / bend, rel=0.02)
    steps = [best * (0.5 + 0.01 * i) for i in range(101)]
    assert min(steps, key=loss) == pytest.approx(best, rel=0.06)
    assert loss(best) < min(loss(0.8 * best), loss(1.2 * best))  # 20 % off would be seen


def line_search(log_p: Tensor, log_q: Tensor, direction: Tensor) -> float:
    """The most that one token's forward KL falls along −direction, by trying 241 steps."""
    start = minimal_student(log_p, log_q, 0.0, direction)
    steps = torch.logspace(-3, 9, 241, dtype=torch.float64).tolist()
    return start - min(minimal_student(log_p, log_q, step, direction) for step in steps)


def oracle_of(z: Tensor, teacher: Tensor) -> tuple[list[float], list[float], list[float]]:
    """`local_oracle` and `local_gain` of every row, and what a line search gains."""
    tokens, names = torch.zeros(len(z)).long(), ["local_oracle", "local_gain"]
    found = token_stats(lazy(z), lazy(teacher), tokens, extras=names).extras
    log_p, log_q = reference.log_softmax(z), reference.log_softmax(teacher)
    gains = [line_search(a, b, a.exp() - b.exp()) for a, b in zip(log_p, log_q, strict=True)]
    return found["local_oracle"].tolist(), found["local_gain"].tolist(), gains


@pytest.mark.parametrize(("gap", "limit"), [(0.02, 0.02), (0.3, 0.25)])
def test_the_local_gain_is_what_a_line_search_gains_near_the_teacher(
    gap: float, limit: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(12, 9, generator=generator, dtype=torch.float64)
    teacher = z + gap * torch.randn(12, 9, generator=generator, dtype=torch.float64)
    _, found, gains = oracle_of(z, teacher)
    assert found == pytest.approx(gains, rel=limit)


@pytest.mark.parametrize("confidence", [2.0, 5.0, 10.0, 20.0])
def test_far_from_the_teacher_the_gain_is_the_whole_loss_and_the_weight_is_a_length(
    confidence: float,
) -> None:
    """A student that is sure of the wrong id (Q3) gains nearly its whole loss, and never more."""
    z, teacher = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(1)).double()
    z[:, 0] += confidence
    teacher[:, 1] += 6.0
    _, found, gains = oracle_of(z, teacher)
    losses = reference.forward_kl(reference.log_softmax(z), reference.log_softmax(teacher))
    assert found == pytest.approx(gains, rel=0.15)
    assert all(g <= loss * (1 + 1e-12) for g, loss in zip(found, losses.tolist(), strict=True))


def test_the_oracle_weight_grows_on_solved_tokens_while_the_gain_vanishes() -> None:
    """p = q up to a hundredth of a nat, ever more certain: w ≥ 1/(2 (1 − max p)) → ∞, gain → 0."""
    generator = torch.Generator().manual_seed(2)
    noise, gap = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    rows = [noise + c * torch.eye(9, dtype=torch.float64)[0] for c in (2.0, 6.0, 12.0, 18.0)]
    z = torch.stack(rows)
    weights, found, gains = oracle_of(z, z + 0.01 * gap)
    rest = (1 - reference.log_softmax(z).exp().max(-1).values).tolist()
    assert all(w >= 1 / (2 * r) for w, r in zip(weights, rest, strict=True))
    assert weights == sorted(weights)
    assert found == sorted(found, reverse=True)
    assert gains == sorted(gains, reverse=True)
    assert weights[-1] > 1e5 * weights[0]
    assert found[-1] < 1e-5 * found[0]


def test_a_certain_student_has_an_infinite_oracle_weight_and_a_finite_gain() -> None:
    """All other ids rounded to 0: the weight is counted as non-finite, the gain is the loss."""
    z, teacher = torch.zeros(2, 3, 5, dtype=torch.float64)
    z[0, 0] = 2000.0  # certain and wrong
    teacher[:, 1] = 3.0
    z[1] = teacher[1] = torch.arange(5.0)  # equal, uncertain
    z[2, 0] = teacher[2, 0] = 2000.0  # equal, certain
    extras = ["local_oracle", "local_gain"]
    stats = token_stats(lazy(z), lazy(teacher), torch.zeros(3).long(), extras=extras)
    assert stats.extras["local_oracle"].tolist() == [math.inf, 0.0, 0.0]
    gains = [float(stats.forward_kl[0]), 0.0, 0.0]
    assert stats.extras["local_gain"].tolist() == gains
    one = torch.zeros(3).long()
    assert select_tokens(stats, one, "local_oracle", 1.0).num_nonfinite == 1
    assert select_tokens(stats, one, "local_gain", 0.4).rows.tolist() == [0]


def student_entropy_after(term: Term, teacher: Tensor, num_steps: int = 400) -> tuple[float, float]:
    """Entropy and forward KL of a student that starts as the teacher and minimises a term."""
    z = teacher.clone().requires_grad_(True)
    for _ in range(num_steps):
        composite_objective(lazy(z), lazy(teacher), [(term, 1.0)]).total.backward()
        assert z.grad is not None
        with torch.no_grad():
            z -= 2.0 * z.grad
        z.grad = None
    stats = token_stats(lazy(z.detach()), lazy(teacher), torch.tensor([0]))
    return float(stats.entropy[0]), float(stats.forward_kl[0])


def test_renormalised_top_k_sharpens_a_flat_teacher_and_the_tail_bucket_does_not() -> None:
    teacher = 0.3 * torch.randn(1, 100, generator=torch.Generator().manual_seed(1)).double()
    start = float(token_stats(lazy(teacher), lazy(teacher), torch.tensor([0])).entropy[0])
    assert start > 4.5  # of ln 100 = 4.61
    sharpened, divergence = student_entropy_after(TopKForwardKL(16, tail=False), teacher)
    assert sharpened < start - 0.5
    assert divergence > 0.2
    kept, none = student_entropy_after(TopKForwardKL(16), teacher)
    assert kept == pytest.approx(start, abs=1e-9)
    assert none == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("k", [1, 4, 16, 30])
def test_renormalised_top_k_is_a_kl_plus_a_pull_onto_the_top(make_pair: Make, k: int) -> None:
    """L_renorm = KL(q̃‖p̃) − log P, with both sides renormalised on S and P the student's mass."""
    pair = make_pair(vocab_size=30)
    term = TopKForwardKL(k, tail=False)
    found = composite_objective(pair.student, pair.teacher, [(term, 1.0)]).value
    log_p, log_q = (reference.log_softmax(head.logits()) for head in pair.reference)
    for row, value in enumerate(found.tolist()):
        ids = reference.top_ids(log_q[row], k)
        inside = [reference.log_softmax(x[row, ids][None]) for x in (log_p, log_q)]
        mass = float(log_p[row, ids].exp().sum())
        expected = float(reference.forward_kl(*inside)[0]) - math.log(mass)
        assert value == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("k", [1, 3, 8, 29, 30])
def test_a_tail_bucket_never_exceeds_the_full_divergence(make_pair: Make, k: int) -> None:
    """Coarser distributions are closer (data processing), in both directions."""
    pair = make_pair(vocab_size=30, rows=20)
    full = token_stats(pair.student, pair.teacher, torch.zeros(20).long())
    pairs = [
        (term, limit)
        for support in SUPPORTS
        for term, limit in (
            (TopKForwardKL(k, support=support), full.forward_kl),
            (TopKReverseKL(k, support), full.reverse_kl),
        )
    ]
    for term, limit in pairs:
        found = composite_objective(pair.student, pair.teacher, [(term, 1.0)]).value
        assert bool((found <= limit + 1e-12).all())
        assert bool((found >= -1e-14).all())
        if k < 29:
            assert bool((found < limit - 1e-6).any())


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("is_forward", [False, True])
def test_with_a_tail_truncated_kl_is_0_only_where_the_buckets_agree(
    support: Support, is_forward: bool
) -> None:
    """Equal on the top and in the tail's mass: 0 and no gradient; one bucket moved: above 0."""
    q = torch.tensor([[0.4, 0.3, 0.1, 0.1, 0.06, 0.04]], dtype=torch.float64)
    p = torch.tensor([[0.4, 0.3, 0.02, 0.01, 0.07, 0.2]], dtype=torch.float64)
    term = TopKForwardKL(2, support=support) if is_forward else TopKReverseKL(2, support)
    for moved in (0.0, 1e-6, -1e-6, 0.1, -0.1):
        for place in (0, 3):  # a bucket of the top, and the tail
            change = torch.zeros_like(p)
            change[0, place], change[0, 1] = moved, -moved
            z = (p + change).clamp(min=1e-3).log().requires_grad_(True)
            found = composite_objective(lazy(z), lazy(q.log()), [(term, 1.0)])
            found.total.backward()
            assert z.grad is not None
            if moved:
                assert found.total.item() > 0
            else:
                assert abs(found.total.item()) <= 1e-15
                assert float(z.grad.abs().max()) <= 1e-15


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.floats(0.1, 8))
def test_a_truncated_reverse_kl_is_never_negative_with_its_tail(
    seed: int, k: int, spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, y = spread * torch.randn(2, 4, 12, generator=generator, dtype=torch.float64)
    for support in SUPPORTS:
        found = composite_objective(lazy(z), lazy(y), [(TopKReverseKL(k, support), 1.0)])
        assert float(found.value.min()) >= -1e-13


def test_without_its_tail_truncated_reverse_kl_falls_below_0_as_mass_leaves_the_top() -> None:
    """Negative control: the sum over the top alone rewards a student that leaves it."""
    q = torch.tensor([[0.5, 0.3, 0.1, 0.1]], dtype=torch.float64)
    values, with_tail = [], []
    for left in (0.2, 0.5, 0.7):
        inside = (1 - left) * torch.tensor([0.625, 0.375], dtype=torch.float64)
        p = torch.cat([inside, torch.full((2,), left / 2, dtype=torch.float64)])[None]
        values.append(float((p * (p / q).log())[0, :2].sum()))
        top = [(TopKReverseKL(2), 1.0)]
        with_tail.append(float(composite_objective(lazy(p.log()), lazy(q.log()), top).total))
    assert values[0] > values[1] > -1
    assert values[1] < -0.1
    assert with_tail[0] < with_tail[1] < with_tail[2]


def test_the_expected_sampled_gradient_is_that_of_reverse_kl() -> None:
    """Every id as the sample, weighted by its probability: the exact expectation, no noise."""
    generator = torch.Generator().manual_seed(3)
    z, teacher = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    log_p = reference.log_softmax(z)
    expected = torch.zeros_like(z)
    for y in range(6):
        student = z.clone().requires_grad_(True)
        tokens = torch.full((5,), y)
        term = SampledReverseKL(tokens, log_p[:, y])
        composite_objective(
            lazy(student), lazy(teacher), [(term, log_p[:, y].exp())]
        ).total.backward()
        assert student.grad is not None
        expected += student.grad
    student = z.clone().requires_grad_(True)
    composite_objective(lazy(student), lazy(teacher), [(ReverseKL(), 1.0)]).total.backward()
    torch.testing.assert_close(student.grad, expected, rtol=1e-12, atol=1e-14)


def test_k1_without_an_advantage_would_teach_nothing() -> None:
    """Negative control: Σ_y p(y) ∇(log p(y) − log q(y)) = 0, the teacher has no say."""
    z = torch.randn(5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    z.requires_grad_(True)
    log_p = reference.log_softmax(z)
    (log_p.detach().exp() * log_p).sum().backward()
    assert z.grad is not None
    assert float(z.grad.abs().max()) <= 1e-14


@pytest.mark.parametrize("forward", [ForwardKL(), TopKForwardKL(4), TopKForwardKL(4, tail=False)])
def test_rows_outside_the_gate_get_the_plain_gradient_bit_for_bit(
    make_pair: Make, forward: Term
) -> None:
    """Reverse KL alone, computed by the same path, equals EOPD's row wherever the gate is shut."""
    pair = make_pair(rows=20, vocab_size=30)
    teacher_entropy = token_stats(
        pair.student, pair.teacher, torch.zeros(20).long()
    ).teacher_entropy
    gate = entropy_gate(teacher_entropy, 0.5, "percentile")
    assert 0 < int(gate.sum()) < 20
    gradients = []
    for weight in (gate, torch.zeros_like(gate)):
        pair.student.hidden.grad = None
        terms: list[tuple[Term, Tensor | float]] = [(ReverseKL(), 1.0), (forward, weight)]
        composite_objective(pair.student, pair.teacher, terms).total.backward()
        gradients.append(pair.student.hidden.grad)
    is_shut = gate == 0
    assert torch.equal(gradients[0][is_shut], gradients[1][is_shut])
    assert bool((gradients[0][~is_shut] != gradients[1][~is_shut]).any(-1).all())


def test_forward_kl_alone_gives_ungated_rows_no_gradient(make_pair: Make) -> None:
    pair = make_pair(rows=20, vocab_size=30)
    stats = token_stats(pair.student, pair.teacher, torch.zeros(20).long())
    gate = entropy_gate(stats.teacher_entropy, float(stats.teacher_entropy.median()))
    composite_objective(pair.student, pair.teacher, [(ForwardKL(), gate)]).total.backward()
    assert bool((pair.student.hidden.grad[gate == 0] == 0).all())
    assert bool((pair.student.hidden.grad[gate == 1] != 0).any(-1).all())
