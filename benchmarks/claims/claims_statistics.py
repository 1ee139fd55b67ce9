"""Intervals that know both sources of chance, seeds and problems, and rank correlations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from tutelage.evaluation.metrics import Interval, mean_difference

NUM_RESAMPLES = 4000
LEVEL = 0.95


def mean_interval(values: Tensor, level: float = LEVEL) -> Interval:
    """Interval of the mean of values `[S, P]` over seeds and problems.

    The envelope of two intervals, because each is too narrow where the other is not:

    * Two-level bootstrap. Seeds and problems are drawn with replacement independently of each
      other, because the same problems meet every seed. The variance of a percentile interval of S
      seeds is too small by (S − 1) / S, so it is stretched about the mean by √(S / (S − 1)). The
      stretch does not repair the quantile: where the variance between seeds dominates, the
      interval of 3, 5 and 8 seeds misses the mean in 19 %, 14 % and 10 % of cases.
    * Student's t-interval of the S means over problems. It is exact for normal seeds and ignores
      the variance between problems.

    In simulations of 95 % with normal values and 3, 5 and 8 seeds the envelope misses the mean in
    5 % of cases or fewer where one source of variance dominates. It is not exact where seeds and
    problems both matter: 8 seeds that add twice the standard deviation of the problems miss it in
    7 %.

    Values without problems, `[S, 1]`, get the t-interval, which is infinite for one seed. One seed
    with problems, `[1, P]`, gets the bootstrap over problems, which says nothing of other seeds.

    Args:
        values: one row a seed; one column a problem, or a single column.
        level: intended coverage, in (0, 1).

    Returns:
        The mean and its interval, in the unit of the values.
    """
    values = values.double()
    of_seeds = _t_interval(values.mean(1), level)
    if values.shape[1] == 1:
        return of_seeds
    found = _bootstrap(values, level)
    if len(values) == 1:
        return found
    low, high = min(found.low, of_seeds.low), max(found.high, of_seeds.high)
    return Interval(found.value, low, high, level)


def within(found: Interval, least: float = 0.0, most: float = 1.0) -> Interval:
    """An interval cut to possible values, those of a share; one without bounds stays so."""
    if not math.isfinite(found.low):
        return found
    return replace(found, low=max(found.low, least), high=min(found.high, most))


def _bootstrap(values: Tensor, level: float = LEVEL) -> Interval:
    """Stretched percentile interval of the mean of `[S, P]`, seeds and problems drawn anew."""
    mean = values.mean()
    seeds, problems = (_weights(n, stream) for stream, n in enumerate(values.shape))
    means = ((seeds @ values) * problems).sum(-1)
    return _percentiles(float(mean), means, _stretch(len(values)), level)


def _stretch(num_seeds: int) -> float:
    """By how much the percentile interval of so few seeds is too narrow."""
    return math.sqrt(num_seeds / max(num_seeds - 1, 1))


def _t_interval(values: Tensor, level: float = LEVEL) -> Interval:
    """Student's t-interval of the mean of `[S]`, for any S; infinite for one value."""
    return mean_difference(values.tolist(), [0.0] * len(values), level)


@cache
def _weights(n: int, stream: int) -> Tensor:
    """How often each of n things is drawn in each resample, over n: `[R, n]`, rows sum to 1."""
    generator = torch.Generator().manual_seed(20260 + stream)
    drawn = torch.randint(n, (NUM_RESAMPLES, n), generator=generator)
    counts = torch.zeros(NUM_RESAMPLES, n, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64)) / n


def ranks(x: Tensor) -> Tensor:
    """Ranks from 0, ties sharing their mean rank."""
    _, place, count = torch.unique(x, return_inverse=True, return_counts=True)
    rank: Tensor = count.cumsum(0).double() - (count + 1) / 2
    return rank[place]


def pearson(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation; 0 where one side does not vary."""
    x, y = (v.double() - v.double().mean() for v in (x, y))
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 0 else 0.0


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation."""
    return pearson(ranks(x), ranks(y))


CORRELATIONS = {"spearman": spearman, "pearson": pearson}


def correlation_intervals(
    scores: Mapping[str, Tensor], target: Tensor, kind: str, num_resamples: int = 500
) -> tuple[dict[str, Interval], dict[str, Interval]]:
    """Correlation of each score with a target over tokens, and Soft-OR's minus each other's.

    Tokens of a seed come from one batch, so seeds are drawn with replacement first and then, for
    every seed drawn, its tokens; intervals are stretched as those of `mean_interval`, and as wide
    at least as Student's t-interval of the seeds' own correlations. No bound is one that a
    correlation, or a difference of two, cannot have. The differences use the same resamples on
    both sides.

    Args:
        scores: values `[S, T]` of T tokens of S seeds by rule; `soft_or` is among them.
        target: the value to correlate with, `[S, T]`.
        kind: a key of `CORRELATIONS`.
        num_resamples: draws of S seeds with T tokens each.

    Returns:
        Intervals of the correlations, and of the differences, by rule.
    """
    correlate, goal, first = CORRELATIONS[kind], target.flatten(), "soft_or"
    columns = {rule: x.flatten() for rule, x in scores.items()}
    whole = {rule: correlate(x, goal) for rule, x in columns.items()}
    draws: dict[str, list[float]] = {rule: [] for rule in columns}
    num_seeds, num_tokens = target.shape
    for drawn in _clustered_draws(num_seeds, num_tokens, num_resamples):
        for rule, x in columns.items():
            draws[rule].append(correlate(x[drawn], goal[drawn]))
    table = {rule: torch.tensor(x, dtype=torch.float64) for rule, x in draws.items()}
    of_seeds = {
        rule: torch.tensor(list(map(correlate, x, target)), dtype=torch.float64)
        for rule, x in scores.items()
    }

    def interval(value: float, drawn: Tensor, seeds: Tensor, most: float) -> Interval:
        found = _percentiles(value, drawn, _stretch(num_seeds))
        if num_seeds > 1:
            found = _at_least(found, _t_interval(seeds))
        return within(found, -most, most)

    return (
        {rule: interval(whole[rule], table[rule], of_seeds[rule], 1.0) for rule in columns},
        {
            rule: interval(
                whole[first] - whole[rule],
                table[first] - table[rule],
                of_seeds[first] - of_seeds[rule],
                2.0,
            )
            for rule in columns
            if rule != first
        },
    )


def _at_least(found: Interval, other: Interval) -> Interval:
    """An interval, about its own value, that reaches as far on either side as another one."""
    low, high = (found.value + bound - other.value for bound in (other.low, other.high))
    return replace(found, low=min(found.low, low), high=max(found.high, high))


def _clustered_draws(num_seeds: int, num_tokens: int, num_resamples: int) -> Iterator[Tensor]:
    """Places in a flattened `[S, T]`: seeds with replacement, and in each of them its tokens."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(num_resamples):
        seeds = torch.randint(num_seeds, (num_seeds, 1), generator=generator)
        tokens = torch.randint(num_tokens, (num_seeds, num_tokens), generator=generator)
        yield (seeds * num_tokens + tokens).flatten()


def _percentiles(value: float, draws: Tensor, stretch: float, level: float = LEVEL) -> Interval:
    tails = draws.new_tensor([(1 - level) / 2, (1 + level) / 2])
    low, high = (stretch * (draws.quantile(tails) - value)).tolist()
    return Interval(value, value + low, value + high, level)
