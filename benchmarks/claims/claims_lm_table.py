"""Cells of a real language model as tables of numbers, verdicts, controls and power."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from scipy import optimize, stats
from torch import Tensor

from claims_lm_design import CONTROL_OFFSET, SCALES, Scale
from claims_lm_rules import CLAIMS, CONTROLS, LOSSES, METRICS, TUNED, Difference, loss_of
from claims_statistics import mean_interval, within
from claims_verdicts import TESTS, Comparison, obstacle, overall
from tutelage.evaluation.metrics import Interval

Record = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Cells of one task, size, kind of device and pair, under one loss."""

    task: str
    scale: Scale
    device: str
    loss: str
    records: dict[tuple[str, str, int], Record]
    """By loss, arm and seed."""

    @property
    def name(self) -> str:
        return f"{self.task}, {self.loss} loss ({self.scale.name})"

    def seeds_of(self, *arms: str, offset: int = 0) -> tuple[int, ...]:
        """Seeds of the comparison that all of these arms have."""
        return tuple(
            seed
            for seed in self.scale.seeds
            if all((self.loss_of(arm), arm, seed + offset) in self.records for arm in arms)
        )

    def loss_of(self, arm: str) -> str:
        """The loss under which an arm's cells are kept."""
        return "exact" if arm in ("start", "teacher") else loss_of(arm, self.loss)

    def values(self, arm: str, metric: str, seeds: Sequence[int]) -> Tensor:
        """One number a seed and problem, `[S, P]`."""
        rows = [self.records[self.loss_of(arm), arm, seed]["problems"][metric] for seed in seeds]
        return torch.tensor(rows, dtype=torch.float64)

    def interval(self, arm: str, metric: str) -> Interval | None:
        """Mean over the seeds and problems; without an interval (infinite) from one seed."""
        seeds = self.seeds_of(arm)
        if not seeds or not self.records[self.loss_of(arm), arm, seeds[0]]["problems"][metric]:
            return None
        return self._interval(self.values(arm, metric, seeds))

    def difference(self, a: str, b: str, metric: str) -> tuple[Interval | None, int]:
        """Mean of a − b, paired by seed and problem, and over how many seeds."""
        seeds = self.seeds_of(a, b)
        if not seeds:
            return None, 0
        gap = self.values(a, metric, seeds) - self.values(b, metric, seeds)
        return (self._interval(gap) if gap.numel() else None), len(seeds)

    def seed_gaps(self, a: str, b: str, metric: str) -> list[float]:
        """Mean of a − b of every seed that both have."""
        seeds = self.seeds_of(a, b)
        if not seeds:
            return []
        gap = self.values(a, metric, seeds) - self.values(b, metric, seeds)
        return [float(x) for x in gap.mean(1)]

    @property
    def arms(self) -> list[str]:
        """Arms with a seed of the comparison, in the order of the rules."""
        return [arm for arm in self.scale.arms if self.seeds_of(arm)]

    def _interval(self, values: Tensor) -> Interval:
        """As `mean_interval`; one seed says nothing of what another one would give."""
        level = self.scale.level
        if len(values) == 1:
            return Interval(float(values.mean()), -math.inf, math.inf, level)
        return mean_interval(values, level)


Place = tuple[str, str, str, str]
"""Task, size, kind of device, and digest of the pair."""


def place_of(record: Record) -> Place:
    """What cells have to have in common to be compared."""
    device, pair = record["key"].split("/")[-2:]
    return record["task"], record["scale"], device, pair


def places(records: Iterable[Record]) -> list[Place]:
    """Every task, size and device, with the pair that most of its cells are of."""
    counts = Counter(place_of(record) for record in records)
    found: dict[tuple[str, ...], Place] = {}
    for place, _ in counts.most_common():
        found.setdefault(place[:3], place)
    return sorted(found.values())


def tuned(records: Iterable[Record], place: Place) -> dict[str, dict[str, Any]]:
    """By loss: the chosen rate, and the grid of the arm that the loss is tuned on.

    All tokens take the rate with the lowest held-out reverse KL; an arm without a teacher the one
    with the highest accuracy. The lowest of equal rates. A loss whose grid is not complete is left
    out.
    """
    scale, found = SCALES[place[1]], {}
    mine = [r for r in records if r["kind"] == "tune" and place_of(r) == place]
    for loss, arm in TUNED.items():
        figure, sign = ("mean", -1) if loss == "own" else ("reverse_kl", 1)
        grid = {}
        for rate in sorted(scale.grid):
            cells = [r for r in mine if (r["loss"], r["arm"], r["rate"]) == (loss, arm, rate)]
            if len({r["seed"] for r in cells}) == len(scale.tuning_seeds):
                grid[rate] = fmean(r[figure] for r in cells)
        if len(grid) == len(scale.grid):
            found[loss] = {
                "chosen": min(grid, key=lambda rate: sign * grid[rate]),
                "figure": figure,
                "grid": {f"{rate:g}": value for rate, value in grid.items()},
            }
    return found


