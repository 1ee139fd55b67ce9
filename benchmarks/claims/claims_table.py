"""Records of cells as tables of numbers, and what is published of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from claims_arms import BASELINES, TUNED, loss_of, random_arm
from claims_design import Design, Rates
from claims_probe import SCORES
from claims_statistics import CORRELATIONS, correlation_intervals, mean_interval, within
from tutelage.evaluation.metrics import Interval

Record = dict[str, Any]

PER_PROBLEM = (
    *("mean", "pass", "hidden_mean", "hidden_pass", "distinct"),
    *("reverse_kl", "forward_kl", "high_forward_kl", "entropy"),
)
SHARES = ("mean", "pass", "hidden_mean", "hidden_pass", "kl_kept", "q3_kept_first")
PER_SEED = ("tokens_trained", "kl_kept", "q3_kept_first")


class Table:
    """The finished cells of one design, each setting at one learning rate."""

    def __init__(self, records: Iterable[Record], seeds: Sequence[int], rates: Rates) -> None:
        self.seeds = tuple(seeds)
        """Seeds that every arm has to have; at some rates arms have more."""
        self._arms: dict[tuple[str, str], dict[int, Record]] = {}
        self._others: dict[str, dict[int, Record]] = {}
        for record in records:
            if record["kind"] not in ("arm", "tune", "control"):
                self._others.setdefault(record["kind"], {})[record["seed"]] = record
            elif (
                record["kind"] == "arm"
                and record["learning_rate"] == rates[record["setting"]][loss_of(record["arm"])]
            ):
                arm = self._arms.setdefault((record["setting"], record["arm"]), {})
                arm[record["seed"]] = record

    @property
    def probe_seeds(self) -> tuple[int, ...]:
        """Seeds of the measurements without arms."""
        return tuple(sorted(self._others["probe"]))

    def has(self, setting: str, *arms: str) -> bool:
        """Whether these arms are there with every seed that all arms have to have."""
        return all(set(self.seeds) <= set(self._arms.get((setting, arm), ())) for arm in arms)

    def seeds_of(self, setting: str, *arms: str) -> tuple[int, ...]:
        """Seeds that all of these arms have; `KeyError` if one lacks a seed it has to have."""
        if not self.has(setting, *arms):
            raise KeyError(f"{setting}: {', '.join(arms)} lack seeds or are missing")
        found = [set(self._arms[setting, arm]) for arm in arms]
        return tuple(sorted(set.intersection(*found)))

    def has_metric(self, setting: str, arm: str, metric: str) -> bool:
        """Whether a metric is defined in a setting; a task may have no hidden starts."""
        record = self._arms[setting, arm][self.seeds[0]]
        return metric in record or metric in record["problems"]

    def values(self, setting: str, arm: str, metric: str, seeds: Sequence[int]) -> Tensor:
        """One number a seed and problem `[S, P]`, or a seed `[S, 1]` for what has no problems."""
        records = [self._arms[setting, arm][seed] for seed in seeds]
        if metric in PER_PROBLEM:
            return torch.tensor([r["problems"][metric] for r in records], dtype=torch.float64)
        return torch.tensor([[r[metric]] for r in records], dtype=torch.float64)

    def interval(self, setting: str, arm: str, metric: str) -> Interval:
        """Mean over seeds and problems; the interval of a share stays in [0, 1]."""
        found = mean_interval(self.values(setting, arm, metric, self.seeds_of(setting, arm)))
        return within(found) if metric in SHARES else found

    def difference(self, setting: str, a: str, b: str, metric: str) -> Interval:
        """Mean of a − b, paired by seed and problem, over all seeds that both arms have."""
        seeds = self.seeds_of(setting, a, b)
        left, right = (self.values(setting, arm, metric, seeds) for arm in (a, b))
        return mean_interval(left - right)

    def seedwise(self, kind: str, name: str) -> Tensor:
        """One number a seed of a measurement without arms, `[S, 1]`."""
        found = [[record[name]] for _, record in sorted(self._others[kind].items())]
        return torch.tensor(found, dtype=torch.float64)

    def probed(self, name: str) -> Tensor:
        """A value of every probed token, one row a seed: `[S, T]`."""
        found = [record["tokens"][name] for _, record in sorted(self._others["probe"].items())]
        return torch.tensor(found, dtype=torch.float64)


def as_list(interval: Interval) -> list[float]:
    """Value, low, high."""
    return [interval.value, interval.low, interval.high]


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
    found: dict[str, Any] = {
        m: as_list(table.interval(setting, arm, m))
        for m in (*PER_PROBLEM, *(() if arm in BASELINES else PER_SEED))
        if table.has_metric(setting, arm, m)
    }
    all_tokens = TUNED[loss_of(arm)]
    others = {"minus_start": "start", "minus_all": all_tokens, "minus_random": random_arm(arm)}
    for name, other in others.items():
        if arm not in (*BASELINES, other) and other is not None and table.has(setting, other):
            found[name] = {"mean": as_list(table.difference(setting, arm, other, "mean"))}
    return found


def correlations(table: Table) -> dict[str, Any]:
    """Correlation of each score with what a token is worth, over all probed tokens."""
    scores = {rule: table.probed(rule) for rule in SCORES}
    found: dict[str, Any] = {"num_tokens": table.probed("decrease").numel()}
    for target in ("decrease", "gradient"):
        for kind in CORRELATIONS:
            whole, gaps = correlation_intervals(scores, table.probed(target), kind)
            found[f"{target}_{kind}"] = {
                "score": {rule: as_list(i) for rule, i in whole.items()},
                "soft_or_minus": {rule: as_list(i) for rule, i in gaps.items()},
            }
    quadrant, decrease = table.probed("quadrant"), table.probed("decrease")
    found["quadrants"] = {
        f"q{n}": {
            "num_tokens": int((quadrant == n).sum()),
            "mean_decrease": float(decrease[quadrant == n].sum())
            / max(int((quadrant == n).sum()), 1),
        }
        for n in (1, 2, 3, 4)
    }
    return found
