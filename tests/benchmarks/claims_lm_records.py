"""Made-up cells of the claims on a real language model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import claims_lm_rules
from claims_lm_design import SCALES, Cell, cells, tuning_cells

FACTS = {
    "task": "stories",
    "num_texts": 4,
    "minutes": 1.0,
    "parameters": 9,
    "test": {"mean_at_k": 0.5},
    "recipe": {"num_layers": None, "num_epochs": 1},
    "machine": {"device": "cpu"},
}
SCALE = SCALES["cpu"]
LAST = len(SCALE.seeds)
RATES = {"exact": SCALE.grid[1], "sampled": SCALE.grid[1], "own": SCALE.grid[2]}


def record(cell: Cell, accuracy: float) -> dict[str, Any]:
    """A finished cell with that accuracy in every problem."""
    wobble = 0.002 * ((cell.seed * 7 + len(cell.arm)) % 3 - 1)
    kl = 1 + abs(cell.rate - SCALE.grid[1]) - accuracy
    problems = {name: [kl + wobble] * 5 for name in claims_lm_rules.METRICS}
    problems |= {"mean": [accuracy + wobble] * 5, "pass": [accuracy] * 5}
    if (cell.kind, cell.loss) == ("tune", "own"):
        problems["mean"] = [0.3 - abs(cell.rate - SCALE.grid[2])] * 5
    return {
        "key": f"{cell.name}/size/cpu/pair",
        "source": "s",
        "environment": "e",
        **asdict(cell),
        **{name: values[0] for name, values in problems.items()},
        "problems": problems,
        "train_s": 2.0,
        "measure_s": 1.0,
        "tokens_trained": 10,
        "kl_kept": 0.5,
    }


def records(**accuracy: float) -> list[dict[str, Any]]:
    """Every cell but those of the arms that came later."""
    planned = [*tuning_cells(SCALE, "stories"), *cells(SCALE, "stories", RATES)]
    work = [cell for cell in planned if cell.arm not in claims_lm_rules.LATER]
    return [record(c, accuracy.get(c.arm.replace("-", "_"), 0.4)) for c in work]


def results_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    pairs = {"pair": {"teacher": FACTS, "student": FACTS}}
    return {"pairs": pairs, "environments": {}, "cells": found}
