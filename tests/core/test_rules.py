"""Scores of every selection rule against a plain reading of their definitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from tutelage.core import (
    EXTRAS,
    NORMALIZATIONS,
    RULES,
    TokenStats,
    importance,
    select_tokens,
    token_stats,
)
from tutelage.core.rules import COMBINATIONS, extreme_advantage, influence, probability_gap

Make = Callable[..., Any]
ROWS = 40
MAIN = ("entropy", "reverse_kl", "forward_kl", "log_p", "log_q")


def expected_scores(
    rule: str,
    rows: dict[str, list[float]],
    uniform: list[float],
    position: list[int],
    method: str,
    group: list[int] | None = None,
) -> list[float]:
    """The score of every row, from columns of plain numbers."""
    base = (rows["entropy"], rows["reverse_kl"], rows["forward_kl"], uniform, method)
    if rule in reference.SAMPLED_RULES:
        return reference.sampled_scores(rule, rows["log_p"], rows["log_q"])
    match rule:
        case "soft_or_sample":
            noise = [-math.log(-math.log(u)) for u in uniform]
            soft_or = reference.scores("soft_or", *base)
            return [log(s) + g for s, g in zip(soft_or, noise, strict=True)]
        case "extreme_advantage":
            return reference.extreme_scores(rows["log_p"], rows["log_q"], group or [0] * ROWS)
        case "influence":
            useful = reference.scores("soft_or", *base)
            return reference.influence_scores(rows["signal_share"], useful, group or [0] * ROWS)
        case "forward_divergence":
            return rows["forward_kl"]
        case "first_n":
            return [-float(t) for t in position]
        case "teachability":
            return [d * c for d, c in zip(*map(robust, teachable(rows)), strict=True)]
        case "gradient_norm" | "local_oracle" | "local_gain":
            return rows[rule]
    return reference.scores(rule, *base)


def log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def teachable(rows: dict[str, list[float]]) -> tuple[list[float], list[float]]:
    return rows["top_divergence"], rows["compatibility"]


def robust(x: list[float]) -> list[float]:
    """5 % and 95 % quantiles to 0 and 1."""
    return reference.clipped_minmax(x, float(np.quantile(x, 0.05)), float(np.quantile(x, 0.95)))


def reference_rows(pair: Any, tokens: torch.Tensor) -> dict[str, list[float]]:
    """Columns of statistics, computed without the package."""
    z, teacher = (head.logits() for head in pair.reference)
    log_p, log_q = reference.log_softmax(z), reference.log_softmax(teacher)
    rows = {
        "entropy": reference.entropy(log_p).tolist(),
        "reverse_kl": reference.reverse_kl(log_p, log_q).tolist(),
        "forward_kl": reference.forward_kl(log_p, log_q).tolist(),
        "log_p": [row[y] for row, y in zip(log_p.tolist(), tokens.tolist(), strict=True)],
        "log_q": [row[y] for row, y in zip(log_q.tolist(), tokens.tolist(), strict=True)],
    }
    extras = [reference.extras(a, b) for a, b in zip(z, log_q, strict=True)]
    return rows | {name: [row[name] for row in extras] for name in EXTRAS}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("method", NORMALIZATIONS)
@pytest.mark.parametrize("rule", RULES)
def test_scores_equal_their_definitions_from_logits_on(
    make_pair: Make, rule: str, method: str, dtype: torch.dtype, limit: float
) -> None:
    pair = make_pair(rows=ROWS, vocab_size=30, dtype=dtype)
    uniform = torch.rand(ROWS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    position = torch.arange(ROWS) % 13
    tokens = torch.arange(ROWS) % 30
    stats = token_stats(pair.student, pair.teacher, tokens, extras=RULES[rule].extras)
    found = importance(stats, rule, method, uniform, position)
    expected = torch.tensor(
        expected_scores(
            rule, reference_rows(pair, tokens), uniform.tolist(), position.tolist(), method
        ),
        dtype=torch.float64,
    )
    assert (torch.isfinite(found) == torch.isfinite(expected)).all()
    usable = torch.isfinite(expected)
    size = expected[usable].abs().max().clamp(min=1e-300)
    assert float((found - expected)[usable].abs().max() / size) <= limit


@pytest.mark.parametrize("scope", ["completion", "batch"])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_keeps_what_the_reference_keeps(rule: str, scope: str) -> None:
    generator = torch.Generator().manual_seed(7)
    table = torch.rand(6 + len(EXTRAS), ROWS, generator=generator, dtype=torch.float64)
    uniform = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    group = torch.arange(ROWS) // 15
    position = torch.arange(ROWS) % 15
    stats = TokenStats.unstack(table, tuple(EXTRAS))
    found = select_tokens(stats, group, rule, 0.29, scope, uniform=uniform, position=position)
    rows = {name: column.tolist() for name, column in stats.extras.items()}
    rows |= {name: stats.__dict__[name].tolist() for name in MAIN}
    groups = group.tolist() if scope == "completion" else [0] * ROWS
    given = (uniform.tolist(), position.tolist(), "minmax_p98", groups)
    score, share = expected_scores(rule, rows, *given), "1" if rule == "all" else "0.29"
    ends = RULES[rule].num_ends
    assert found.rows.tolist() == reference.kept(score, groups, share, [True] * ROWS, ends)
    assert (found.weights == 1).all()


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    num_tokens=st.integers(1, 40),
    rule=st.sampled_from(["first_n", "soft_or", "divergence"]),
)
def test_a_budget_in_tokens_is_exact(sizes: list[int], num_tokens: int, rule: str) -> None:
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    position = torch.cat([torch.arange(m) for m in sizes])
    stats = TokenStats(*torch.rand(6, len(group), generator=torch.Generator().manual_seed(0)))
    found = select_tokens(stats, group, rule, position=position, num_tokens=num_tokens)
    counts = torch.bincount(group[found.rows], minlength=len(sizes)).tolist()
    assert counts == [min(num_tokens, m) for m in sizes]
    if rule == "first_n":
        assert bool((position[found.rows] < num_tokens).all())


def test_first_n_counts_positions_not_rows() -> None:
    """Rows may lie in any order; the position decides."""
    stats = TokenStats(*torch.rand(6, 4))
    position = torch.tensor([3, 1, 0, 2])
    found = select_tokens(stats, torch.zeros(4).long(), "first_n", position=position, num_tokens=2)
    assert found.rows.tolist() == [1, 2]


@pytest.mark.parametrize("b", [0.0, 0.3, 1.0])
def test_the_probability_gap_takes_a_share_of_each_difference(make_pair: Make, b: float) -> None:
    pair, tokens = make_pair(rows=ROWS, vocab_size=30), torch.arange(ROWS) % 30
    found = importance(token_stats(pair.student, pair.teacher, tokens), probability_gap(b))
    rows = reference_rows(pair, tokens)
    expected = reference.sampled_scores("probability_gap", rows["log_p"], rows["log_q"], b)
    assert found.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_a_stop_token_counts_in_the_budget_and_is_not_kept() -> None:
    log_p = torch.tensor([-1.0, -2.0, -3.0, -9.0, -9.0], dtype=torch.float64)
    stats = TokenStats(*torch.zeros(5, 5).double(), log_q=torch.zeros(5).double())
    stats.log_p[:] = log_p
    group, is_stop = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([False] * 3 + [True] * 2)
    options = {"keep": 0.5, "is_stop": is_stop}
    found = select_tokens(stats, group, "probability_gap", **options)
    assert found.rows.tolist() == [1, 2]  # the second completion is a stop token alone
    assert found.num_nonfinite == 0
    assert select_tokens(stats, group, "lowest_logprob", **options).rows.tolist() == [2, 3, 4]
    assert select_tokens(stats, group, "probability_gap", keep=0.5).rows.tolist() == [2, 3, 4]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [1, 7, 999])
def test_a_thousandth_keeps_one_token_of_every_completion(rule: str, size: int) -> None:
    group, position = torch.arange(2).repeat_interleave(size), torch.arange(size).repeat(2)
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(6 + len(EXTRAS), 2 * size, generator=generator, dtype=torch.float64)
    stats, uniform = TokenStats.unstack(table[:, :], tuple(EXTRAS)), table[0].clamp(0.01, 0.99)
    found = select_tokens(stats, group, rule, 0.001, uniform=uniform, position=position)
    counts = torch.bincount(group[found.rows], minlength=2).tolist()
    expected = size if rule == "all" else min(size, 2) if rule == "extreme_advantage" else 1
    assert counts == [expected] * 2


@pytest.mark.parametrize(
    ("end", "keep", "rows"),
    [
        ("max", 0.001, [1, 5]),
        ("min", 0.001, [3, 6]),
        ("both", 0.001, [1, 3, 5, 6]),
        ("both", 0.4, [0, 1, 2, 3, 5, 6]),
        ("both", 0.9, [0, 1, 2, 3, 5, 6]),
    ],
)
def test_the_extremes_are_taken_at_each_end(end: str, keep: float, rows: list[int]) -> None:
    advantage = torch.tensor([3.0, 4.0, -2.0, -7.0, math.nan, 1.0, 0.5], dtype=torch.float64)
    nothing = torch.zeros_like(advantage)
    stats = TokenStats(nothing, nothing, nothing, nothing, nothing, advantage)
    group = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    found = select_tokens(stats, group, extreme_advantage(end), keep)
    assert found.rows.tolist() == rows
    assert found.num_nonfinite == 1
    with pytest.raises(ValueError, match=r"end must be one of .*got 'top'"):
        extreme_advantage("top")


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("usefulness", ["soft_or", "teachability"])
def test_the_rank_of_the_signal_joins_a_usefulness(
    make_pair: Make, combine: str, usefulness: str
) -> None:
    pair, tokens = make_pair(rows=ROWS, vocab_size=30), torch.arange(ROWS) % 30
    rule, group = influence(combine, usefulness), torch.arange(ROWS) // 15
    stats = token_stats(pair.student, pair.teacher, tokens, extras=rule.extras)
    found = importance(stats, rule, "minmax", group=group)
    rows = reference_rows(pair, tokens)
    useful = expected_scores(usefulness, rows, [], [], "minmax")
    expected = reference.influence_scores(rows["signal_share"], useful, group.tolist(), combine)
    assert found.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert ("compatibility" in stats.extras) == (combine != "none" and usefulness != "soft_or")


def test_equal_signals_have_equal_ranks() -> None:
    signal = torch.tensor([0.2, 0.7, 0.2, math.nan, 0.9, 0.9, 0.9, 0.1], dtype=torch.float64)
    stats = TokenStats(*torch.rand(6, 8).double(), {"signal_share": signal})
    group = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
    found = importance(stats, influence("none"), group=group)
    known = ~signal.isnan()
    assert found[known].tolist() == pytest.approx([0, 2 / 3, 0, 1, 0, 0, 0])
    assert found[~known].isnan().all()


def test_rounding_does_not_decide_which_influential_token_is_kept() -> None:
    """One token of 20 is first by its signal, and 2 % have the highest entropy: both score 1."""
    uniform = torch.rand(5, 400, generator=torch.Generator().manual_seed(3)).double()
    group = torch.arange(400) // 20

    def kept(noise: float) -> list[int]:
        draw = torch.Generator().manual_seed(4)
        entropy, kl = (
            x * (1 + noise * torch.rand(400, generator=draw).double()) for x in uniform[:2]
        )
        columns = (entropy, kl, *uniform[2:], -uniform[2])
        stats = TokenStats(*columns, {"signal_share": uniform[4]})
        return select_tokens(stats, group, influence(), 0.05).rows.tolist()

    score = 1 - (1 - uniform[0].div(uniform[0].quantile(0.98)).clamp(max=1)) * (1 - uniform[1])
    first = torch.stack([uniform[4, 20 * i : 20 * i + 20].argmax() + 20 * i for i in range(20)])
    assert (score == 1).sum() > 4
    assert 0 < sum(row in first.tolist() for row in kept(0.0)) < 20  # neither kind always
    assert kept(0.0) == kept(1e-9) == kept(1e-8)


def test_of_rows_that_score_one_the_larger_sum_is_first() -> None:
    """All entropies are clipped to the highest, so every u is 1; signals differ by a millionth."""
    signal = torch.tensor([0.3, 0.300002, 0.300001], dtype=torch.float64)
    entropy = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    nothing = torch.zeros(3, dtype=torch.float64)
    columns = (entropy, nothing, nothing, nothing, nothing, nothing)
    stats = TokenStats(*columns, {"signal_share": signal})
    found = importance(stats, influence(), "minmax", group=torch.zeros(3, dtype=torch.long))
    assert found.tolist() == [0.0, 2.0, 1.5]


def test_soft_or_keeps_the_digits_of_small_scores() -> None:
    small = torch.tensor([0.0, 1e-17, 1.0], dtype=torch.float64)
    nothing = torch.zeros(3, dtype=torch.float64)
    stats = TokenStats(small, nothing, small, nothing, nothing, nothing)
    assert importance(stats, "soft_or", "minmax").tolist() == pytest.approx([0, 2e-17, 1], abs=0)


@pytest.mark.parametrize("option", ["combine", "usefulness"])
def test_influence_of_another_kind_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=rf"{option} must be .*got 'other'"):
        influence(**{option: "other"})


BY_EXTRAS = ["teachability", "gradient_norm", "local_oracle", "local_gain", "influence"]


@pytest.mark.parametrize("rule", BY_EXTRAS)
def test_bad_extras_are_never_kept_and_change_no_other_score(rule: str) -> None:
    generator = torch.Generator().manual_seed(3)
    table = torch.rand(6 + len(EXTRAS), 12, generator=generator, dtype=torch.float64)
    good = TokenStats.unstack(table[:, 2:], tuple(EXTRAS))
    table[6:, 0], table[6:, 1] = math.nan, math.inf
    stats = TokenStats.unstack(table, tuple(EXTRAS))
    found = select_tokens(stats, torch.zeros(12).long(), rule, 1.0)
    assert found.rows.tolist() == list(range(2, 12))
    assert found.num_nonfinite == 2
    torch.testing.assert_close(found.importance[2:], importance(good, rule), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "teachability"}, r"rule 'teachability' needs token_stats\(..., extras="),
        ({"rule": "local_oracle"}, r"needs token_stats\(..., extras=\('local_oracle',\)\)"),
        ({"rule": "soft_or_sample"}, "samples at random and needs `uniform`"),
        ({"rule": "first_n"}, "rule 'first_n' needs `position`"),
        ({"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
        ({"correct_sampling": True}, "correct_sampling needs a rule that samples, got 'soft_or'"),
    ],
)
def test_refuses_what_it_cannot_do(arguments: dict[str, object], message: str) -> None:
    stats = TokenStats(*torch.rand(6, 3))
    with pytest.raises(ValueError, match=message):
        select_tokens(stats, torch.zeros(3).long(), **arguments)  # type: ignore[arg-type]
