"""Accuracy metrics against brute force, scipy and simulation."""

from __future__ import annotations

import functools
import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tutelage.errors import ConfigError, DataError
from tutelage.evaluation import metrics
from tutelage.evaluation.metrics import (
    Interval,
    clustered_interval,
    paired_difference,
    problem_means,
    problem_pass_rates,
)

verdicts = st.lists(st.lists(st.booleans(), min_size=1, max_size=7), min_size=1, max_size=5)
shares = st.integers(0, 16).map(lambda sixteenths: sixteenths / 16)
scores = st.lists(shares, min_size=1, max_size=30)


@given(verdicts, st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(
    correct: list[list[bool]], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, min(map(len, correct))))
    rates = []
    for problem in correct:
        subsets = list(itertools.combinations(problem, k))
        rates.append(sum(any(subset) for subset in subsets) / len(subsets))
    assert problem_pass_rates(correct, k) == pytest.approx(rates, abs=1e-12)


@given(verdicts)
def test_pass_at_1_is_mean_at_k(correct: list[list[bool]]) -> None:
    assert problem_pass_rates(correct, 1) == pytest.approx(problem_means(correct), abs=1e-12)


def test_every_problem_weighs_the_same_whatever_its_number_of_samples() -> None:
    correct = [[True], [False] * 99]
    assert clustered_interval(problem_means(correct)).value == 0.5
    assert problem_means(correct) == [1.0, 0.0]


def test_pass_at_k_is_unbiased() -> None:
    rng, p, k = random.Random(3), 0.3, 4
    draws = [[[rng.random() < p for _ in range(8)]] for _ in range(20_000)]
    estimate = sum(problem_pass_rates(draw, k)[0] for draw in draws) / len(draws)
    truth = 1 - (1 - p) ** k
    naive = sum(1 - (1 - problem_means(draw)[0]) ** k for draw in draws) / len(draws)
    assert abs(estimate - truth) < 0.01
    assert abs(naive - truth) > 0.03, "the plug-in estimate is biased, else this test is blind"


@pytest.mark.parametrize("k", [0, -1, 4])
def test_k_outside_the_samples_is_refused_with_the_values(k: int) -> None:
    with pytest.raises(ConfigError, match=rf"3 samples of each problem, got {k}\."):
        problem_pass_rates([[True, False, True], [True] * 5], k)


@pytest.mark.parametrize("correct", [[], [[True], []]])
def test_nothing_to_average_is_refused(correct: list[list[bool]]) -> None:
    with pytest.raises(DataError, match="at least one"):
        problem_means(correct)


@pytest.mark.parametrize("degrees", [*range(1, 12), 29, 30, 199, 1000])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_t_quantile_agrees_with_scipy(level: float, degrees: int) -> None:
    expected = stats.t.ppf((1 + level) / 2, degrees)
    assert metrics._t_quantile(level, degrees) == pytest.approx(expected, rel=1e-9)


@given(scores, st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_an_interval_holds_its_mean_and_stays_in_range(values: list[float], level: float) -> None:
    interval = clustered_interval(values, level)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    assert interval.low < interval.high
    assert interval.value == pytest.approx(np.mean(values), abs=1e-12)


@given(scores)
def test_an_interval_is_mirrored_with_its_scores(values: list[float]) -> None:
    interval = clustered_interval(values)
    mirror = clustered_interval([1 - value for value in values])
    assert (1 - mirror.high, 1 - mirror.low) == pytest.approx(
        (interval.low, interval.high), abs=1e-6
    )


@given(scores, st.randoms(use_true_random=False))
def test_the_order_of_problems_does_not_matter(values: list[float], rng: random.Random) -> None:
    shuffled = values[:]
    rng.shuffle(shuffled)
    one, other = clustered_interval(values), clustered_interval(shuffled)
    assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=1e-9)


def test_binary_scores_give_the_wilson_interval_with_a_t_quantile() -> None:
    values, n, quantile = [1.0] * 17 + [0.0] * 3, 20, stats.t.ppf(0.975, 19)
    confidence = 1 - 2 * stats.norm.sf(quantile)
    expected = stats.binomtest(17, n).proportion_ci(confidence, method="wilson")
    interval = clustered_interval(values)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize(
    ("values", "num_informative"),
    [
        ([0.25, 0.5, 0.375, 0.5, 0.75, 0.125], 6),
        ([0.5] * 4, 4),
        ([0.0] * 15 + [0.125], 1),
        ([1.0, 0.875] * 5 + [1.0] * 4, 5),
        ([0.0, 1.0, 1.0, 0.5], 2),
    ],
)
def test_the_interval_is_wilson_with_the_effective_sample_size(
    values: list[float], num_informative: int
) -> None:
    """Solve `|m - x| = t sqrt(x (1 - x) / n_eff)` for its ends x, with numpy and scipy."""
    n, mean = len(values), float(np.mean(values))
    spread = min(1, np.var(values, ddof=1) / (mean * (1 - mean)))
    effective = n / np.average([1, spread], weights=[1, num_informative])
    ratio = stats.t.ppf(0.975, n - 1) ** 2 / effective
    ends = np.sort(np.roots([1 + ratio, -2 * mean - ratio, mean**2]).real)
    interval = clustered_interval(values)
    assert (interval.low, interval.high) == pytest.approx(tuple(ends), abs=1e-7)


