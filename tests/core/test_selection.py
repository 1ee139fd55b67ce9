"""Which tokens a rule keeps: scores, exact counts, ties, bad numbers, sampling frequencies."""

from __future__ import annotations

import math
import statistics
from fractions import Fraction

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from tutelage.core import (
    NORMALIZATIONS,
    TokenStats,
    counter_uniform,
    importance,
    quadrant_table,
    quadrants,
    select_tokens,
)

INF, NAN = math.inf, math.nan
KEEPS = ["0.5", "0.1", "0.03", "0.29", "0.2", "1.0", "0.999", "1e-05"]


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[float]], list[int], list[float]]:
    """Entropy, teacher entropy, both divergences; completion of each row; uniform numbers."""
    size = draw(st.integers(1, 40))
    values = st.one_of(st.sampled_from([0.0, 0.25, 1.0, 2.0]), st.floats(1e-3, 12))
    table = [draw(st.lists(values, min_size=size, max_size=size)) for _ in range(4)]
    group = draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))
    uniform = draw(st.lists(st.floats(0.001, 0.999), min_size=size, max_size=size))
    return table, group, uniform


def stats_of(table: list[list[float]]) -> TokenStats:
    zeros = [0.0] * len(table[0])
    return TokenStats(*torch.tensor([*table, zeros, zeros], dtype=torch.float64))


@pytest.mark.parametrize("rule", reference.RULES)
@given(batch=batches(), method=st.sampled_from(NORMALIZATIONS), keep=st.sampled_from(KEEPS))
def test_keeps_what_the_reference_keeps(
    rule: str, batch: tuple[list[list[float]], list[int], list[float]], method: str, keep: str
) -> None:
    table, group, uniform = batch
    if rule == "entropy_sample":  # a score of log 0 is tested below
        table[0] = [max(h, 1e-6) for h in table[0]]
    found = select_tokens(
        stats_of(table),
        torch.tensor(group),
        rule,
        float(keep),
        normalization=method,
        uniform=torch.tensor(uniform, dtype=torch.float64),
    )
    expected = reference.scores(rule, table[0], table[2], table[3], uniform, method)
    assert found.importance.tolist() == pytest.approx(expected, abs=1e-12)
    # Ranked by our own score: sums in another order differ in the last bit and break ties.
    share = "1" if rule == "all" else keep
    usable = [True] * len(group)
    assert found.rows.tolist() == reference.kept(found.importance.tolist(), group, share, usable)
    assert found.num_nonfinite == 0
    assert found.mask.nonzero().flatten().tolist() == found.rows.tolist()


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    keep=st.one_of(st.sampled_from(KEEPS), st.integers(1, 1000).map(lambda n: str(n / 1000))),
)
def test_counts_are_exact(sizes: list[int], keep: str) -> None:
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    table = torch.rand(6, len(group), generator=torch.Generator().manual_seed(0))
    found = select_tokens(TokenStats(*table), group, "entropy", float(keep))
    counts = torch.bincount(group[found.rows], minlength=len(sizes)).tolist()
    assert counts == [max(1, math.floor(Fraction(keep) * m)) for m in sizes]


@pytest.mark.parametrize(
    ("keep", "size", "count"),
    [(0.29, 100, 29), (0.57, 100, 57), (1 / 3, 4096, 1365), (0.1, 9, 1), (1e-9, 5, 1)],
)
def test_decimal_shares_are_not_rounded_down_or_overflown(
    keep: float, size: int, count: int
) -> None:
    stats = TokenStats(*torch.rand(6, size))
    for scope in ("completion", "batch"):
        found = select_tokens(stats, torch.zeros(size).long(), "entropy", keep, scope)
        assert len(found.rows) == count


def test_the_float_product_would_be_one_short() -> None:
    """Negative control of the case above."""
    assert math.floor(0.29 * 100) == 28


def test_equal_scores_go_to_earlier_rows() -> None:
    stats = TokenStats(*torch.ones(6, 6))
    group = torch.tensor([1, 0, 1, 0, 1, 0])
    for rule in ("entropy", "soft_or", "q3", "divergence", "bottom"):
        assert select_tokens(stats, group, rule, 0.5).rows.tolist() == [0, 1]


