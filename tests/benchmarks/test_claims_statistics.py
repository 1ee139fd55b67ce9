"""Statistics of the claims: graded starts, the toy problem, correlations and intervals."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import claims_probe
import claims_statistics
from claims_probe import bias, oscillation
from claims_statistics import (
    correlation_intervals,
    mean_interval,
    pearson,
    spearman,
)
from claims_work import graded, ledger_start
from tutelage.core.counter import counter_uniform
from tutelage.data.types import Prompt, Rollout
from tutelage.evaluation.benchmark import Result
from tutelage.evaluation.metrics import Interval
from tutelage.evaluation.scores import Scores

# --- grading and toys -----------------------------------------------------------------------------


def test_hidden_starts_are_spread_and_counted() -> None:
    prompts = [Prompt(f"p{i}", "e4+7;j7-6;n3+7;m0-6;b9*7;>", "0") for i in range(400)]
    letters = [next(x for x in "ejnmb" if ledger_start(p, f"{x}1")) for p in prompts]
    assert all(letters.count(x) > 50 for x in "ejnmb")
    wanted = letters[0]
    other = next(x for x in "ejnmb" if x != wanted)
    texts = [wanted, wanted, other, other, other, other, wanted, wanted]
    rollouts = [Rollout(prompts[0], i, (1,), (ord(t), i // 2), text=t) for i, t in enumerate(texts)]
    rows = [{"is_correct": i < 6} for i in range(8)]
    result = Result("toy", Scores(1, 8), rows, rollouts)
    plain = {"mean": [0.75], "pass": [1.0], "distinct": [3.0]}
    assert graded(result) == plain
    hidden = {"hidden_mean": [0.25], "hidden_pass": [1.0]}
    assert graded(result, ledger_start) == plain | hidden


def test_the_toy_tells_a_biased_objective_from_an_unbiased_one() -> None:
    found = bias(9)
    assert abs(found["entropy_full"] - found["teacher_entropy"]) < 0.01
    assert found["forward_kl_full"] < 0.01 < found["forward_kl_start"]


def test_changes_of_the_toy_are_those_of_the_written_out_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gradient of −A log p(y) is A (p − onehot(y)), A = log q(y) − log p(y); float64."""
    monkeypatch.setattr(claims_probe, "OSCILLATION_STEPS", 6)
    monkeypatch.setattr(claims_probe, "BURN_IN_STEPS", 4)
    found = oscillation(3)
    start = claims_probe._normal(3, 0).double() * claims_probe.FLAT
    teacher = (claims_probe._normal(3, 1).double() * claims_probe.PEAKED).log_softmax(-1)
    rows = torch.arange(len(start))
    logits, changes = start, []
    for step in range(6):
        log_p = logits.log_softmax(-1)
        uniform = counter_uniform((3, 4, step), rows)
        tokens = (log_p.exp().cumsum(-1) < uniform[:, None]).sum(-1)
        advantage = (teacher - log_p)[rows, tokens]
        gradient = advantage[:, None] * log_p.exp()
        gradient[rows, tokens] -= advantage
        after = logits - 10.0 * gradient
        changes.append(100 * float((after.argmax(-1) != logits.argmax(-1)).double().mean()))
        logits = after
    assert min(changes) > 0
    assert found["changes_peaked_10.0"] == pytest.approx(sum(changes) / 6)
    assert found["late_peaked_10.0"] == pytest.approx(sum(changes[4:]) / 2)


# --- statistics -----------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=3, max_size=30), st.randoms(use_true_random=False))
def test_correlations_are_those_of_scipy(x: list[int], rng: random.Random) -> None:
    y = [rng.randrange(4) for _ in x]
    a, b = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert spearman(a, b) == pearson(a, b) == 0.0
        return
    assert pearson(a, b) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-9)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)


