"""Weights of sampled rows: exactly 1/π, and unbiased over thousands of draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tutelage.core import TokenSelection, TokenStats, counter_uniform, importance, select_tokens

TRIALS = 6000
ROWS, KEEP = 8, 0.4  # three of eight
SAMPLING = ("random", "entropy_sample", "soft_or_sample")


def batch() -> tuple[TokenStats, Tensor]:
    """One completion's statistics, and the quantity whose sum is estimated."""
    entropy = torch.tensor([0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 3.0, 0.3], dtype=torch.float64)
    kl = torch.tensor([2.0, 0.5, 0.1, 1.0, 0.3, 0.7, 0.2, 4.0], dtype=torch.float64)
    gradient = torch.tensor([5.0, -1.0, 2.0, 0.5, 3.0, -2.0, 1.0, 8.0], dtype=torch.float64)
    return TokenStats(entropy, entropy, kl, kl, -kl, -kl), gradient


def trials_at_once(rule: str, is_corrected: bool) -> Tensor:
    """Estimates of the sum, one a trial, every trial being a completion of one large batch."""
    stats, gradient = batch()
    group = torch.arange(TRIALS).repeat_interleave(ROWS)
    position = torch.arange(ROWS).repeat(TRIALS)
    uniform = counter_uniform((17,), group, position)
    many = TokenStats.unstack(stats.stack().repeat(1, TRIALS))
    chosen = select_tokens(many, group, rule, KEEP, uniform=uniform, correct_sampling=is_corrected)
    parts = chosen.weights * gradient.repeat(TRIALS)[chosen.rows]
    return torch.zeros(TRIALS).double().index_add_(0, group[chosen.rows], parts)


def z_value(estimates: Tensor, truth: float) -> float:
    """How many standard errors the mean is away from the truth."""
    return abs(float(estimates.mean()) - truth) / float(estimates.std() / math.sqrt(len(estimates)))


@pytest.mark.parametrize("rule", SAMPLING)
def test_corrected_sums_are_unbiased(rule: str) -> None:
    estimates, (_, gradient) = trials_at_once(rule, True), batch()
    drawable = torch.isfinite(log_scores(rule))
    assert z_value(estimates, float(gradient[drawable].sum())) <= 4
    assert float(estimates.std() / math.sqrt(TRIALS)) < 0.05 * float(gradient.sum())  # it can tell


@pytest.mark.parametrize("rule", SAMPLING)
def test_uncorrected_sums_are_not(rule: str) -> None:
    """Negative control: neither as they are nor scaled by the share of rows that is kept."""
    estimates, (_, gradient) = trials_at_once(rule, False), batch()
    assert z_value(estimates, float(gradient.sum())) > 20
    if rule != "random":
        assert z_value(estimates * ROWS / 3, float(gradient.sum())) > 20


def log_scores(rule: str) -> Tensor:
    """log P of the batch's rows, up to a constant: the keys without their noise."""
    stats, _ = batch()
    half = torch.full((ROWS,), 0.5, dtype=torch.float64)
    noise = -math.log(-math.log(0.5))
    keys = importance(stats, rule, uniform=half)
    return torch.zeros(ROWS).double() if rule == "random" else keys - noise


def select(rule: str, uniform: Tensor, keep: float, is_corrected: bool = True) -> TokenSelection:
    stats, _ = batch()
    return select_tokens(
        stats, torch.zeros(ROWS).long(), rule, keep, uniform=uniform, correct_sampling=is_corrected
    )


@pytest.mark.parametrize("rule", SAMPLING)
@pytest.mark.parametrize("seed", range(5))
def test_weights_are_one_over_the_chance_given_the_other_rows(rule: str, seed: int) -> None:
    """π by definition: redraw one row's noise, everyone else's fixed, and see how often it stays.

    The row stays while its key beats the best key that was left out; a Gumbel variable exceeds x
    with probability 1 − exp(−exp(−x)).
    """
    uniform = counter_uniform((seed,), torch.arange(ROWS))
    keys = log_scores(rule) - (-uniform.log()).log()
    order = sorted(range(ROWS), key=lambda i: -float(keys[i]))
    chosen = select(rule, uniform, KEEP)
    assert chosen.rows.tolist() == sorted(order[:3])
    best_left_out = float(keys[order[3]])
    for row, weight in zip(chosen.rows.tolist(), chosen.weights.tolist(), strict=True):
        distance = best_left_out - float(log_scores(rule)[row])
        assert weight == pytest.approx(1 / (1 - math.exp(-math.exp(-distance))), rel=1e-10)
        redrawn = [keeps_when_redrawn(rule, uniform, row, i) for i in range(40)]
        stay = sum(redrawn) / len(redrawn)
        assert abs(stay - 1 / weight) <= 4 * math.sqrt(0.25 / len(redrawn))


def keeps_when_redrawn(rule: str, uniform: Tensor, row: int, index: int) -> bool:
    """Whether the row is kept with the quantile (index + ½)/40 as its number."""
    changed = uniform.clone()
    changed[row] = (index + 0.5) / 40
    return row in select(rule, changed, KEEP).rows.tolist()


@pytest.mark.parametrize("rule", SAMPLING)
def test_a_batch_wide_budget_is_corrected_too(rule: str) -> None:
    stats, _ = batch()
    uniform = counter_uniform((3,), torch.arange(ROWS))
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    options = {"uniform": uniform, "correct_sampling": True}
    whole = select_tokens(stats, group, rule, KEEP, "batch", **options)  # type: ignore[arg-type]
    assert whole.weights.tolist() == select(rule, uniform, KEEP).weights.tolist()


@pytest.mark.parametrize("rule", SAMPLING)
def test_keeping_everything_weighs_nothing_up(rule: str) -> None:
    uniform = counter_uniform((3,), torch.arange(ROWS))
    assert select(rule, uniform, 1.0).weights.tolist() == [1.0] * ROWS


@pytest.mark.parametrize("rule", ["random", "entropy_sample"])
def test_weights_stay_finite_where_the_next_row_is_unusable(rule: str) -> None:
    stats = TokenStats(*torch.tensor([[1.0, math.nan, 2.0]], dtype=torch.float64).expand(6, 3))
    uniform = torch.full((3,), 0.5, dtype=torch.float64)
    found = select_tokens(
        stats, torch.zeros(3).long(), rule, 0.7, uniform=uniform, correct_sampling=True
    )
    assert found.rows.tolist() == [0, 2]
    assert found.weights.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("entropy", [[0.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]])
def test_weights_stay_finite_where_rows_cannot_be_drawn(entropy: list[float]) -> None:
    stats = TokenStats(*torch.tensor([entropy], dtype=torch.float64).expand(6, 4))
    uniform = torch.full((4,), 0.5, dtype=torch.float64)
    found = select_tokens(
        stats, torch.zeros(4).long(), "entropy_sample", 0.5, uniform=uniform, correct_sampling=True
    )
    assert len(found.rows) == 2
    assert found.weights.tolist() == [1.0, 1.0]