def rates_of(tuning: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The chosen rate of each loss."""
    return {loss: entry["chosen"] for loss, entry in tuning.items()}


def tables(records: Sequence[Record]) -> list[Table]:
    """One table a task, size, device and loss, of the cells at the chosen rates."""
    found = []
    for place in places(records):
        rates = rates_of(tuned(records, place)) | {"start": 0.0, "teacher": 0.0}
        mine = {
            (r["loss"], r["arm"], r["seed"]): r
            for r in records
            if r["kind"] == "arm"
            and place_of(r) == place
            and r["rate"] == rates.get(r["arm"], rates.get(r["loss"]))
        }
        task, scale, device, _ = place
        losses = [
            loss for loss in LOSSES if any(key[0] == loss and key[1] == "all" for key in mine)
        ]
        found += [Table(task, SCALES[scale], device, loss, mine) for loss in losses]
    return found


def judge(table: Table) -> dict[str, dict[str, Any]]:
    """Every claim with its verdict in one setting; None where something of it was not run."""
    judged = {}
    for name, claim in CLAIMS.items():
        parts = [_compare(table, d) for d in claim.differences]
        beside = [part for part in (_compare(table, d) for d in claim.beside) if part]
        whole = [part for part in parts if part is not None]
        seeds = len(table.scale.seeds)
        is_whole = (
            len(whole) == len(parts)
            and all(part.num_seeds == seeds for part in whole)
            and len(table.seeds_of("all", "start")) == seeds  # what there is to lose
        )
        judged[name] = {
            "verdict": overall(part.verdict for part in whole) if is_whole else None,
            "comparisons": [part.as_table() for part in whole],
            "beside": [part.as_table() for part in beside],
        }
    return judged


def _compare(table: Table, d: Difference) -> Comparison | None:
    interval, count = table.difference(d.a, d.b, d.metric)
    level = table.interval(d.b, d.metric)
    if interval is None or level is None or count < 2:
        return None
    verdict = TESTS[d.test](interval)
    why = obstacle(d.test, d.metric, verdict, gain(table, d.metric), level.value)
    return Comparison(d.label, d.unit, d.test, interval, count, obstacle=why)


def gain(table: Table, metric: str = "mean") -> Interval | None:
    """What all tokens gain over the start with the setting's loss; None where that was not run."""
    return table.difference("all", "start", metric)[0]


def controls(table: Table) -> list[dict[str, Any]]:
    """The A/A pairs: the same arm under two sets of seeds, judged as every difference is."""
    found: list[dict[str, Any]] = []
    for arm in CONTROLS if table.loss == "exact" else ():
        again = table.seeds_of(arm, offset=CONTROL_OFFSET)
        seeds = [seed for seed in table.seeds_of(arm) if seed in again]
        if len(seeds) < 2:
            continue
        others = [seed + CONTROL_OFFSET for seed in seeds]
        for metric in ("mean", "reverse_kl"):
            one, other = (table.values(arm, metric, s) for s in (seeds, others))
            gap = mean_interval(one - other, table.scale.level)
            found.append(
                {
                    "arm": arm,
                    "metric": METRICS[metric][0],
                    "unit": METRICS[metric][1],
                    "interval": as_list(gap),
                    "num_seeds": len(seeds),
                    "is_false_positive": gap.low > 0 or gap.high < 0,
                }
            )
    return found


def power(table: Table) -> dict[str, Any] | None:
    """The smallest true difference from all tokens that this design finds in four of five cases.

    From the standard deviation over seeds of the paired differences, pooled over the arms, for
    Student's t over the seeds. Beside it the median half-width of the verdicts' intervals.
    """
    found: dict[str, Any] = {}
    for metric in ("mean", "reverse_kl"):
        gaps = {a: table.seed_gaps(a, "all", metric) for a in table.arms if a != "all"}
        gaps = {arm: values for arm, values in gaps.items() if len(values) > 1}
        if not gaps:
            return None
        variances = [float(torch.tensor(values).double().var()) for values in gaps.values()]
        seeds = min(len(values) for values in gaps.values())
        sd = math.sqrt(fmean(variances))
        found[metric] = {
            "unit": METRICS[metric][1],
            "num_arms": len(gaps),
            "num_seeds": seeds,
            "paired_sd": sd,
            "detectable": detectable(table.scale.level, seeds) * sd / math.sqrt(seeds),
            "half_width": median(_half_width(table, arm, metric) for arm in gaps),
        }
    return found


def detectable(level: float, num_seeds: int) -> float:
    """Standard errors of a true difference whose t-interval excludes 0 in four of five cases."""
    freedom = num_seeds - 1
    reach = stats.t.ppf((1 + level) / 2, freedom)

    def lacks(size: float) -> float:
        """Of 80 %: the square of a noncentral t has a noncentral F distribution."""
        return 0.8 - float(stats.ncf.sf(reach**2, 1, freedom, size**2))

    return float(optimize.brentq(lacks, 0.0, 2 * reach))


def _half_width(table: Table, arm: str, metric: str) -> float:
    interval, _ = table.difference(arm, "all", metric)
    assert interval is not None
    return (interval.high - interval.low) / 2


def summary(table: Table) -> dict[str, Any]:
    """Figures of every arm of a setting, and its differences from all tokens."""
    found: dict[str, Any] = {}
    for arm in ("start", "teacher", *table.arms):
        seeds = table.seeds_of(arm)
        if not seeds:
            continue
        mine = [table.records[table.loss_of(arm), arm, seed] for seed in seeds]
        row: dict[str, Any] = {"num_seeds": len(seeds)}
        for metric in METRICS:
            interval = table.interval(arm, metric)
            is_share = METRICS[metric][1] == "points"
            row[metric] = as_list(within(interval) if interval and is_share else interval)
        if arm not in ("all", "start", "teacher"):
            row["minus_all"] = {m: as_list(table.difference(arm, "all", m)[0]) for m in METRICS}
        for name in ("tokens_trained", "tokens_sampled", "kl_kept"):
            numbers = [record[name] for record in mine if record.get(name) is not None]
            row[name] = fmean(numbers) if numbers else None
        row["seconds"] = fmean(r["train_s"] + r["measure_s"] for r in mine)
        found[arm] = row
    return found


def as_list(interval: Interval | None) -> list[float | None] | None:
    """Value, low, high; without bounds where there are none."""
    if interval is None:
        return None
    bounds = [x if math.isfinite(x) else None for x in (interval.low, interval.high)]
    return [interval.value, *bounds]