def test_one_lucky_sample_does_not_make_failure_certain() -> None:
    never, once = clustered_interval([0.0] * 16), clustered_interval([0.0] * 15 + [0.125])
    assert never.high > once.high > 0.6 * never.high


def test_many_problems_give_the_t_interval_of_scipy() -> None:
    rng = np.random.default_rng(0)
    values = rng.beta(2, 2, size=2000)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    interval = clustered_interval(values.tolist())
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-4)


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_all_right_or_all_wrong_is_not_certainty(score: float) -> None:
    few, many = clustered_interval([score] * 10), clustered_interval([score] * 500)
    assert few.high - few.low > 0.25
    assert 0.005 < many.high - many.low < 0.02


def test_one_problem_says_nothing() -> None:
    assert clustered_interval([0.4]) == Interval(0.4, 0.0, 1.0)
    assert paired_difference([0.4], [0.1]).low == -1.0


@pytest.mark.parametrize("values", [[], [0.5, 1.1], [-0.1], [math.nan]])
def test_scores_outside_the_unit_interval_are_refused(values: list[float]) -> None:
    with pytest.raises(DataError):
        clustered_interval(values)


@pytest.mark.parametrize("level", [0.0, 1.0, 95, math.nan])
def test_a_level_outside_the_unit_interval_is_refused(level: float) -> None:
    with pytest.raises(ConfigError, match=r"Use 0\.95"):
        clustered_interval([0.2, 0.3], level)
    with pytest.raises(ConfigError, match=r"Use 0\.95"):
        paired_difference([0.2, 0.3], [0.2, 0.3], level)


