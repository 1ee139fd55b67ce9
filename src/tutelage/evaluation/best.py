"""The best of a run's evaluations, and whether they say to stop before the last step."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.config.evaluation import IS_MORE_BETTER, StopWhenConfig

Record = dict[str, Any]


@dataclass(frozen=True)
class Best:
    """An evaluation of the student that no other is better than."""

    metric: str
    step: int
    value: float

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.4g} after step {self.step}"


def _values(records: Sequence[Record], metric: str) -> list[tuple[int, float | None]]:
    """Step and number of the student's evaluations after the first update, in order."""
    students = (r for r in records if r["model"] == "student" and r["step"] > 0)
    return sorted((record["step"], record[metric]) for record in students)


def _is_better(metric: str, value: float, other: float) -> bool:
    return value > other if IS_MORE_BETTER[metric] else value < other


def best_of(
    records: Sequence[Record], metric: str, among: Container[int] | None = None
) -> Best | None:
    """The best evaluation after the first update, of equals the first; None without any.

    Args:
        records: of `evaluation.jsonl`.
        metric: a key of `IS_MORE_BETTER`.
        among: steps to choose from; None for all.
    """
    best: Best | None = None
    for step, value in _values(records, metric):
        if value is None or (among is not None and step not in among):
            continue
        if best is None or _is_better(metric, value, best.value):
            best = Best(metric, step, value)
    return best


def stop_reason(records: Sequence[Record], settings: StopWhenConfig) -> str | None:
    """Why a run ends with its last evaluation; None where it goes on.

    Args:
        records: of `evaluation.jsonl`.
        settings: when to stop.
    """
    metric = settings.metric
    if metric == "none":
        return None
    values = _values(records, metric)
    best = best_of(records, metric)
    if best is None:
        return None
    step, last = values[-1]
    goal = settings.value
    if goal is not None and last is not None and not _is_better(metric, goal, last):
        return f"{metric} reached {goal:g} with {last:.4g} after step {step}"
    since = sum(later > best.step for later, _ in values)
    if settings.patience and since >= settings.patience:
        found = f"{best.value:.4g} after step {best.step}"
        return f"no better {metric} than {found} in {since} evaluations"
    return None
