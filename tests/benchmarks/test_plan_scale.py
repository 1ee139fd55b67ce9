"""The table of sizes and cards: it is today's, and says what a plan says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import plan_scale


@pytest.mark.slow
@pytest.mark.parametrize("pair", plan_scale.PAIRS, ids=lambda pair: pair.label)
def test_the_table_is_what_is_planned_today(pair: Any) -> None:
    page = plan_scale.PAGE.read_text(encoding="utf-8")
    for line in plan_scale.table([pair]):
        assert line in page


def test_a_cell_names_the_first_way_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def plan(pair: Any, way: Any, decoded: int, count: int, card: int) -> Any:
        from types import SimpleNamespace

        asked.append((way.letter, decoded))
        fits = (way.letter, decoded) == ("C", 32)
        peak = SimpleNamespace(total_bytes=(10 if fits else 90) * plan_scale.GIB)
        return SimpleNamespace(peak=peak, available_bytes=20 * plan_scale.GIB)

    monkeypatch.setattr(plan_scale, "plan", plan)
    assert plan_scale.cell(plan_scale.PAIRS[0], 1, 24) == "C/32 10"
    assert [letter for letter, _ in asked] == ["A"] * 4 + ["C"] * 2  # one process shares nothing
    asked.clear()
    assert plan_scale.cell(plan_scale.PAIRS[0], 4, 24) == "C/32 10"
    assert ("B", 64) in asked


def test_what_is_remembered_is_not_taken_for_something_else() -> None:
    calls = []

    def function(*given: Any, **named: Any) -> int:
        calls.append(given)
        return len(calls)

    twins, ask = ("one", "two"), plan_scale.remembered(function)
    found = [ask(twin, shape, 3, is_cached=c) for twin in twins for shape in (1, 2) for c in (0, 1)]
    assert len(set(found)) == 8
    assert ask(twins[0], 1, 3, is_cached=0) == found[0]
    assert len(calls) == 8
