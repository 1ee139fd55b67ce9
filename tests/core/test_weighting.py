"""Gates and loss weights against loops over plain numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from tutelage.core import EXTRAS, LazyLogits, TokenStats, counter_uniform, token_stats
from tutelage.core.weighting import (
    entropy_gate,
    fire_weights,
    ida_weights,
    outside_trust_region,
    paced_weights,
    reward_weights,
    selectkd_weights,
)

INF, NAN = math.inf, math.nan
entropies = st.lists(st.floats(0, 12), min_size=1, max_size=30)


def f64(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(h=entropies, threshold=st.floats(0, 5))
def test_the_hard_gate(h: list[float], threshold: float) -> None:
    assert entropy_gate(f64(h), threshold).tolist() == [float(x >= threshold) for x in h]


@given(h=entropies, threshold=st.floats(0, 5), width=st.floats(0.05, 3))
def test_the_soft_gate(h: list[float], threshold: float, width: float) -> None:
    expected = [0.5 * (1 + math.tanh((x - threshold) / width / 2)) for x in h]
    found = entropy_gate(f64(h), threshold, "soft", width).tolist()
    assert found == pytest.approx(expected, rel=1e-10, abs=1e-15)


@given(seed=st.integers(0, 99), size=st.integers(1, 200), share=st.sampled_from([0, 0.5, 0.8, 1]))
def test_the_percentile_gate_opens_on_the_share_above(seed: int, size: int, share: float) -> None:
    h = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = entropy_gate(h, share, "percentile")
    limit = np.quantile(h.numpy(), share)
    # Interpolation differs in the last bit, which matters only for rows on the limit itself.
    clear = (h - limit).abs() > 1e-12
    assert found[clear].tolist() == (h >= limit)[clear].double().tolist()
    assert abs(float(found.sum()) - (1 - share) * size) <= 1


def test_gates_of_bad_numbers_stay_shut_and_move_no_other() -> None:
    h = f64([0.1, NAN, 0.9, 0.5])
    assert entropy_gate(h, 0.5).tolist() == [0, 0, 1, 1]
    assert entropy_gate(h, 0.5, "percentile").tolist() == [0, 0, 1, 1]


def test_a_narrow_soft_gate_is_the_hard_one() -> None:
    h = f64([0.0, 0.7, 0.79, 0.81, 5.0])
    torch.testing.assert_close(entropy_gate(h, 0.8, "soft", 1e-4), entropy_gate(h, 0.8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-0.1,), "threshold must be at least 0 nats, got -0.1"),
        ((-0.1, "percentile"), r"threshold must be in \[0, 1\], got -0.1"),
        ((1.5, "percentile"), r"threshold must be in \[0, 1\], got 1.5"),
        ((0.8, "soft", 0.0), "width must be above 0 nats, got 0.0"),
        ((0.8, "open"), "gate must be one of .*got 'open'"),
    ],
)
def test_gates_refuse(arguments: tuple[float, str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entropy_gate(f64([1.0]), *arguments)


def random_stats(size: int, seed: int) -> TokenStats:
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(6 + len(EXTRAS), size, generator=generator, dtype=torch.float64)
    table[4:6] -= 2.0
    return TokenStats.unstack(table, tuple(EXTRAS))


def fire(stats: TokenStats, groups: list[int], drop: str) -> list[float]:
    """FIRE's weights as loops."""
    h, teacher = stats.entropy.tolist(), stats.teacher_entropy.tolist()
    names = sorted(set(groups))
    means = []
    for name in names:
        values = [x for x, g in zip(stats.log_q.tolist(), groups, strict=True) if g == name]
        means.append(sum(values) / len(values))
    ranked = sorted(names, key=lambda name: means[names.index(name)])
    dropped = ranked[: math.floor(Fraction(drop) * len(names))]
    raw = [
        0.0 if g in dropped else (1 - t / max(teacher)) * s / max(h)
        for s, t, g in zip(h, teacher, groups, strict=True)
    ]
    count = sum(g not in dropped for g in groups)
    return [w / (sum(raw) / count) for w in raw]


@pytest.mark.parametrize("drop", ["0", "0.2", "0.29", "0.5", "0.99"])
@pytest.mark.parametrize("num_completions", [2, 5, 100])
def test_fire(drop: str, num_completions: int) -> None:
    stats = random_stats(3 * num_completions, seed=num_completions)
    groups = [i % num_completions for i in range(3 * num_completions)]
    found = fire_weights(stats, torch.tensor(groups), float(drop))
    assert found.tolist() == pytest.approx(fire(stats, groups, drop), rel=1e-10)
    dropped = math.floor(Fraction(drop) * num_completions)
    assert float(found.sum()) == pytest.approx(3 * (num_completions - dropped))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("column", ["entropy", "teacher_entropy", "log_q"])
