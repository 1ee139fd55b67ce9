"""Finished cells with made-up figures, and a small design that has all arms of claims."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from claims_arms import TUNED
from claims_choices import COMPARED_RULES
from claims_design import FULL, SETTINGS, Cell, Controls, Design, Rates, cells, tuning_cells
from claims_probe import OSCILLATION_RATES, SCORES
from claims_table import PER_PROBLEM, PER_SEED

RATE = 1e-3
RATES: Rates = {setting: dict.fromkeys(TUNED, RATE) for setting in SETTINGS}
BRIEF = replace(
    FULL,
    seeds=(1, 2),
    sensitivity_seeds=(1, 2),
    controls=(Controls("scarce", ("all", "random-10"), 8),),
)
"""The full design with two seeds."""
Quality = Callable[[Cell, str], float]
_NUM_PROBLEMS = 3


def record(cell: Cell, quality: Quality) -> dict[str, Any]:
    """A finished cell whose figures are `quality` and a little noise."""
    rng = random.Random("/".join(map(str, asdict(cell).values())))
    found: dict[str, Any] = {"key": cell.key, **asdict(cell), "commit": "c" * 40}
    found |= {"cpu_s": 1.0, "wall_s": 2.0, "digest": "d"}

    def noisy(name: str) -> float:
        return quality(cell, name) + rng.gauss(0.0, 1e-3)

    match cell.kind:
        case "probe":
            worth = [rng.random() for _ in range(10)]
            tokens = {
                rule: [quality(cell, rule) * w + rng.gauss(0.0, 0.3) for w in worth]
                for rule in SCORES
            }
            quadrant = [rng.randrange(1, 5) for _ in worth]
            found["tokens"] = {**tokens, "decrease": worth, "gradient": worth, "quadrant": quadrant}
        case "oscillation":
            for name in ("flat", "peaked"):
                for rate in OSCILLATION_RATES:
                    found[f"changes_{name}_{rate}"] = noisy(name)
                    found[f"late_{name}_{rate}"] = noisy(name)
        case "bias":
            for form in ("start", "full", "tail", "renorm"):
                for figure in ("entropy", "forward_kl"):
                    found[f"{figure}_{form}"] = noisy(f"{figure}_{form}")
        case _:
            found["problems"] = {
                name: [noisy(name) for _ in range(_NUM_PROBLEMS)] for name in PER_PROBLEM
            }
            found |= {name: sum(x) / len(x) for name, x in found["problems"].items()}
            found |= {name: noisy(name) for name in (*PER_SEED, "q3_share_first", "q3_kl_first")}
            if cell.num_probed and ("-" in cell.arm or cell.arm == "start"):
                found["choices"] = made_up_choices(cell)
    return found


def made_up_choices(cell: Cell) -> dict[str, Any]:
    """Of an untrained student every rule's; of an arm its own. Rules keep digits twice as often."""
    shares = {"tokens_kept": 0.2, "kl_kept": 0.5, "gradient_kept": 0.4}
    texts = {"a|": [10, 100], "7": [40, 100], "\n": [10, 100]}
    one = {**shares, "texts": texts, "before": {"": [10, 50], "7": [50, 250]}}
    if cell.arm != "start":
        return {"before": {**one, "kl_kept": 0.25}, "after": one}
    overlap = {a: {b: 1.0 if a == b else 0.3 for b in COMPARED_RULES} for a in COMPARED_RULES}
    return {"num_tokens": 300, "rules": dict.fromkeys(COMPARED_RULES, one), "overlap": overlap}


def all_records(design: Design, quality: Quality) -> dict[str, dict[str, Any]]:
    """Every cell of a design, as if finished."""
    work = [*tuning_cells(design), *cells(design, RATES)]
    return {cell.key: record(cell, quality) for cell in work}


def level(cell: Cell, name: str) -> float:
    """All arms alike, the tuned rate best; figures of the toys as the papers have them."""
    if cell.kind == "tune":
        return 0.5 if name == "mean" else 0.1 + (cell.learning_rate != RATE)
    world = {"entropy_start": 4.0, "entropy_renorm": 3.0, "forward_kl_renorm": 2.0, "flat": 5.0}
    world |= {"forward_kl_tail": 0.1, "forward_kl_start": 0.4, "soft_or": 20.0}
    return world.get(name, 0.0) if cell.kind in ("probe", "oscillation", "bias") else 0.5


def opposite(cell: Cell, name: str) -> float:
    """The toys against the papers."""
    if cell.kind == "probe":
        return 0.0 if name == "soft_or" else 20.0
    if cell.kind == "bias":
        worse = {"entropy_renorm": 5.0, "forward_kl_start": 4.0, "forward_kl_tail": 2.0}
        return worse.get(name, 1.0)
    return -level(cell, name)