@pytest.fixture
def fast_quantile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remember quantiles: a simulation asks for the same one thousands of times."""
    monkeypatch.setattr(metrics, "_t_quantile", functools.cache(metrics._t_quantile))


def simulated_scores(
    rng: np.random.Generator, num_problems: int, num_samples: int, a: float, b: float
) -> list[float]:
    """mean@k of problems whose difficulty is Beta(a, b): samples of a problem are dependent."""
    ability = rng.beta(a, b, size=num_problems)
    return (rng.binomial(num_samples, ability) / num_samples).tolist()


@pytest.mark.usefixtures("fast_quantile")
@pytest.mark.parametrize("num_problems", [5, 20, 100])
@pytest.mark.parametrize("num_samples", [1, 8])
@pytest.mark.parametrize(
    ("a", "b", "least"), [(0.5, 0.5, 0.92), (2, 2, 0.92), (0.2, 2, 0.92), (99, 1, 0.91)]
)
def test_clustered_intervals_cover_the_truth(
    num_problems: int, num_samples: int, a: float, b: float, least: float
) -> None:
    rng, truth, repeats = np.random.default_rng(11), a / (a + b), 600
    hits = 0
    for _ in range(repeats):
        interval = clustered_interval(simulated_scores(rng, num_problems, num_samples, a, b))
        hits += interval.low <= truth <= interval.high
    assert hits / repeats >= least


@pytest.mark.usefixtures("fast_quantile")
@pytest.mark.parametrize("rare", [0.05, 0.1])
@pytest.mark.parametrize("common", [0.0, 0.01])
def test_intervals_cover_a_few_easy_problems_among_hopeless_ones(
    rare: float, common: float
) -> None:
    rng, truth, repeats, hits = np.random.default_rng(2), rare + (1 - rare) * common, 600, 0
    for _ in range(repeats):
        ability = np.where(rng.random(16) < rare, 1.0, common)
        interval = clustered_interval((rng.binomial(8, ability) / 8).tolist())
        hits += interval.low <= truth <= interval.high
    assert hits / repeats >= 0.92


def test_pooling_dependent_samples_would_not_cover() -> None:
    """Negative control: the interval this module avoids fails the very same simulation."""
    rng, repeats, hits = np.random.default_rng(11), 600, 0
    for _ in range(repeats):
        values = simulated_scores(rng, 20, 8, 0.5, 0.5)
        interval = stats.binomtest(round(sum(values) * 8), 160).proportion_ci(0.95, "wilson")
        hits += interval.low <= 0.5 <= interval.high
    assert hits / repeats < 0.7


def simulated_pair(
    rng: np.random.Generator, num_problems: int, num_samples: int, factor: float
) -> tuple[list[float], list[float]]:
    """Two runs on the same problems, the second with `factor` times the ability of the first."""
    ability = rng.beta(0.5, 0.5, size=num_problems)
    first = rng.binomial(num_samples, ability) / num_samples
    second = rng.binomial(num_samples, factor * ability) / num_samples
    return first.tolist(), second.tolist()


@pytest.mark.usefixtures("fast_quantile")
@pytest.mark.parametrize("num_problems", [5, 20, 100])
@pytest.mark.parametrize("num_samples", [1, 8])
@pytest.mark.parametrize("factor", [1.0, 0.8, 0.1])
def test_paired_intervals_cover_the_true_difference(
    num_problems: int, num_samples: int, factor: float
) -> None:
    rng, truth, repeats = np.random.default_rng(5), 0.5 * (1 - factor), 500
    hits = 0
    for _ in range(repeats):
        interval = paired_difference(*simulated_pair(rng, num_problems, num_samples, factor))
        hits += interval.low <= truth <= interval.high
    assert hits / repeats >= 0.92


def test_pairing_is_sharper_than_two_separate_intervals() -> None:
    first, second = simulated_pair(np.random.default_rng(0), 100, 8, 0.9)
    paired = paired_difference(first, second)
    unpaired = stats.ttest_ind(first, second).confidence_interval(0.95)
    assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)


def test_a_paired_difference_agrees_with_scipy_on_many_problems() -> None:
    first, second = simulated_pair(np.random.default_rng(1), 4000, 8, 0.9)
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    interval = paired_difference(first, second)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=2e-4)
    assert interval.value == pytest.approx(np.mean(first) - np.mean(second), abs=1e-12)


def test_a_paired_difference_is_agresti_and_min_for_verdicts() -> None:
    """Counts of the matched table, half a pair added to each of its four cells."""
    both, only_a, only_b, neither = 12.5, 6.5, 2.5, 11.5
    a = [1.0] * 12 + [1.0] * 6 + [0.0] * 2 + [0.0] * 11
    b = [1.0] * 12 + [0.0] * 6 + [1.0] * 2 + [0.0] * 11
    total = both + only_a + only_b + neither
    centre = (only_a - only_b) / total
    variance = ((only_a + only_b) / total - centre**2) / total
    half_width = stats.t.ppf(0.975, len(a) - 1) * math.sqrt(variance)
    interval = paired_difference(a, b)
    expected = (4 / 31, centre - half_width, centre + half_width)
    assert (interval.value, interval.low, interval.high) == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.tuples(shares, shares), min_size=1, max_size=30))
def test_a_paired_difference_changes_sign_with_its_sides(pairs: list[tuple[float, float]]) -> None:
    a, b = [left for left, _ in pairs], [right for _, right in pairs]
    forward, backward = paired_difference(a, b), paired_difference(b, a)
    assert (-backward.high, -backward.value, -backward.low) == pytest.approx(
        (forward.low, forward.value, forward.high), abs=1e-9
    )
    assert -1 <= forward.low <= forward.value <= forward.high <= 1


def test_two_runs_that_agree_everywhere_are_not_certainly_equal() -> None:
    interval = paired_difference([0.5] * 40, [0.5] * 40)
    assert interval.value == 0
    assert interval.low < -0.02
    assert interval.high > 0.02


def test_a_paired_difference_needs_the_same_problems() -> None:
    with pytest.raises(DataError, match="got 2 and 1 scores"):
        paired_difference([0.1, 0.2], [0.1])


def test_ratio_terms_have_the_ratio_as_mean_and_its_spread() -> None:
    """The interval of their mean covers the true ratio as often as it says."""
    draw = np.random.default_rng(0)
    num_covered = 0
    for _ in range(400):
        counts = draw.integers(1, 60, 40)
        sums = 0.3 * counts + draw.normal(0.0, 0.1 * counts)
        terms = metrics.ratio_terms(sums.tolist(), counts.tolist())
        assert math.fsum(terms) / 40 == pytest.approx(sums.sum() / counts.sum(), rel=1e-12)
        found = metrics.mean_difference(terms, [0.0] * 40)
        num_covered += found.low <= 0.3 <= found.high
    assert 0.92 <= num_covered / 400 <= 0.98
