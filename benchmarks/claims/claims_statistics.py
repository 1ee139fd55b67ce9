"""Intervals that know both sources of chance, seeds and problems, and rank correlations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache

import torch
from torch import Tensor

from tutelage.evaluation.metrics import Interval

NUM_RESAMPLES = 4000
LEVEL = 0.95
T_QUANTILES = dict(
    enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262), start=2)
)
"""Half-width of a 95 % t-interval in standard errors, by number of seeds."""


def mean_interval(values: Tensor) -> Interval:
    """95 % interval of the mean of values `[S, P]` over seeds and problems, two-level bootstrap.

    Seeds and problems are drawn with replacement independently of each other, because the same
    problems meet every seed. A percentile interval of S seeds is too narrow by √(S / (S − 1)),
    much for the few seeds here, so it is stretched about the mean by that factor. Values without
    problems, `[S, 1]`, get a t-interval.

    Args:
        values: one row a seed; one column a problem, or a single column.

    Returns:
        The mean and its interval.
    """
    values = values.double()
    if values.shape[1] == 1:
        return _t_interval(values.squeeze(1))
    mean = values.mean()
    seeds, problems = (_weights(n, stream) for stream, n in enumerate(values.shape))
    means = ((seeds @ values) * problems).sum(-1)
    tails = means.new_tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = (float(x) for x in means.quantile(tails) - mean)
    stretch = _stretch(len(values))
    return Interval(float(mean), float(mean) + stretch * low, float(mean) + stretch * high)


def _stretch(num_seeds: int) -> float:
    """By how much the percentile interval of so few seeds is too narrow."""
    return math.sqrt(num_seeds / max(num_seeds - 1, 1))


def _t_interval(values: Tensor) -> Interval:
    mean, n = float(values.mean()), len(values)
    if n == 1:
        return Interval(mean, -math.inf, math.inf)
    half = T_QUANTILES[n] * float(values.std()) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


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
    every seed drawn, its tokens; intervals are stretched as those of `mean_interval`. The
    differences use the same resamples on both sides.

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
    stretch = _stretch(len(target))
    return (
        {rule: _percentiles(whole[rule], table[rule], stretch) for rule in columns},
        {
            rule: _percentiles(whole[first] - whole[rule], table[first] - table[rule], stretch)
            for rule in columns
            if rule != first
        },
    )


def _clustered_draws(num_seeds: int, num_tokens: int, num_resamples: int) -> Iterator[Tensor]:
    """Places in a flattened `[S, T]`: seeds with replacement, and in each of them its tokens."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(num_resamples):
        seeds = torch.randint(num_seeds, (num_seeds, 1), generator=generator)
        tokens = torch.randint(num_tokens, (num_seeds, num_tokens), generator=generator)
        yield (seeds * num_tokens + tokens).flatten()


def _percentiles(value: float, draws: Tensor, stretch: float) -> Interval:
    tails = draws.new_tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = (stretch * (draws.quantile(tails) - value)).tolist()
    return Interval(value, value + low, value + high)