def test_one_budget_over_the_batch_may_starve_a_completion() -> None:
    stats = TokenStats(*torch.tensor([[0.1, 0.2, 5.0, 6.0]]).expand(6, 4))
    group = torch.tensor([0, 0, 1, 1])
    assert select_tokens(stats, group, "entropy", 0.5, "batch").rows.tolist() == [2, 3]
    assert select_tokens(stats, group, "entropy", 0.5).rows.tolist() == [1, 3]


@pytest.mark.parametrize("rule", reference.RULES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("column", ["entropy", "reverse_kl", "forward_kl"])
def test_rows_with_a_bad_number_are_never_kept_but_counted(
    rule: str, bad: float, column: str
) -> None:
    generator = torch.Generator().manual_seed(4)
    stats = TokenStats(*torch.rand(6, 12, generator=generator, dtype=torch.float64))
    stats.__dict__[column][[2, 7]] = bad
    uniform = torch.rand(12, generator=generator, dtype=torch.float64)
    group = torch.arange(12) // 6
    for keep in (0.5, 1.0):
        found = select_tokens(stats, group, rule, keep, uniform=uniform)
        assert not {2, 7} & set(found.rows.tolist())
        assert found.num_nonfinite == 2


@pytest.mark.parametrize("rule", reference.RULES)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_bad_rows_do_not_change_the_scores_of_the_others(rule: str, bad: float) -> None:
    generator = torch.Generator().manual_seed(4)
    table = torch.rand(6, 12, generator=generator, dtype=torch.float64)
    table[:, [2, 7]] = bad
    uniform = torch.rand(12, generator=generator, dtype=torch.float64)
    stats, good = TokenStats(*table), torch.tensor([i for i in range(12) if i not in (2, 7)])
    for method in NORMALIZATIONS:
        found = importance(stats, rule, method, uniform)[good]
        expected = importance(stats[good], rule, method, uniform[good])
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_topk_would_have_kept_them_first() -> None:
    """Negative control: torch ranks NaN above everything."""
    assert torch.tensor([0.5, NAN, 0.9]).topk(1).indices.tolist() == [1]


def test_a_bad_row_does_not_take_the_place_of_one_of_probability_zero() -> None:
    """Both rank at −inf; the budget goes to the row that can be drawn, though it comes later."""
    nothing, one = [0.0, 0.0, 1.0], torch.rand(3, dtype=torch.float64)
    stats = stats_of([[NAN, 0.0, 1.0], nothing, nothing, nothing])
    for keep, rows in ((0.5, [2]), (0.67, [1, 2])):
        found = select_tokens(stats, torch.zeros(3).long(), "entropy_sample", keep, uniform=one)
        assert found.rows.tolist() == rows
        assert found.num_nonfinite == 1


def test_a_completion_without_a_usable_row_keeps_none() -> None:
    stats = TokenStats(*torch.tensor([[NAN, NAN, 1.0]]).expand(6, 3))
    found = select_tokens(stats, torch.tensor([0, 0, 1]), "entropy", 0.5)
    assert found.rows.tolist() == [2]
    assert found.num_nonfinite == 2


def test_rows_of_no_entropy_are_sampled_last_but_can_be_sampled() -> None:
    stats = TokenStats(*torch.tensor([[0.0, 1.0, 0.0, 2.0]], dtype=torch.float64).expand(6, 4))
    uniform = torch.full((4,), 0.5, dtype=torch.float64)
    for keep, rows in ((0.5, [1, 3]), (0.75, [0, 1, 3]), (1.0, [0, 1, 2, 3])):
        found = select_tokens(stats, torch.zeros(4).long(), "entropy_sample", keep, uniform=uniform)
        assert found.rows.tolist() == rows
        assert found.num_nonfinite == 0


def test_entropy_sampling_has_the_frequencies_of_draws_without_replacement() -> None:
    weights = [0.1, 0.4, 1.0, 2.5]
    trials = 4000
    group = torch.arange(trials).repeat_interleave(4)
    stats = TokenStats(*torch.tensor(weights * trials, dtype=torch.float64).expand(6, -1))
    uniform = counter_uniform((11,), group, torch.arange(4).repeat(trials))
    rows = select_tokens(stats, group, "entropy_sample", 0.5, uniform=uniform).rows
    counts = torch.bincount(rows % 4, minlength=4).double()
    share = torch.tensor(
        reference.inclusion_of_successive_sampling(weights, 2), dtype=torch.float64
    )
    assert counts.sum() == 2 * trials
    # Each inclusion is a coin of its own; a 5-sigma band for every one of the four.
    sigma = (trials * share * (1 - share)).sqrt()
    assert ((counts - trials * share).abs() <= 5 * sigma).all()
    proportional = 2 * torch.tensor(weights) / sum(weights)
    assert ((counts - trials * proportional).abs() > 5 * sigma).any()  # the test can tell


def test_pairs_drawn_have_the_probabilities_of_successive_sampling() -> None:
    weights = [0.5, 1.0, 3.0]
    trials = 6000
    group = torch.arange(trials).repeat_interleave(3)
    stats = TokenStats(*torch.tensor(weights * trials, dtype=torch.float64).expand(6, -1))
    uniform = counter_uniform((5,), group, torch.arange(3).repeat(trials))
    keep = 0.67  # two of three
    mask = select_tokens(stats, group, "entropy_sample", keep, uniform=uniform).mask
    left_out = (~mask).reshape(trials, 3).long().argmax(1)
    out = [1 - p for p in reference.inclusion_of_successive_sampling(weights, 2)]
    counts = torch.bincount(left_out, minlength=3).numpy()
    assert scipy.stats.chisquare(counts, [trials * p for p in out]).pvalue > 1e-4


def test_random_keeps_every_row_equally_often() -> None:
    trials = 3000
    group = torch.arange(trials).repeat_interleave(5)
    stats = TokenStats(*torch.rand(6, 5 * trials))
    uniform = counter_uniform((2,), group, torch.arange(5).repeat(trials))
    rows = select_tokens(stats, group, "random", 0.4, uniform=uniform).rows
    counts = torch.bincount(rows % 5, minlength=5)
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-4


@settings(max_examples=25)
@given(batch=batches(), seed=st.integers(0, 99))
def test_the_order_of_completions_does_not_matter(
    batch: tuple[list[list[float]], list[int], list[float]], seed: int
) -> None:
    table, group, uniform = batch
    stats, names = stats_of(table), torch.tensor(group)
    shuffled = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    order = shuffled[names].argsort(stable=True)  # whole completions move, rows stay in order
    draws = torch.tensor(uniform, dtype=torch.float64)
    for rule in reference.RULES:
        plain = select_tokens(stats, names, rule, 0.5, uniform=draws)
        moved = select_tokens(stats[order], names[order], rule, 0.5, uniform=draws[order])
        assert sorted(order[moved.rows].tolist()) == plain.rows.tolist()


@pytest.mark.parametrize("rule", reference.RULES)
def test_no_rows_keep_none(rule: str) -> None:
    empty = torch.zeros(0, dtype=torch.long)
    found = select_tokens(
        TokenStats(*torch.zeros(6, 0)), empty, rule, 0.5, uniform=torch.zeros(0).double()
    )
    assert found.rows.tolist() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0.0}, r"keep must be in \(0, 1\], got 0.0. Use keep = 1.0"),
        ({"keep": 1.5}, r"keep must be in \(0, 1\], got 1.5"),
        ({"keep": NAN}, r"keep must be in \(0, 1\], got nan"),
        ({"rule": "softor"}, "rule must be one of .*got 'softor'"),
        ({"scope": "token"}, "scope must be 'completion' or 'batch', got 'token'"),
        ({"normalization": "max"}, "normalization must be one of .*got 'max'"),
        ({"rule": "random"}, "rule 'random' samples at random and needs `uniform`"),
        ({"rule": "entropy_sample"}, "needs `uniform`"),
    ],
)
def test_refuses_what_it_cannot_mean(arguments: dict[str, object], message: str) -> None:
    stats = TokenStats(*torch.rand(6, 3))
    with pytest.raises(ValueError, match=message):
        select_tokens(stats, torch.zeros(3).long(), **arguments)  # type: ignore[arg-type]