def coverage(interval: Callable[[torch.Tensor], Interval], with_problems: bool = True) -> float:
    """How often an interval of 5 seeds holds the true mean 0."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hits = 0
    for _ in range(200):
        values = 1.5 * normal(5, 1)
        if with_problems:
            values = values + 4 * normal(1, 60) + 10 * normal(5, 60)
        found = interval(values)
        hits += found.low <= 0 <= found.high
    return hits / 200


def pooled(values: torch.Tensor) -> Interval:
    """The negative control: all values as if they were independent."""
    half = 1.96 * float(values.std()) / values.numel() ** 0.5
    return Interval(float(values.mean()), float(values.mean()) - half, float(values.mean()) + half)


def test_intervals_cover_and_pooling_would_not() -> None:
    assert coverage(mean_interval) >= 0.92
    assert coverage(mean_interval, with_problems=False) >= 0.9
    assert coverage(pooled) < 0.85


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(claims_statistics, "NUM_RESAMPLES", 400)
    claims_statistics._weights.cache_clear()
    yield
    claims_statistics._weights.cache_clear()


def false_differences(
    interval: Callable[[torch.Tensor], Interval], num_seeds: int, scales: tuple[int, int, int]
) -> float:
    """How often an interval leaves out the true mean 0, in 600 cases of 24 problems.

    `scales` are the standard deviations that seeds, problems and residuals add to the mean.
    """
    generator = torch.Generator().manual_seed(11)
    sizes = ((num_seeds, 1), (1, 24), (num_seeds, 24))
    missed = 0
    for _ in range(600):
        parts = (
            scale * math.sqrt(rows * columns) * torch.randn(rows, columns, generator=generator)
            for scale, (rows, columns) in zip(scales, sizes, strict=True)
        )
        found = interval(sum(parts, torch.zeros(num_seeds, 24)).double())
        missed += not found.low <= 0 <= found.high
    return missed / 600


ONE_SOURCE = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
MIXED = ((2, 1, 0), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1))


def allowed(rate: float) -> float:
    """A rate, and what 600 cases add to it by chance in one of 200."""
    return rate + 2.6 * math.sqrt(rate * (1 - rate) / 600)


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("num_seeds", [3, 5, 8])
def test_no_source_of_variance_makes_false_differences(num_seeds: int) -> None:
    for rate, grid in ((0.05, ONE_SOURCE), (0.07, MIXED)):
        found = {scales: false_differences(mean_interval, num_seeds, scales) for scales in grid}
        assert max(found.values()) <= allowed(rate), found


@pytest.mark.usefixtures("few_resamples")
def test_each_part_of_the_envelope_alone_makes_false_differences() -> None:
    for num_seeds in (3, 5, 8):
        assert false_differences(claims_statistics._bootstrap, num_seeds, (1, 0, 0)) > allowed(0.05)

    def of_seeds(values: torch.Tensor) -> Interval:
        return claims_statistics._t_interval(values.mean(1))

    assert false_differences(of_seeds, 5, (0, 1, 0)) > 0.9


@pytest.mark.usefixtures("few_resamples")
def test_an_interval_of_a_higher_level_makes_fewer_false_differences() -> None:
    def wider(values: torch.Tensor) -> Interval:
        found = mean_interval(values, 0.975)
        usual = mean_interval(values)
        assert found.low < usual.low < found.value == usual.value < usual.high < found.high
        assert (found.level, usual.level) == (0.975, 0.95)
        return found

    for rate, grid in ((0.025, ONE_SOURCE), (0.04, MIXED)):
        missed = {scales: false_differences(wider, 6, scales) for scales in grid}
        assert max(missed.values()) <= allowed(rate), missed


@pytest.mark.parametrize("level", [0.6, 0.95, 0.975])
@pytest.mark.parametrize("num_seeds", [2, 10, 11, 40])
def test_values_without_problems_get_the_t_interval_of_scipy(num_seeds: int, level: float) -> None:
    values = torch.randn(num_seeds, 1, generator=torch.Generator().manual_seed(4)).double()
    found = mean_interval(values, level)
    spread = float(values.std()) / math.sqrt(num_seeds)
    wanted = stats.t.interval(level, num_seeds - 1, loc=float(values.mean()), scale=spread)
    assert (found.low, found.high) == pytest.approx(wanted, rel=1e-9)


def test_one_seed_has_the_interval_of_its_problems() -> None:
    values = torch.randn(1, 50, generator=torch.Generator().manual_seed(4)).double()
    found = mean_interval(values)
    half = 1.96 * float(values.std()) / math.sqrt(50)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    assert mean_interval(values[:, :1]).high == math.inf


def test_correlation_differences_use_the_same_tokens_on_both_sides() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(4, 30, generator=generator, dtype=torch.float64)
    noisy = target + 0.3 * torch.randn(4, 30, generator=generator, dtype=torch.float64)
    noise = torch.rand(4, 30, generator=generator, dtype=torch.float64)
    twins = {"soft_or": noisy, "twin": noisy, "random": noise}
    whole, gaps = correlation_intervals(twins, target, "spearman", 100)
    assert (gaps["twin"].low, gaps["twin"].high) == (0.0, 0.0)
    assert gaps["random"].low > 0
    reference = stats.spearmanr(noisy.flatten(), target.flatten()).statistic
    assert whole["soft_or"].value == pytest.approx(reference)


def test_no_bound_is_one_that_a_correlation_cannot_have() -> None:
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(5, 20, generator=generator, dtype=torch.float64)
    other = torch.randn(5, 20, generator=generator, dtype=torch.float64)
    other[0], other[1] = target[0], -target[1]  # seeds that could not differ more
    scores = {"soft_or": target * torch.tensor([1.0, 1, 1, 1, 0.1])[:, None], "other": other}
    whole, gaps = correlation_intervals(scores, target, "pearson", 100)
    assert whole["soft_or"].high <= 1.0
    assert whole["other"].low >= -1.0
    assert gaps["other"].high <= 2.0
    of_seeds = [float(stats.pearsonr(a, b).statistic) for a, b in zip(other, target, strict=True)]
    reach = stats.t.ppf(0.975, 4) * stats.sem(of_seeds)
    assert whole["other"].high == pytest.approx(min(1.0, whole["other"].value + reach))


def correlation_coverage(as_one_seed: bool) -> float:
    """How often an interval of 5 seeds, whose tokens share a trend, holds a correlation of 0."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hits, trials = 0, 60
    for _ in range(trials):
        score, trend = normal(5, 30), normal(5, 1)
        target = trend * score + normal(5, 30)
        if as_one_seed:
            score, target = score.reshape(1, -1), target.reshape(1, -1)
        found = correlation_intervals({"soft_or": score}, target, "pearson", 100)[0]["soft_or"]
        hits += found.low <= 0 <= found.high
    return hits / trials


def test_correlations_know_that_tokens_of_a_seed_are_alike_and_pooling_would_not() -> None:
    assert correlation_coverage(as_one_seed=False) >= 0.9
    assert correlation_coverage(as_one_seed=True) < 0.6
