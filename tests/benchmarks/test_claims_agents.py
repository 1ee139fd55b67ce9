"""The agentic claim: page and verdict follow from the committed cells, and each can come out."""

from __future__ import annotations

import json
from statistics import fmean
from typing import Any

import pytest

import agents

RESULT: dict[str, Any] = json.loads(agents.RESULT.read_text(encoding="utf-8"))
CELLS: list[dict[str, Any]] = RESULT["cells"]


def test_the_page_is_that_of_the_committed_cells() -> None:
    assert agents.PAGE.read_text(encoding="utf-8") == agents.page(RESULT) + "\n"


def test_the_verdict_follows_from_the_committed_cells() -> None:
    assert agents.judged(CELLS) == {name: RESULT[name] for name in agents.judged(CELLS)}
    pairs = {(cell["arm"], cell["seed"]) for cell in CELLS}
    assert pairs == {(a, s) for a in (*agents.BASELINES, *agents.ARMS) for s in agents.SEEDS}
    for arm, (mean, low, high) in RESULT["arms"].items():
        assert low <= mean <= high
        assert mean == pytest.approx(fmean(fmean(c["success"]) for c in CELLS if c["arm"] == arm))


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [(0.9, "supported"), (0.0, "not supported"), (-0.9, "contradicted here")],
)
def test_every_verdict_can_come_out(gain: float, verdict: str) -> None:
    def moved(cell: dict[str, Any]) -> dict[str, Any]:
        level = 0.5 + gain / 2 if cell["arm"] == "q3-20" else 0.5
        return {**cell, "success": [level] * agents.NUM_PROBLEMS}

    assert agents.judged([moved(cell) for cell in CELLS])["verdict"] == verdict