def test_tip_blind_spot_and_what_soft_or_sees() -> None:
    """Entropy gives nothing to Q3, Soft-OR about its divergence; Q4 gets nothing."""
    #          Q1   Q2   Q3    Q4
    entropy = [2.0, 2.0, 0.0, 0.0]
    divergence = [3.0, 0.0, 3.0, 0.0]
    stats = stats_of([entropy, entropy, divergence, divergence])
    assert importance(stats, "entropy").tolist() == [2.0, 2.0, 0.0, 0.0]
    assert importance(stats, "soft_or").tolist() == [1.0, 1.0, 1.0, 0.0]
    assert importance(stats, "q3").tolist() == [0.0, 0.0, 3.0, 0.0]


def test_an_unclipped_tail_of_the_divergence_hides_it_from_soft_or() -> None:
    """Why `minmax_p98_both` exists: one outlier makes every other divergence look like 0."""
    divergence = [1.0] * 98 + [0.0, 1000.0]
    stats = stats_of([[0.0] * 50 + [0.5] * 50, [0.0] * 100, divergence, divergence])
    squeezed = importance(stats, "soft_or", "minmax_p98")[0]
    seen = importance(stats, "soft_or", "minmax_p98_both")[0]
    assert squeezed <= 0.002
    assert seen >= 0.03


