"""Accuracy over problems and samples, with intervals that respect how samples were generated.

Samples of one problem resemble each other, so the problem is the unit everywhere: every interval
is computed from one score per problem, never from the pooled samples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tutelage.errors import ConfigError, DataError


@dataclass(frozen=True)
class Interval:
    """A value with the confidence interval around it, in the unit of the value."""

    value: float
    low: float
    high: float
    level: float = 0.95
    """Intended coverage, in (0, 1)."""


def problem_means(correct: Sequence[Sequence[bool]]) -> list[float]:
    """Share of correct samples of each problem, in [0, 1].

    Args:
        correct: one sequence of verdicts per problem; problems may differ in their sample count.

    Returns:
        One mean per problem.

    Raises:
        DataError: there is no problem, or a problem without samples.
    """
    _require_samples(correct)
    return [sum(verdicts) / len(verdicts) for verdicts in correct]


def problem_pass_rates(correct: Sequence[Sequence[bool]], k: int) -> list[float]:
    """Unbiased chance that at least one of k samples is correct, for each problem, in [0, 1].

    Equation: `1 - C(n - c, k) / C(n, k)` for a problem with n samples of which c are correct.

    Args:
        correct: one sequence of verdicts per problem, each with at least k samples.
        k: number of samples one may submit, at least 1.

    Returns:
        One rate per problem.

    Raises:
        DataError: there is no problem, or a problem without samples.
        ConfigError: k is below 1 or above the number of samples of a problem.
    """
    _require_samples(correct)
    fewest = min(len(verdicts) for verdicts in correct)
    if not 1 <= k <= fewest:
        raise ConfigError(
            f"pass@k needs k between 1 and the {fewest} samples of each problem, got {k}. "
            f"Lower k or generate more samples."
        )
    return [_pass_rate(len(verdicts), sum(verdicts), k) for verdicts in correct]


def problem_majorities(
    votes: Sequence[Sequence[str | None]], correct: Sequence[Sequence[bool]]
) -> list[float]:
    """Whether the most frequent answer of each problem is right, in [0, 1].

    Answers that tie for the first place share it: with two of them, one right, the problem
    counts half. The order of the samples therefore does not matter.

    Args:
        votes: the answer of each sample, equal texts for equal answers; None abstains.
        correct: the verdict on each sample.

    Returns:
        One score per problem, 0 where every sample abstains.

    Raises:
        DataError: there is no problem, or a problem without samples.
    """
    _require_samples(correct)
    return [_majority(*pair) for pair in zip(votes, correct, strict=True)]


def clustered_interval(per_problem_scores: Sequence[float], level: float = 0.95) -> Interval:
    """Interval of the mean score over problems, in [0, 1], with the problems as clusters.

    A Wilson score interval whose sample size is the effective number of independent verdicts
    (the usual correction for cluster samples). With n problems of mean m and variance s²:

        n_eff = n / r̂,   r̂ = (1 + c·r) / (1 + c),   r = min(1, s² / (m(1 - m))),

    and Student's t with n - 1 degrees of freedom as the quantile. r = 1 means that a problem is
    always right or always wrong, the largest variance that scores in [0, 1] can have. The
    estimate of r is worth as many problems as are not stuck at the nearer end,
    c = min(#scores above 0, #scores below 1), and is pulled towards 1 by one problem of doubt:
    with all problems at 0 (or 1) nothing is known about their spread and n_eff = n.

    Away from 0 and 1 this is the t-interval of the problem means; near the ends it stays inside
    [0, 1], is skewed as it should be and never has width 0. One problem says nothing about the
    spread between problems: its interval is [0, 1].

    Args:
        per_problem_scores: one score in [0, 1] per problem (`problem_means` or
            `problem_pass_rates`).
        level: intended coverage, in (0, 1).

    Returns:
        The mean and its interval.

    Raises:
        DataError: there are no scores or one lies outside [0, 1].
        ConfigError: level is not in (0, 1).
    """
    scores = _require_unit_scores(per_problem_scores)
    _require_level(level)
    n = len(scores)
    mean = min(1.0, math.fsum(scores) / n)
    if n == 1:
        return Interval(mean, 0.0, 1.0, level)
    return _wilson_interval(mean, _effective_size(scores, mean), _t_quantile(level, n - 1), level)


def paired_difference(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """Interval of the mean of `a - b` over the same problems, in [-1, 1].

    The t-interval of the differences d after adding half a problem with difference +m, half a
    problem with -m and one with 0, where m is the largest |d| seen (1 when all are 0). For
    right-or-wrong scores this is the adjustment of Agresti and Min (2005) for matched pairs: two
    runs that agree on every problem get a narrow interval, not one of no width.

    Args:
        a: one score in [0, 1] per problem.
        b: the scores of the other run for the same problems in the same order.
        level: intended coverage, in (0, 1).

    Returns:
        The plain mean difference and its interval.

    Raises:
        DataError: the lengths differ, there are no scores or one lies outside [0, 1].
        ConfigError: level is not in (0, 1).
    """
    if len(a) != len(b):
        raise DataError(
            f"A paired difference needs the same problems on both sides, got {len(a)} and "
            f"{len(b)} scores. Keep the problems that both runs have."
        )
    _require_level(level)
    pairs = zip(_require_unit_scores(a), _require_unit_scores(b), strict=True)
    differences = [left - right for left, right in pairs]
    n = len(differences)
    value = math.fsum(differences) / n
    if n == 1:
        return Interval(value, -1.0, 1.0, level)
    reach = max(map(abs, differences)) or 1.0
    center = math.fsum(differences) / (n + 2)
    variance = (math.fsum(d * d for d in differences) + reach * reach) / (n + 2) - center * center
    half_width = _t_quantile(level, n - 1) * math.sqrt(variance / (n + 2))
    return Interval(value, max(-1.0, center - half_width), min(1.0, center + half_width), level)


def mean_difference(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t-interval of the mean of `a - b` over the same problems, without bounds.

    Args:
        a: one score per problem, in any unit.
        b: the scores of the other run for the same problems in the same order.
        level: intended coverage, in (0, 1).

    Returns:
        The mean difference and its interval in the scores' unit, infinite for one problem.

    Raises:
        DataError: the lengths differ or there are no scores.
        ConfigError: level is not in (0, 1).
    """
    if len(a) != len(b) or not a:
        raise DataError(
            f"A paired difference needs the same problems on both sides, got {len(a)} and "
            f"{len(b)} scores. Keep the problems that both runs have."
        )
    _require_level(level)
    differences = [left - right for left, right in zip(a, b, strict=True)]
    n = len(differences)
    value = math.fsum(differences) / n
    if n == 1:
        return Interval(value, -math.inf, math.inf, level)
    variance = math.fsum((d - value) ** 2 for d in differences) / (n - 1)
    half_width = _t_quantile(level, n - 1) * math.sqrt(variance / n)
    return Interval(value, value - half_width, value + half_width, level)


def ratio_terms(sums: Sequence[float], counts: Sequence[float]) -> list[float]:
    """One term a problem whose mean is `Σ sums / Σ counts` and whose spread is that ratio's.

    With r the ratio and T̄ the mean count, the term of problem i is `r + (S_i - r·T_i) / T̄`: the
    ratio linearised. The difference of two ratios over the same problems is that of their terms.

    Args:
        sums: S, one a problem, in any unit.
        counts: T, one a problem, with a sum above 0.

    Returns:
        The terms, in the unit of a sum over a count.
    """
    ratio, mean = math.fsum(sums) / math.fsum(counts), math.fsum(counts) / len(counts)
    return [ratio + (s - ratio * t) / mean for s, t in zip(sums, counts, strict=True)]


def _majority(votes: Sequence[str | None], correct: Sequence[bool]) -> float:
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    judged = [(v, c) for v, c in zip(votes, correct, strict=True) if v and counts[v] == most]
    return sum(is_right for _, is_right in judged) / len(judged)


def _pass_rate(num_samples: int, num_correct: int, k: int) -> float:
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def _effective_size(scores: Sequence[float], mean: float) -> float:
    """Number of independent right-or-wrong verdicts that would vary as the problem means do."""
    n = len(scores)
    largest_variance = mean * (1.0 - mean)
    if largest_variance == 0.0:
        return float(n)
    variance = math.fsum((score - mean) ** 2 for score in scores) / (n - 1)
    ratio = min(1.0, variance / largest_variance)
    num_informative = min(sum(s > 0.0 for s in scores), sum(s < 1.0 for s in scores))
    return n * (1 + num_informative) / (1.0 + num_informative * ratio)


def _wilson_interval(mean: float, size: float, quantile: float, level: float) -> Interval:
    shrink = 1.0 + quantile**2 / size
    center = (mean + quantile**2 / (2.0 * size)) / shrink
    spread = math.sqrt(mean * (1.0 - mean) / size + (quantile / (2.0 * size)) ** 2)
    half_width = quantile * spread / shrink
    # Rounding must neither leave [0, 1] nor exclude the mean itself when it sits at an end.
    low, high = min(mean, center - half_width), max(mean, center + half_width)
    return Interval(mean, max(0.0, low), min(1.0, high), level)


def _t_quantile(level: float, degrees: int) -> float:
    """Value t with `P(|T| <= t) = level` for Student's t, by bisection on the angle atan(t/√ν)."""
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        if _t_central_probability(middle, degrees) < level:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _t_central_probability(angle: float, degrees: int) -> float:
    """`P(|T| <= √ν tan(angle))`: the finite trigonometric sum that holds for whole ν."""
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = degrees % 2 == 1
    term, total = cosine if is_odd else 1.0, 0.0
    for index in range(degrees % 2, degrees, 2):
        total += term
        term *= (index + 1) / (index + 2) * cosine**2
    return 2.0 / math.pi * (angle + sine * total) if is_odd else sine * total


def _require_samples(correct: Sequence[Sequence[bool]]) -> None:
    if not correct:
        raise DataError("Accuracy needs at least one problem, got none. Check the evaluation set.")
    for index, verdicts in enumerate(correct):
        if not verdicts:
            raise DataError(
                f"Every problem needs at least one sample, problem {index} has none. "
                f"Set num_samples to 1 or more."
            )


def _require_unit_scores(scores: Sequence[float]) -> Sequence[float]:
    if not scores:
        raise DataError("An interval needs at least one problem, got none.")
    for score in scores:
        if not 0.0 <= score <= 1.0:
            raise DataError(f"Scores per problem must lie in [0, 1], got {score}.")
    return scores


def _require_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ConfigError(f"The level must be in (0, 1), got {level}. Use 0.95 for 95 %.")
