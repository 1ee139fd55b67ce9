"""Verdicts of the claims benchmark: rules that can fail, one verdict a setting and loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from claims_records import BRIEF, RATE, RATES, level, opposite, record
from hypothesis import given
from hypothesis import strategies as st

import claims_statistics
from claims_arms import ARMS, BASELINES, loss_of
from claims_design import FULL, Cell, cells
from claims_rules import BROAD, CLAIMS, LEDGER, Difference, arms_of_claims
from claims_table import Table, correlations
from claims_verdicts import (
    TESTS,
    Comparison,
    Verdict,
    agreement,
    compare,
    judge,
    obstacle,
    overall,
    verdicts_of,
)
from tutelage.evaluation.metrics import Interval

ORDER = ["contradicted here", "not supported", "supported"]
TOYS = ("T6", "E4", "E5")


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(claims_statistics, "NUM_RESAMPLES", 200)
    short = partial(claims_statistics.correlation_intervals, num_resamples=30)
    monkeypatch.setattr("claims_table.correlation_intervals", short)
    claims_statistics._weights.cache_clear()
    yield
    claims_statistics._weights.cache_clear()


@pytest.mark.parametrize(
    ("test", "interval", "expected"),
    [
        ("beats", (0.02, 0.01, 0.03), "supported"),
        ("beats", (0.02, -0.01, 0.05), "not supported"),
        ("beats", (-0.02, -0.03, -0.01), "contradicted here"),
        ("matches", (-0.01, -0.02, 0.01), "supported"),
        ("matches", (0.00, -0.021, 0.01), "not supported"),
        ("matches", (-0.04, -0.05, -0.021), "contradicted here"),
        ("nearly", (-0.02, -0.029, 0.0), "supported"),
        ("nearly", (-0.021, -0.029, 0.0), "not supported"),
        ("nearly", (0.0, -0.03, 0.03), "not supported"),
        ("nearly", (-0.04, -0.05, -0.021), "contradicted here"),
        ("is_blind", (0.0, -0.1, 0.05), "supported"),
        ("is_blind", (0.0, -0.1, 0.06), "not supported"),
        ("is_blind", (0.2, 0.06, 0.3), "contradicted here"),
    ],
)
def test_every_test_reaches_every_verdict(
    test: str, interval: tuple[float, float, float], expected: Verdict
) -> None:
    assert TESTS[test](Interval(*interval)) == expected


@given(
    st.sampled_from(["beats", "matches", "nearly"]),
    st.lists(st.floats(-0.1, 0.1), min_size=3, max_size=3).map(sorted),
    st.floats(0.0, 0.1),
)
def test_a_better_difference_is_never_judged_worse(
    test: str, points: list[float], shift: float
) -> None:
    low, value, high = points
    before = TESTS[test](Interval(value, low, high))
    after = TESTS[test](Interval(value + shift, low + shift, high + shift))
    assert ORDER.index(after) >= ORDER.index(before)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["supported", "supported"], "supported"),
        (["supported", "not supported"], "not supported"),
        (["supported", "contradicted here"], "not supported"),
        (["not supported", "contradicted here"], "contradicted here"),
        (["not supported"], "not supported"),
        ([], "not supported"),
        (["supported", "cannot tell"], "cannot tell"),
        (["not supported", "cannot tell"], "not supported"),
        (["contradicted here", "cannot tell"], "contradicted here"),
    ],
)
def test_a_claim_needs_all_of_its_comparisons(parts: list[Verdict], expected: Verdict) -> None:
    assert overall(parts) == expected


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["supported", "supported"], "supported"),
        (["not supported"], "not supported"),
        (["supported", "contradicted here", "not supported"], "settings disagree"),
        (["supported", "not supported"], "supported in part"),
        (["not supported", "contradicted here"], "contradicted in part"),
        (["supported", "cannot tell"], "supported"),
        (["cannot tell", "cannot tell"], "cannot tell"),
    ],
)
def test_settings_that_disagree_are_said_to(verdicts: list[Verdict], expected: str) -> None:
    assert agreement(verdicts) == expected


@pytest.mark.parametrize(
    ("test", "interval", "expected"),
    [
        ("beats", (0.05, 0.01, 0.09), "decided"),
        ("beats", (0.00, -0.015, 0.015), "a tie"),
        ("beats", (-0.01, -0.05, 0.015), "not ahead"),
        ("beats", (0.03, -0.01, 0.07), "too noisy to say"),
        ("beats", (0.012, -0.001, 0.025), "too noisy to say"),
        ("matches", (0.00, -0.03, 0.03), "too noisy to say"),
        ("matches", (-0.02, -0.025, -0.015), "worse, perhaps by less than the margin"),
        ("nearly", (-0.03, -0.05, -0.001), "worse, perhaps by less than the margin"),
        ("matches", (-0.02, -0.04, 0.001), "too noisy to say"),
        ("matches", (-0.05, -0.06, -0.04), "decided"),
        ("is_blind", (0.05, 0.03, 0.07), "at the limit"),
        ("is_blind", (0.05, -0.2, 0.3), "too noisy to say"),
    ],
)
def test_a_wide_interval_is_told_from_a_measured_tie(
    test: str, interval: tuple[float, float, float], expected: str
) -> None:
    assert Comparison("", "points", test, Interval(*interval), 5).reading == expected


@pytest.mark.parametrize(
    ("test", "metric", "verdict", "gain", "level", "expected"),
    [
        ("matches", "mean", "supported", (0.05, 0.02, 0.08), 0.5, "nothing to lose"),
        ("nearly", "mean", "supported", (-0.05, -0.1, 0.0), 0.5, "nothing to lose"),
        ("matches", "mean", "supported", (0.05, 0.021, 0.08), 0.5, None),
        ("matches", "mean", "supported", None, 0.5, None),
        ("matches", "mean", "contradicted here", (0.0, 0.0, 0.0), 0.5, None),
        ("matches", "mean", "not supported", (0.0, 0.0, 0.0), 0.5, None),
        ("beats", "mean", "supported", (0.0, 0.0, 0.0), 0.5, None),
        ("beats", "pass", "not supported", (0.1, 0.1, 0.1), 0.9, "saturated"),
        ("beats", "pass", "not supported", (0.1, 0.1, 0.1), 0.89, None),
        ("beats", "mean", "not supported", (0.1, 0.1, 0.1), 0.95, None),
        ("beats", "pass", "supported", (0.1, 0.1, 0.1), 0.95, None),
        ("beats", "pass", "contradicted here", (0.1, 0.1, 0.1), 0.95, None),
    ],
)
def test_what_cannot_tell_is_found(
    test: str,
    metric: str,
    verdict: Verdict,
    gain: tuple[float, float, float] | None,
    level: float,
    expected: str | None,
) -> None:
    gained = None if gain is None else Interval(*gain)
    assert obstacle(test, metric, verdict, gained, level) == expected


@pytest.mark.parametrize("gained", [0.0, 0.2])
def test_a_match_says_nothing_where_all_tokens_gain_nothing(gained: float) -> None:
    """With the exact loss all tokens gain; with the sampled one they stay at the start."""
    arms = ("start", "all", "all+sampled", "stored", "stored+sampled")
    work = [c for c in cells(BRIEF, RATES) if c.kind == "arm" and c.learning_rate == RATE]

    def quality(cell: Cell, _: str) -> float:
        is_better = cell.arm in ("all", "stored") or (gained and cell.arm != "start")
        return 0.3 + 0.2 * bool(is_better)

    table = Table([record(c, quality) for c in work if c.arm in arms], BRIEF.seeds, RATES)
    verdicts = verdicts_of(compare(table, d) for d in CLAIMS["F1"].differences)
    assert verdicts["scarce"] == "supported"
    assert verdicts["scarce, sampled loss"] == ("supported" if gained else "cannot tell")


# --- every claim ----------------------------------------------------------------------------------


def ahead(differences: Sequence[Difference], by: float) -> dict[tuple[str, str, str], float]:
    """Figures of arms by setting and metric: each first arm ahead of its rivals by so much."""
    found: dict[tuple[str, str, str], float] = {}
    for _ in differences:  # as often as a chain of arms may be long
        for d in differences:
            if d.test != "is_blind":
                rival = found.setdefault((d.setting, d.b, d.metric), 0.0)
                found[d.setting, d.a, d.metric] = rival + by
    for d in differences:
        if d.test == "is_blind":
            seen = found[d.setting, d.a, d.metric]
            found[d.setting, d.b, d.metric] = seen - (0.5 if by < 0 else 0.0)
    return found


def table_of(name: str, by: float) -> Table:
    """All cells that a claim needs, its first arms ahead of their rivals by so much."""
    differences = CLAIMS[name].differences
    figures = ahead(differences, by)

    def quality(cell: Cell, metric: str) -> float:
        return figures.get((cell.setting, cell.arm, metric), 0.5)

    needed = {(d.setting, arm) for d in differences for arm in (d.a, d.b)}
    work = [c for c in cells(BRIEF, RATES) if c.kind == "arm" and (c.setting, c.arm) in needed]
    rates = [c for c in work if c.learning_rate == RATE]
    return Table([record(c, quality) for c in rates], BRIEF.seeds, RATES)


@pytest.mark.parametrize("name", [name for name in CLAIMS if name not in TOYS])
@pytest.mark.parametrize(("by", "expected"), [(0.2, "supported"), (-0.2, "contradicted here")])
def test_every_claim_can_be_supported_and_contradicted_in_every_setting(
    name: str, by: float, expected: str
) -> None:
    table = table_of(name, by)
    verdicts = verdicts_of(compare(table, d) for d in CLAIMS[name].differences)
    assert verdicts == dict.fromkeys({d.group for d in CLAIMS[name].differences}, expected)


@pytest.mark.parametrize("world", [level, opposite])
def test_claims_without_arms_can_be_supported_and_contradicted(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("claims_verdicts.CLAIMS", {name: CLAIMS[name] for name in TOYS})
    design = replace(BRIEF, seeds=(1, 2, 3, 4, 5))  # a t-interval of two seeds is endless
    work = [c for c in cells(design, RATES) if c.kind in ("probe", "oscillation", "bias")]
    table = Table([record(c, world) for c in work], design.seeds, RATES)
    found = judge(table, correlations(table))
    expected = "supported" if world is level else "contradicted here"
    assert {claim["agreement"] for claim in found.values()} == {expected}


def test_every_claim_says_who_makes_it_and_is_about_arms_that_exist() -> None:
    for name, claim in CLAIMS.items():
        assert claim.source.endswith(".")
        assert claim.rule.endswith(".")
        assert bool(claim.differences) == (name not in TOYS)
        for d in (*claim.differences, *claim.beside):
            assert {d.a, d.b} <= {*ARMS, *BASELINES}
            assert d.test in TESTS
    assert all(set(arms) <= set(FULL.arms[s]) for s, arms in arms_of_claims().items())


def test_losses_are_judged_apart() -> None:
    """The sampled arms are behind, the exact ones ahead."""
    differences = CLAIMS["D1"].differences
    arms = {arm for d in differences for arm in (d.a, d.b)}
    work = [c for c in cells(BRIEF, RATES) if c.kind == "arm" and c.arm in arms]

    def quality(cell: Cell, name: str) -> float:
        sign = 1 if loss_of(cell.arm) == "exact" else -1
        return 0.5 + 0.2 * sign * cell.arm.startswith("probability_gap")

    table = Table([record(c, quality) for c in work], BRIEF.seeds, RATES)
    verdicts = verdicts_of(compare(table, d) for d in differences)
    assert verdicts["overconfident"] == "supported"
    assert verdicts["overconfident, sampled loss"] == "contradicted here"
    assert agreement(verdicts.values()) == "settings disagree"


def test_a_claim_has_no_verdict_where_one_of_its_arms_was_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("claims_verdicts.CLAIMS", {name: CLAIMS[name] for name in ("T1", "T3")})
    whole = [c for c in cells(BRIEF, RATES) if c.kind == "arm" and c.learning_rate == RATE]
    records = [record(c, level) for c in whole if (c.setting, c.arm) != ("scarce", "q3-10")]
    found = judge(Table(records, BRIEF.seeds, RATES), {})
    assert set(found["T1"]["verdicts"]) == set(BROAD)
    assert set(found["T3"]["verdicts"]) == {*LEDGER} - {"scarce"}
    assert judge(Table([], BRIEF.seeds, RATES), {})["T1"]["agreement"] == "not run"


def test_a_difference_needs_every_seed_and_uses_all_that_both_arms_have() -> None:
    """Arms ahead by 0.1 in the first of two seeds only."""
    arms = ("q3-10", "all", "start")
    work = [c for c in cells(BRIEF, RATES) if (c.kind, c.setting) == ("arm", "scarce")]
    work = [c for c in work if c.arm in arms]

    def early(cell: Cell, name: str) -> float:
        return 0.5 + 0.1 * (cell.arm == "q3-10" and cell.seed == 1)

    records = [record(c, early) for c in work]
    table = Table(records, BRIEF.seeds, RATES)
    difference = table.difference("scarce", "q3-10", "all", "mean")
    assert difference.value == pytest.approx(0.05, abs=2e-3)
    assert table.seeds_of("scarce", *arms) == (1, 2)
    assert Table(records, BRIEF.seeds[:1], RATES).seeds_of("scarce", *arms) == (1, 2)
    without = [r for r in records if (r["arm"], r["seed"]) != ("q3-10", 2)]
    table = Table(without, BRIEF.seeds, RATES)
    assert not table.has("scarce", "q3-10")
    with pytest.raises(KeyError):
        table.difference("scarce", "q3-10", "all", "mean")
