"""Which evaluation is the best, and when a run ends by them."""

from __future__ import annotations

from typing import Any

import pytest

from tutelage.config.evaluation import IS_MORE_BETTER, StopWhenConfig
from tutelage.evaluation.best import Best, best_of, stop_reason

KL = "held_out_reverse_kl_nats"


def records(values: list[float | None], metric: str) -> list[dict[str, Any]]:
    """The student's evaluations at step 0, 10, 20 …, and one of the teacher."""
    unset: dict[str, Any] = dict.fromkeys(IS_MORE_BETTER)
    return [
        {"step": 0, "model": "teacher", **unset, metric: 0.9},
        *({"step": 10 * i, "model": "student", **unset, metric: v} for i, v in enumerate(values)),
    ]


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("mean_at_k", [0.8, 0.1, 0.3, 0.2], (20, 0.3)),
        ("pass_at_k", [0.0, 0.3, 0.3, None], (10, 0.3)),
        (KL, [0.1, 0.5, 0.2, 0.2], (20, 0.2)),
        (KL, [0.1, None], None),
        (KL, [0.1], None),
    ],
)
def test_the_best_is_the_first_of_equals_after_an_update(
    metric: str, values: list[float | None], best: tuple[int, float] | None
) -> None:
    found = best_of(records(values, metric), metric)
    assert found == (None if best is None else Best(metric, *best))


def test_only_steps_that_can_be_chosen_are() -> None:
    lines = records([0.0, 0.9, 0.4, 0.5], "mean_at_k")
    assert best_of(lines, "mean_at_k", {20, 30}) == Best("mean_at_k", 30, 0.5)
    assert best_of(lines, "mean_at_k", ()) is None


@pytest.mark.parametrize(
    ("metric", "settings", "values", "reason"),
    [
        ("mean_at_k", {"value": 0.5}, [0.9, 0.4], None),
        ("mean_at_k", {"value": 0.5}, [0.1, 0.4, 0.5], "reached 0.5 with 0.5 after step 20"),
        (KL, {"value": 0.5}, [0.1, 0.6], None),
        (KL, {"value": 0.5}, [0.9, 0.45], "reached 0.5 with 0.45 after step 10"),
        (KL, {"patience": 2}, [0.1, 0.6, 0.7], None),
        (KL, {"patience": 2}, [0.1, 0.6, 0.7, 0.6], "than 0.6 after step 10 in 2 evaluations"),
        (KL, {"patience": 2}, [0.1, 0.6, 0.7, 0.5, 0.6], None),
        ("pass_at_k", {"patience": 1}, [0.1, 0.6, None], "than 0.6 after step 10 in 1 evalu"),
        ("pass_at_k", {"patience": 1}, [0.1, None, None], None),
    ],
)
def test_a_run_ends_by_a_value_or_without_a_better_one(
    metric: Any, settings: dict[str, Any], values: list[float | None], reason: str | None
) -> None:
    found = stop_reason(records(values, metric), StopWhenConfig(metric, **settings))
    assert found is None if reason is None else reason in str(found)


def test_without_a_metric_nothing_ends() -> None:
    assert stop_reason(records([0.1, 0.2, 0.1, 0.1], KL), StopWhenConfig()) is None
