"""A teacher of top-k log-probabilities: its bounds, and its place in objective and statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import reference
from tutelage.core import LazyLogits, composite_objective, distillation_objective, token_stats
from tutelage.core.partial import TAIL_RESOLUTION, Bounds, PartialLogits, bounds
from tutelage.core.terms import SampledReverseKL, TopKForwardKL, TopKReverseKL

NUM_ROWS = 100_000


def known_of(log_q: Tensor, k: int, tokens: Tensor) -> PartialLogits:
    """What a server gives of whole log-probabilities."""
    top = log_q.topk(k, -1)
    token_log_q = log_q.gather(1, tokens[:, None]).squeeze(1)
    return PartialLogits(top.indices, top.values, tokens, token_log_q, log_q.shape[1])


def kinds(n: int, v: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher: smooth, with ties, nearly and exactly one-hot, few ids."""
    p, q = (torch.randn(n, v, generator=generator, dtype=torch.float64) for _ in "pq")
    scale = torch.tensor([0.1, 1.0, 4.0, 30.0])[torch.randint(4, (n, 1), generator=generator)]
    p, q = p * scale, q * scale.roll(1, 0)
    kind = torch.randint(5, (n,), generator=generator)
    q[kind == 1] = q[kind == 1].round()
    q[kind == 2, 0] += 60.0
    one = torch.full((v,), -torch.inf, dtype=torch.float64)
    one[v // 2] = 0.0
    q[kind == 3] = one
    few = torch.rand(n, v, generator=generator) < 0.5
    few[:, 0] = False
    return p, q.masked_fill(few & (kind == 4)[:, None], -torch.inf)


def exact(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, forward and reverse KL."""
    q, p = log_q.exp(), log_p.exp()
    entropy = -torch.where(q > 0, q * log_q, 0.0).sum(1)
    forward = torch.where(q > 0, q * (log_q - log_p), 0.0).sum(1)
    reverse = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(1)
    return entropy, forward, reverse


def outside(found: Bounds, truth: tuple[Tensor, Tensor, Tensor]) -> int:
    """Rows of which a true number lies outside, beyond what float64 rounds."""
    count = 0
    pairs = zip((found.entropy, found.forward_kl, found.reverse_kl), truth, strict=True)
    for (low, high), value in pairs:
        slack = 1e-10 * (1 + torch.where(value.isfinite(), value.abs(), 0.0))
        count += int((~((low - slack <= value) & (value <= high + slack))).sum())
    return count


def tried(v: int, n: int, seed: int, is_broken: bool = False) -> int:
    """Numbers outside their bounds, of n rows."""
    generator = torch.Generator().manual_seed(seed)
    p, q = kinds(n, v, generator)
    log_p, log_q = p.log_softmax(1), q.log_softmax(1)
    k = int(torch.randint(1, v + 1, (), generator=generator))
    tokens = torch.randint(v, (n,), generator=generator)
    teacher = known_of(log_q, min(k, 64), tokens)
    if is_broken:  # as if the k ids were all that there is
        scale = teacher.known_mass.log()[:, None]
        teacher = PartialLogits(
            teacher.ids, teacher.log_q - scale, tokens, teacher.token_log_q - scale[:, 0], v
        )
    return outside(bounds(log_p, teacher, 1e-13), exact(log_p, log_q))


@pytest.mark.parametrize("v", [5, 17, 300, 5000])
def test_bounds_contain_the_exact_numbers(v: int) -> None:
    sizes = {5: 40_000, 17: 30_000, 300: 2_000, 5000: 100}
    assert sum(tried(v, sizes[v] // 4, seed) for seed in range(4)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("v", [5, 64, 999, 5000])
def test_bounds_contain_the_exact_numbers_of_many_rows(v: int) -> None:
    size = min(5_000, 5_000_000 // v)
    assert sum(tried(v, size, seed) for seed in range(NUM_ROWS // 4 // size)) == 0


def test_without_a_tail_they_do_not() -> None:
    assert sum(tried(17, 2_000, seed, is_broken=True) for seed in range(4)) > 500


@pytest.mark.parametrize(("v", "k"), [(2, 1), (3, 2), (6, 2)])
def test_bounds_contain_every_tail_within_the_tolerance(v: int, k: int) -> None:
    """Tails of any mass from t - 0.2 to t + 0.2, no id of which is likelier than the k-th known."""
    generator = torch.Generator().manual_seed(4)
    n, tolerance = 500, 0.2
    scale = torch.rand(n, 1, generator=generator, dtype=torch.float64) * 3
    log_p, log_q = (
        (torch.randn(n, v, generator=generator, dtype=torch.float64) * scale).log_softmax(1)
        for _ in "pq"
    )
    log_q = log_q.sort(1, descending=True).values
    teacher = known_of(log_q, k, torch.zeros(n, dtype=torch.long))
    found = bounds(log_p, teacher, tolerance)
    cap, mass = log_q[:, k - 1].exp(), log_q[:, k:].exp().sum(1)
    most = torch.minimum(mass + tolerance, (v - k) * cap)
    least = torch.minimum((mass - tolerance).clamp(min=0.0), most)
    num_tried = 0
    for _ in range(60):
        ways = torch.rand(n, v - k, generator=generator, dtype=torch.float64)
        ways = ways ** torch.randint(12, (n, 1), generator=generator)
        share = torch.rand(n, generator=generator, dtype=torch.float64).mul(3).sub(1).clamp(0, 1)
        tail = (least + share * (most - least))[:, None] * ways / ways.sum(1, keepdim=True)
        is_possible = (tail <= cap[:, None] + 1e-12).all(1)
        whole = torch.cat([log_q[:, :k], tail.log()], 1)
        rows = [
            Bounds(*((low[is_possible], high[is_possible]) for low, high in vars(found).values()))
        ]
        assert outside(rows[0], exact(log_p[is_possible], whole[is_possible])) == 0
        num_tried += int(is_possible.sum())
    assert num_tried > 3_000


def test_the_teacher_alone_has_the_same_bounds_of_its_entropy() -> None:
    student, _, teacher = sides(3)
    log_p = (student.hidden @ student.weight.t()).detach().log_softmax(1)
    assert teacher.is_token_extra.any()
    assert not teacher.is_token_extra.all()
    for ours, theirs in zip(teacher.entropy_bounds(), bounds(log_p, teacher).entropy, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_unknown_ids_have_no_more_than_the_least_likely_known_one() -> None:
    log_q = torch.tensor([[0.0, -40.0]], dtype=torch.float64)
    token = torch.tensor([0])
    teacher = PartialLogits(torch.tensor([[0, 1]]), log_q, token, log_q[:, 0], 9)
    low, high = bounds(torch.zeros(1, 9).log_softmax(1), teacher, 1e-3).entropy
    assert 0 <= float(low) <= float(high) < 1e-12


def test_bounds_meet_where_every_id_is_known() -> None:
    generator = torch.Generator().manual_seed(3)
    log_p, log_q = (torch.randn(50, 9, generator=generator).double().log_softmax(1) for _ in "pq")
    found = bounds(log_p, known_of(log_q, 9, torch.zeros(50, dtype=torch.long)))
    for (low, high), value in zip(
        (found.entropy, found.forward_kl, found.reverse_kl), exact(log_p, log_q), strict=True
    ):
        torch.testing.assert_close(low, value, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(high, value, rtol=1e-9, atol=1e-9)


def sides(k: int, dtype: torch.dtype = torch.float64) -> tuple[LazyLogits, Tensor, PartialLogits]:
    """A student, the teacher's whole log-probabilities, and what is known of them."""
    generator = torch.Generator().manual_seed(7)
    hidden, weight = (torch.randn(n, 6, generator=generator, dtype=dtype) for n in (40, 23))
    log_q = (2 * torch.randn(40, 23, generator=generator, dtype=dtype)).log_softmax(1)
    tokens = torch.randint(23, (40,), generator=generator)
    student = LazyLogits(hidden.requires_grad_(), weight.requires_grad_())
    return student, log_q, known_of(log_q, k, tokens)


def coarse(log_x: Tensor, teacher: PartialLogits) -> list[Tensor]:
    """Log-probabilities of the known ids and of the rest, row by row."""
    rows = []
    for n, row in enumerate(log_x):
        known = list(dict.fromkeys([*teacher.ids[n].tolist(), int(teacher.tokens[n])]))
        rest = [v for v in range(teacher.vocab_size) if v not in known]
        buckets = [row[v] for v in known] + ([row[rest].logsumexp(0)] if rest else [])
        rows.append(torch.stack(buckets))
    return rows


def test_statistics_are_those_over_the_known_ids_and_one_bucket() -> None:
    student, log_q, teacher = sides(4)
    stats = token_stats(student, teacher, teacher.tokens)
    log_p = (student.hidden @ student.weight.t()).detach().log_softmax(1)
    for n, (p, q) in enumerate(zip(coarse(log_p, teacher), coarse(log_q, teacher), strict=True)):
        assert float(stats.reverse_kl[n]) == pytest.approx(float((p.exp() * (p - q)).sum()))
        assert float(stats.forward_kl[n]) == pytest.approx(float((q.exp() * (q - p)).sum()))
        assert float(stats.teacher_entropy[n]) == pytest.approx(float(-(q.exp() * q).sum()))
    found = bounds(log_p, teacher)
    truth = exact(log_p, log_q)
    assert bool((stats.reverse_kl <= truth[2] + 1e-12).all())
    assert bool((stats.forward_kl <= truth[1] + 1e-12).all())
    torch.testing.assert_close(found.entropy[0], stats.teacher_entropy)
    torch.testing.assert_close(found.forward_kl[0], stats.forward_kl)
    picked = log_q.gather(1, teacher.tokens[:, None]).squeeze(1)
    torch.testing.assert_close(stats.log_q, picked)


@pytest.mark.parametrize("term", [TopKForwardKL(4), TopKReverseKL(4), TopKForwardKL(3, tail=False)])
def test_bucketed_objectives_are_those_of_the_whole_teacher(term: object) -> None:
    student, log_q, teacher = sides(4)
    whole = LazyLogits(log_q, torch.eye(23, dtype=log_q.dtype))
    found, wanted = (
        composite_objective(student, side, [(term, 1.0)])  # type: ignore[list-item]
        for side in (teacher, whole)
    )
    inputs = (student.hidden, student.weight)
    gradients = [torch.autograd.grad(x.total, inputs) for x in (found, wanted)]
    torch.testing.assert_close(found.total, wanted.total, rtol=1e-12, atol=1e-12)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_sampled_objective_is_that_of_the_whole_teacher() -> None:
    student, log_q, teacher = sides(2)
    whole = LazyLogits(log_q, torch.eye(23, dtype=log_q.dtype))
    old = torch.full((40,), -2.0, dtype=torch.float64)
    totals = [
        composite_objective(student, side, [(SampledReverseKL(teacher.tokens, old), 1.0)]).total
        for side in (teacher, whole)
    ]
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-12, atol=1e-12)


def test_divergences_over_all_ids_are_refused() -> None:
    student, _, teacher = sides(4)
    with pytest.raises(ValueError, match="gives 4 ids of each row"):
        distillation_objective(student, teacher)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gives 4 ids of each row"):
        composite_objective(student, teacher, [(TopKReverseKL(5), 1.0)])
    with pytest.raises(ValueError, match="the teacher's support"):
        composite_objective(student, teacher, [(TopKReverseKL(2, "student"), 1.0)])


def test_rounded_probabilities_make_no_infinite_tail() -> None:
    log_q = torch.tensor([[0.0, -40.0, -41.0]], dtype=torch.float32)
    token = torch.tensor([0])
    teacher = PartialLogits(torch.tensor([[0, 1, 2]]), log_q, token, log_q[:, 0], 9)
    assert float(teacher.log_tail.exp()) <= min(TAIL_RESOLUTION, 6.1 * torch.tensor(-41.0).exp())
    assert bool(teacher.block(0, 1).isfinite().all())


def test_reference_and_product_agree_on_a_bucket() -> None:
    student, log_q, teacher = sides(23)
    stats = token_stats(student, teacher, teacher.tokens)
    log_p = (student.hidden @ student.weight.t()).detach().log_softmax(1)
    torch.testing.assert_close(stats.reverse_kl, reference.kl(log_p, log_q))
