"""How often arms that are compared with themselves, under other seeds, are judged to differ.

Both a single comparison and a claim are tried: a claim is several arms against one baseline and one
verdict by `claims_verdicts.overall`. Baseline and arms are disjoint groups of one arm's cells.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from claims_design import Controls, Design
from claims_rules import CLAIMS
from claims_statistics import mean_interval
from claims_table import Record
from claims_verdicts import TESTS, Verdict, overall

METRICS = ("mean", "pass", "entropy")
NUM_DRAWS = 200
"""Baselines with their arms, drawn for each arm, metric and size of a group."""
NUM_COMPARISONS = (1, 2, 4)
"""Arms that are compared with one baseline."""
WRONG: dict[str, tuple[Verdict, ...]] = {
    "beats": ("supported", "contradicted here"),
    "matches": ("contradicted here",),
}
"""Verdicts that are false of an arm and itself, by test."""
ASKED = {
    test: {d.metric for claim in CLAIMS.values() for d in claim.differences if d.test == test}
    for test in WRONG
}
"""The metrics that claims are judged in, by test; no rate is over others."""
PROMISED = {"beats": 0.05, "matches": 0.025}
"""How often a 95 % interval of a single comparison yields them, at most."""


@dataclass(frozen=True)
class Trial:
    """A claim about an arm and itself: `num_comparisons` groups of cells against a baseline."""

    arm: str
    metric: str
    group_size: int
    num_comparisons: int
    cells: frozenset[int]
    """Numbers of the cells of all groups; the same numbers are the same seeds in every arm."""
    verdicts: dict[str, Verdict]
    """Of all comparisons together, by test."""

    def is_wrong(self, test: str) -> bool:
        return self.verdicts[test] in WRONG[test]


def controls(records: Sequence[Record], design: Design) -> list[dict[str, Any]]:
    """Rates of false verdicts as plain JSON values, one table for each of the design's controls.

    Controls that were not run with all of their cells are left out.
    """
    return [
        _table_of(settings, values, min(len(design.seeds), settings.num_cells // 2))
        for settings in design.controls
        if (values := _values(records, settings))
    ]


def _values(records: Sequence[Record], settings: Controls) -> dict[tuple[str, str], Tensor]:
    """Values `[cells, problems]` by arm and metric, cells in the order of their seeds.

    Empty where a cell was not run.
    """
    place = settings.setting
    mine = {
        (record["arm"], record["seed"]): record["problems"]
        for record in records
        if (record["kind"], record["setting"]) == ("control", place)
    }
    if not {(arm, seed) for arm in settings.arms for seed in settings.seeds} <= set(mine):
        return {}
    return {
        (arm, metric): torch.tensor(
            [mine[arm, seed][metric] for seed in settings.seeds], dtype=torch.float64
        )
        for arm in settings.arms
        for metric in METRICS
    }


def _table_of(
    settings: Controls, values: dict[tuple[str, str], Tensor], size: int
) -> dict[str, Any]:
    """Rates by number of comparisons: over all, and by arm and metric; groups have `size` cells."""
    by_kind: dict[int, list[Trial]] = {}
    for (arm, metric), of_arm in values.items():
        for trial in drawn(arm, metric, of_arm, size):
            by_kind.setdefault(trial.num_comparisons, []).append(trial)
    num_arms = len(settings.arms)

    def row(trials: Sequence[Trial], num_arms: int) -> dict[str, Any]:
        size, n = trials[0].group_size, trials[0].num_comparisons
        of_an_arm = settings.num_cells // ((1 + n) * size)
        num_disjoint = num_arms * of_an_arm
        found = {"group_size": size, "num_comparisons": n, "num_disjoint": num_disjoint}
        return {**found, **rates(trials, settings.num_cells, of_an_arm)}

    return {
        "setting": settings.setting,
        "num_cells": settings.num_cells,
        "num_draws": NUM_DRAWS,
        "all": [row(trials, num_arms) for trials in by_kind.values()],
        "rows": [
            {"arm": arm, "metric": metric, **row(mine, 1)}
            for arm, metric in values
            for trials in by_kind.values()
            for mine in [[t for t in trials if (t.arm, t.metric) == (arm, metric)]]
        ],
    }


def drawn(arm: str, metric: str, values: Tensor, size: int) -> list[Trial]:
    """Random disjoint groups of cells, judged as a baseline and arms that are compared with it.

    A draw has as many groups as the cells suffice for; the trials of fewer comparisons use the
    first of them.

    Args:
        arm: whose cells they are.
        metric: that is compared.
        values: `[cells, problems]`.
        size: cells of a group; as many as a comparison of the design has seeds.
    """
    rng = random.Random(f"{arm}/{metric}/{size}")
    numbers = [n for n in NUM_COMPARISONS if (1 + n) * size <= len(values)]
    trials = []
    for _ in range(NUM_DRAWS if numbers else 0):
        cells = rng.sample(range(len(values)), (1 + numbers[-1]) * size)
        baseline, *arms = (values[cells[i : i + size]] for i in range(0, len(cells), size))
        intervals = [mean_interval(group - baseline) for group in arms]
        for n in numbers:
            verdicts = {test: overall(map(TESTS[test], intervals[:n])) for test in WRONG}
            used = frozenset(cells[: (1 + n) * size])
            trials.append(Trial(arm, metric, size, n, used, verdicts))
    return trials


def rates(trials: Sequence[Trial], num_cells: int, num_disjoint: int) -> dict[str, Any]:
    """The share of false verdicts by test with its interval, and how often a match is confirmed.

    Each over the trials in a metric that claims ask that test of; None where there is none.
    """
    asked = {test: [t for t in trials if t.metric in ASKED[test]] for test in WRONG}
    found: dict[str, Any] = {
        test: share_with_interval(
            [(trial.cells, trial.is_wrong(test)) for trial in mine], num_cells, num_disjoint
        )
        if mine
        else None
        for test, mine in asked.items()
    }
    matched = [trial.verdicts["matches"] == "supported" for trial in asked["matches"]]
    return {**found, "matches_confirmed": sum(matched) / len(matched) if matched else None}


def share_with_interval(
    trials: Sequence[tuple[frozenset[int], bool]], num_cells: int, num_disjoint: int
) -> list[float]:
    """A share of trials, which share cells, with its 95 % interval: [value, low, high].

    The infinitesimal jackknife for means over random subsets: a cell counts by how much more often
    the trials that use it are wrong; what the number of trials adds to that by chance is
    subtracted, and the chance in drawing trials added. (A bootstrap over cells would put the same
    cell on both sides of a comparison, or twice on one.) Cells of the same seed count as one over
    all arms.

    At a share of 0 or 1 nothing varies: the interval is the exact binomial one (Clopper and
    Pearson) of `num_disjoint` independent trials, as many as share no cell. A share strictly
    between them, of trials that use all cells, has the interval [0, 1].

    Source: Wager, Hastie and Efron 2014 (JMLR 15), for subsets without replacement.

    Args:
        trials: the cells of each, and whether its verdict is false.
        num_cells: cells that they were drawn from.
        num_disjoint: trials of these sizes, of one arm, that share no cell; those of other arms
            have the same seeds.
    """
    wrong = torch.tensor([is_wrong for _, is_wrong in trials], dtype=torch.float64)
    used = torch.zeros(len(trials), num_cells, dtype=torch.float64)
    for row, (cells, _) in enumerate(trials):
        used[row, list(cells)] = 1
    share, size = float(wrong.mean()), float(used.sum(1).mean())
    if share in (0.0, 1.0):
        tail = 0.025 ** (1 / num_disjoint)
        return [0.0, 0.0, 1 - tail] if share == 0.0 else [1.0, tail, 1.0]
    if size == num_cells:
        return [share, 0.0, 1.0]
    of_cells = (used - size / num_cells).T @ (wrong - share) / len(trials)
    by_chance = share * (1 - share) / len(trials)
    noise = size * (1 - size / num_cells) * by_chance
    scale = (num_cells - 1) / num_cells * (num_cells / (num_cells - size)) ** 2
    variance = max(scale * (float(of_cells.square().sum()) - noise), 0.0) + by_chance
    half = 1.96 * math.sqrt(variance)
    return [share, max(0.0, share - half), min(1.0, share + half)]