@given(batch=batches(), cut=st.tuples(st.floats(0, 3), st.floats(0, 3)))
def test_quadrants_equal_the_reference(
    batch: tuple[list[list[float]], list[int], list[float]], cut: tuple[float, float]
) -> None:
    h, _, d, _ = batch[0]
    entropy, divergence = (torch.tensor(x, dtype=torch.float64) for x in (h, d))
    found = quadrants(entropy, divergence, cut).tolist()
    assert found == [reference.quadrant(x, y, *cut) for x, y in zip(h, d, strict=True)]
    # Multiples of 1/8: a median between two of them is exact, however it is interpolated.
    h, d = ([round(8 * v) / 8 for v in x] for x in (h, d))
    medians = [statistics.median(x) for x in (h, d)]
    entropy, divergence = (torch.tensor(x, dtype=torch.float64) for x in (h, d))
    found = quadrants(entropy, divergence).tolist()
    assert found == [reference.quadrant(x, y, *medians) for x, y in zip(h, d, strict=True)]


def test_quadrant_table_adds_up() -> None:
    quadrant = torch.tensor([1, 3, 3, 4])
    divergence = torch.tensor([1.0, 2.0, 5.0, 0.0])
    table = quadrant_table(quadrant, divergence, torch.tensor([True, False, True, False]))
    assert table == {
        "q1": {"share": 0.25, "kl_mass": 0.125, "kept_share": 1.0},
        "q2": {"share": 0.0, "kl_mass": 0.0, "kept_share": 0.0},
        "q3": {"share": 0.5, "kl_mass": 0.875, "kept_share": 0.5},
        "q4": {"share": 0.25, "kl_mass": 0.0, "kept_share": 0.0},
    }


@pytest.mark.parametrize("cut", ["mean", (1.0,), (1.0, 2.0, 3.0)])
def test_quadrants_refuse_other_thresholds(cut: object) -> None:
    with pytest.raises(ValueError, match="thresholds must be 'median' or two numbers"):
        quadrants(torch.rand(3), torch.rand(3), cut)  # type: ignore[arg-type]


def test_quadrants_of_nothing_and_of_bad_numbers() -> None:
    assert quadrants(torch.zeros(0), torch.zeros(0)).tolist() == []
    assert quadrants(torch.tensor([NAN]), torch.tensor([INF])).tolist() == [4]