def test_fire_is_not_poisoned_by_a_bad_row(bad: float, column: str) -> None:
    stats, group = random_stats(12, seed=1), torch.arange(12) // 3
    good = torch.tensor([i for i in range(12) if i != 4])
    expected = fire_weights(stats[good], group[good], 0.25)
    stats.__dict__[column][4] = bad
    found = fire_weights(stats, group, 0.25)
    assert found[4] == 0
    torch.testing.assert_close(found[good], expected, rtol=1e-12, atol=0)


def test_fire_where_nothing_differs_or_everything_is_dropped_gives_zeros() -> None:
    flat = TokenStats(*torch.zeros(6, 4, dtype=torch.float64))
    assert fire_weights(flat, torch.arange(4)).tolist() == [0.0] * 4
    empty = TokenStats(*torch.zeros(6, 0))
    assert fire_weights(empty, torch.zeros(0).long()).tolist() == []
    for drop in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"drop must be in \[0, 1\)"):
            fire_weights(flat, torch.arange(4), drop)


def test_selectkd_weighs_what_the_teacher_would_not_say() -> None:
    stats = random_stats(5, seed=2)
    stats.extras["is_in_teacher_top5"] = f64([1, 0, 1, 0, 0])
    assert selectkd_weights(stats).tolist() == [1, 0.01, 1, 0.01, 0.01]
    assert selectkd_weights(stats, 0.0).tolist() == [1, 0, 1, 0, 0]


def test_a_token_is_within_the_trust_region_with_probability_q_over_p() -> None:
    p, q = f64([0.5, 0.5, 0.5, 0.5, 1e-300]), f64([0.2, 0.2, 0.5, 0.9, 1e-290])
    stats = TokenStats(p, p, p, p, p.log(), q.log())
    below, above = math.nextafter(0.4, 0) - 1e-12, 0.4 + 1e-12
    found = outside_trust_region(stats, f64([below, above, 1 - 1e-12, 1 - 1e-12, 1 - 1e-12]))
    assert found.tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("ratio", [0.05, 0.4, 0.95])
def test_the_share_outside_is_1_minus_q_over_p(ratio: float) -> None:
    n, rows = 4000, torch.arange(4000)
    zero = torch.zeros(n, dtype=torch.float64)
    stats = TokenStats(zero, zero, zero, zero, zero, zero + math.log(ratio))
    share = float(outside_trust_region(stats, counter_uniform((0, 1), rows)).mean())
    assert share == pytest.approx(1 - ratio, abs=5 * math.sqrt(ratio * (1 - ratio) / n))


def test_ida_spares_the_entropy_from_advantages_that_would_lower_it() -> None:
    log_p, log_q = f64([-1.0, -1.0, -3.0, -3.0, -1.0, -1.0]), f64([-2.0, -2.0, -1.0, -1.0, -1, -9])
    stats = TokenStats(log_p, log_p, log_p, log_p, log_p, log_q)
    stats.extras["entropy_direction"] = f64([0.5, -0.5, 1e-300, -1e-300, -1.0, 0.0])
    p, q = (x.exp().tolist() for x in (log_p, log_q))
    expected = [(p[0] - q[0]) / (p[0] + q[0]), 1, 1, (q[3] - p[3]) / (q[3] + p[3]), 1, 1]
    assert ida_weights(stats).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_ida_equals_its_definition(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, y = 2 * torch.randn(2, 6, 9, generator=generator, dtype=torch.float64)
    tokens, eye = torch.arange(6), torch.eye(9, dtype=torch.float64)
    sides = LazyLogits(z, eye), LazyLogits(y, eye)
    found = ida_weights(token_stats(*sides, tokens, extras=["entropy_direction"]))
    given = zip(reference.log_softmax(z), reference.log_softmax(y), range(6), strict=True)
    expected = [reference.ida_weight(*row) for row in given]
    assert found.tolist() == pytest.approx(expected, rel=1e-10)


@given(verdicts=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=6))
def test_paced(verdicts: list[list[bool]]) -> None:
    expected = [sum(v) / 4 * (1 - sum(v) / 4) for v in verdicts for _ in v]
    found = paced_weights(torch.tensor(verdicts).flatten(), 4)
    assert found.tolist() == pytest.approx(expected, abs=1e-15)


@given(rewards=st.lists(st.floats(-5, 5), min_size=1, max_size=8), beta=st.floats(0.1, 10))
def test_reward_weights(rewards: list[float], beta: float) -> None:
    powers = [math.exp(r / beta) for r in rewards]
    expected = [x / math.fsum(powers) * len(rewards) for x in powers]
    found = reward_weights(f64(rewards), beta)
    assert found.tolist() == pytest.approx(expected, rel=1e-10)
    assert float(found.mean()) == pytest.approx(1)


@pytest.mark.parametrize("beta", [0.0, -1.0])
def test_rewards_need_a_temperature(beta: float) -> None:
    with pytest.raises(ValueError, match="beta must be above 0"):
        reward_weights(f64([1.0]), beta)
