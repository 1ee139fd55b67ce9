"""What a snapshot costs, from the seconds of short runs with and without one a step."""

from __future__ import annotations

import pytest

from recording import figures, planned


def test_the_cost_is_the_ratio_of_two_runs_at_the_configured_rate() -> None:
    off = {"wall_s": 2.0, "cpu_s": 4.0}
    pairs = [{0: off, 1: {"wall_s": 2.0 + extra, "cpu_s": 5.0}} for extra in (1.0, 0.5, 3.0)]
    found = figures(pairs, 3 / 60)
    assert found["snapshot_in_steps_wall"] == [0.25, 0.5, 1.5]
    assert found["extra_share_wall"] == pytest.approx([0.0125, 0.025, 0.075])
    assert found["snapshot_in_steps_cpu"] == [0.25, 0.25, 0.25]


@pytest.mark.parametrize(("num_steps", "every", "expected"), [(60, 30, 3), (61, 30, 4), (5, 9, 2)])
def test_snapshots_before_the_first_step_and_after_the_last(
    num_steps: int, every: int, expected: int
) -> None:
    assert planned(num_steps, every) == expected
