"""How often arms that are compared with themselves, under other seeds, are judged to differ."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from claims_design import Design
from claims_statistics import mean_interval
from claims_table import Record
from claims_verdicts import TESTS, Verdict

METRICS = ("mean", "pass", "entropy")
NUM_PAIRS = 300
"""Pairs of disjoint groups of cells, drawn for each arm and metric."""
WRONG: dict[str, tuple[Verdict, ...]] = {
    "beats": ("supported", "contradicted here"),
    "matches": ("contradicted here",),
}
"""Verdicts that are false of an arm and itself, by test."""
PROMISED = {"beats": 0.05, "matches": 0.025}
"""How often a 95 % interval yields them, at most."""


@dataclass(frozen=True)
class Pair:
    """A comparison of an arm with itself."""

    arm: str
    metric: str
    cells: frozenset[int]
    """Numbers of the cells that it uses; the same numbers are the same seeds in every arm."""
    verdicts: dict[str, Verdict]
    """By test."""

    def is_wrong(self, test: str) -> bool:
        return self.verdicts[test] in WRONG[test]


def controls(records: Sequence[Record], design: Design) -> dict[str, Any] | None:
    """Rates of false verdicts, by arm and metric and over all, as plain JSON values.

    None where not all of their cells were run.
    """
    size, settings = len(design.seeds), design.controls
    num_needed = settings.num_cells * len(settings.arms)
    if sum(record["kind"] == "control" for record in records) < num_needed:
        return None
    by_kind = {
        (arm, metric): compared(arm, metric, values[metric], size)
        for arm in settings.arms
        for values in [_of_arm(records, arm, design)]
        for metric in METRICS
    }
    everything = [pair for pairs in by_kind.values() for pair in pairs]
    return {
        "setting": settings.setting,
        "num_cells": settings.num_cells,
        "group_size": size,
        "num_pairs": len(everything),
        "num_disjoint_pairs": len(settings.arms) * (settings.num_cells // (2 * size)),
        "rows": [
            {"arm": arm, "metric": metric, **rates(pairs, settings.num_cells)}
            for (arm, metric), pairs in by_kind.items()
        ],
        "all": rates(everything, settings.num_cells),
    }


def _of_arm(records: Sequence[Record], arm: str, design: Design) -> dict[str, Tensor]:
    """Values `[cells, problems]` of an arm's controls by metric, in the order of their seeds."""
    mine = {r["seed"]: r for r in records if (r["kind"], r["arm"]) == ("control", arm)}
    rows = [mine[seed]["problems"] for seed in design.controls.seeds]
    return {m: torch.tensor([row[m] for row in rows], dtype=torch.float64) for m in METRICS}


def compared(arm: str, metric: str, values: Tensor, size: int) -> list[Pair]:
    """Random pairs of disjoint groups of `size` cells, judged as two arms would be.

    Args:
        arm: whose cells they are.
        metric: that is compared.
        values: `[cells, problems]`.
        size: cells of a group; as many as a comparison of the design has seeds.
    """
    rng = random.Random(f"{arm}/{metric}")
    pairs = []
    for _ in range(NUM_PAIRS):
        drawn = rng.sample(range(len(values)), 2 * size)
        interval = mean_interval(values[drawn[:size]] - values[drawn[size:]])
        verdicts = {test: TESTS[test](interval) for test in WRONG}
        pairs.append(Pair(arm, metric, frozenset(drawn), verdicts))
    return pairs


def rates(pairs: Sequence[Pair], num_cells: int) -> dict[str, Any]:
    """The share of false verdicts by test with its interval, and how often a match is confirmed."""
    found: dict[str, Any] = {
        test: share_with_interval([(pair.cells, pair.is_wrong(test)) for pair in pairs], num_cells)
        for test in WRONG
    }
    confirmed = sum(pair.verdicts["matches"] == "supported" for pair in pairs)
    return {**found, "matches_confirmed": confirmed / len(pairs)}


def share_with_interval(
    pairs: Sequence[tuple[frozenset[int], bool]], num_cells: int
) -> list[float]:
    """A share of pairs, which share cells, with its 95 % interval: [value, low, high].

    The infinitesimal jackknife for means over random subsets: a cell counts by how much more often
    the pairs that use it are wrong; what the number of pairs adds to that by chance is subtracted,
    and the chance in drawing pairs added. (A bootstrap over cells would put the same cell on both
    sides of a pair, or twice on one.) Cells of the same seed count as one over all arms.

    Source: Wager, Hastie and Efron 2014 (JMLR 15), for subsets without replacement.
    """
    wrong = torch.tensor([is_wrong for _, is_wrong in pairs], dtype=torch.float64)
    used = torch.zeros(len(pairs), num_cells, dtype=torch.float64)
    for row, (cells, _) in enumerate(pairs):
        used[row, list(cells)] = 1
    share, size = float(wrong.mean()), float(used.sum(1).mean())
    of_cells = (used - size / num_cells).T @ (wrong - share) / len(pairs)
    by_chance = share * (1 - share) / len(pairs)
    noise = size * (1 - size / num_cells) * by_chance
    scale = (num_cells - 1) / num_cells * (num_cells / (num_cells - size)) ** 2
    variance = max(scale * (float(of_cells.square().sum()) - noise), 0.0) + by_chance
    half = 1.96 * math.sqrt(variance)
    return [share, max(0.0, share - half), min(1.0, share + half)]
