"""Records of cells as tables of numbers, and what is published of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from claims_design import BASELINES, RULES, SETTINGS, Design
from claims_probe import SCORES
from claims_statistics import CORRELATIONS, correlation_intervals, mean_interval
from tutelage.evaluation.metrics import Interval

Record = dict[str, Any]

PER_PROBLEM = (
    *("mean", "pass", "hidden_mean", "hidden_pass", "distinct"),
    *("reverse_kl", "forward_kl", "high_forward_kl", "entropy"),
)
SHARES = ("mean", "pass", "hidden_mean", "hidden_pass", "kl_kept", "q3_kept_first")
PER_SEED = ("tokens_trained", "kl_kept", "q3_kept_first")
WITH_RANDOM_CONTROL = (*(rule for rule in RULES if rule != "random"), "bottom")
"""Rules whose arms have a random arm of the same budget beside them."""


class Table:
    """The finished cells of one design, at one shared learning rate."""

    def __init__(self, records: Iterable[Record], seeds: Sequence[int], learning_rate: float):
        self.seeds = tuple(seeds)
        self.learning_rate = learning_rate
        self._arms: dict[tuple[str, str, int], Record] = {}
        self._others: dict[tuple[str, int], Record] = {}
        for record in records:
            if record["kind"] == "arm":
                if (
                    record["learning_rate"]
                    == learning_rate * SETTINGS[record["setting"]].rate_scale
                ):
                    self._arms[record["setting"], record["arm"], record["seed"]] = record
            elif record["kind"] != "tune":
                self._others[record["kind"], record["seed"]] = record

    def has(self, setting: str, *arms: str) -> bool:
        """Whether every seed of these arms is there."""
        return all((setting, arm, seed) in self._arms for arm in arms for seed in self.seeds)

    def values(self, setting: str, arm: str, metric: str) -> Tensor:
        """One number a seed and problem `[S, P]`, or a seed `[S, 1]` for what has no problems."""
        records = [self._arms[setting, arm, seed] for seed in self.seeds]
        if metric in PER_PROBLEM:
            return torch.tensor([r["problems"][metric] for r in records], dtype=torch.float64)
        return torch.tensor([[r[metric]] for r in records], dtype=torch.float64)

    def interval(self, setting: str, arm: str, metric: str) -> Interval:
        """Mean over seeds and problems; the stretched interval of a share stays in [0, 1]."""
        found = mean_interval(self.values(setting, arm, metric))
        if metric not in SHARES:
            return found
        return Interval(found.value, max(0.0, found.low), min(1.0, found.high))

    def difference(self, setting: str, a: str, b: str, metric: str) -> Interval:
        """Mean of a − b, paired by seed and problem."""
        return mean_interval(self.values(setting, a, metric) - self.values(setting, b, metric))

    def seedwise(self, kind: str, name: str) -> Tensor:
        """One number a seed of a measurement without arms, `[S, 1]`."""
        found = [[self._others[kind, seed][name]] for seed in self.seeds]
        return torch.tensor(found, dtype=torch.float64)

    def probed(self, name: str) -> list[float]:
        """A value of every probed token of all seeds."""
        records = [self._others["probe", seed] for seed in self.seeds]
        return [value for record in records for value in record["tokens"][name]]


def as_list(interval: Interval) -> list[float]:
    """Value, low, high."""
    return [interval.value, interval.low, interval.high]


def random_arm(arm: str) -> str | None:
    """The random control with the same budget; None where an arm has none."""
    rule, _, percent = arm.partition("-")
    return f"random-{percent}" if rule in WITH_RANDOM_CONTROL and "+" not in arm else None


def summary(table: Table, design: Design) -> dict[str, dict[str, Any]]:
    """Every arm's figures, and its differences to all tokens and to random tokens."""
    return {
        setting: {
            arm: _summary_of_arm(table, setting, arm)
            for arm in (*BASELINES, *arms)
            if table.has(setting, arm)
        }
        for setting, arms in design.arms.items()
    }


def _summary_of_arm(table: Table, setting: str, arm: str) -> dict[str, Any]:
    metrics = PER_PROBLEM if arm in BASELINES else (*PER_PROBLEM, *PER_SEED)
    found: dict[str, Any] = {m: as_list(table.interval(setting, arm, m)) for m in metrics}
    for name, other in (("minus_all", "all"), ("minus_random", random_arm(arm))):
        if arm not in (*BASELINES, other) and other is not None and table.has(setting, other):
            found[name] = {
                m: as_list(table.difference(setting, arm, other, m)) for m in PER_PROBLEM
            }
    return found


def correlations(table: Table) -> dict[str, Any]:
    """Correlation of each score with what a token is worth, over all probed tokens."""
    found: dict[str, Any] = {"num_tokens": len(table.probed("decrease"))}
    scores: dict[str, Sequence[float]] = {rule: table.probed(rule) for rule in SCORES}
    for target in ("decrease", "gradient"):
        for kind in CORRELATIONS:
            whole, gaps = correlation_intervals(scores, table.probed(target), kind)
            found[f"{target}_{kind}"] = {
                "score": {rule: as_list(i) for rule, i in whole.items()},
                "soft_or_minus": {rule: as_list(i) for rule, i in gaps.items()},
            }
    quadrant = torch.tensor(table.probed("quadrant"))
    decrease = torch.tensor(table.probed("decrease"), dtype=torch.float64)
    found["quadrants"] = {
        f"q{n}": {
            "num_tokens": int((quadrant == n).sum()),
            "mean_decrease": float(decrease[quadrant == n].sum())
            / max(int((quadrant == n).sum()), 1),
        }
        for n in (1, 2, 3, 4)
    }
    return found
