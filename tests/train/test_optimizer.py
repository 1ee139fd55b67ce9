"""The course of the learning rate."""

from __future__ import annotations

import math
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.config.models import OptimizerConfig
from tutelage.train.optimizer import learning_rate

SCHEDULES = st.sampled_from(["constant", "linear", "cosine"])


def course(
    schedule: Literal["constant", "linear", "cosine"], warmup: int, steps: int
) -> list[float]:
    config = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=warmup)
    return [learning_rate(config, step, steps) for step in range(1, steps + 1)]


@given(schedule=SCHEDULES, warmup=st.integers(0, 20), steps=st.integers(1, 40))
def test_rises_to_the_peak_and_never_leaves_zero_to_peak(
    schedule: Literal["constant", "linear", "cosine"], warmup: int, steps: int
) -> None:
    rates = course(schedule, warmup, steps)
    assert all(0 < rate <= 2.0 for rate in rates)
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == pytest.approx([2.0 * (i + 1) / warmup for i in range(len(rising))])
    assert falling == sorted(falling, reverse=True)
    if falling:
        assert falling[0] == 2.0


def test_known_courses() -> None:
    assert course("constant", 2, 4) == [1.0, 2.0, 2.0, 2.0]
    assert course("linear", 0, 4) == [2.0, 1.5, 1.0, 0.5]
    half = math.sqrt(0.5)
    assert course("cosine", 0, 4) == pytest.approx([2.0, 1 + half, 1.0, 1 - half])
