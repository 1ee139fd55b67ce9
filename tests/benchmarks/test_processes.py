"""The comparison of one process with several: what its figures are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import processes
from performance_page import page


def step(seconds: float, cpu: float) -> dict[str, Any]:
    phases = {"learn_s": seconds / 2}
    return {
        "step_s": seconds,
        "cpu_s": cpu,
        "phases_s": phases,
        "phases_cpu_s": {"learn_s": cpu / 2},
        "rows": 10,
        "loss": 0.5,
    }


def test_a_step_is_as_long_as_in_its_slowest_process_and_cpu_seconds_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {
        (1, "none"): [[step(4.0, 4.0), step(4.0, 4.0)]],
        (2, "none"): [[step(2.0, 1.5), step(2.5, 2.0)], [step(2.5, 3.0), step(2.0, 3.0)]],
    }
    monkeypatch.setattr(processes, "arm", lambda count, sharding, *_: runs[count, sharding])
    found = processes.compare(2, 3, 2, ["none"], [])
    assert found["one"]["speedup"] == found["one"]["cpu_ratio"] == 1
    assert found["none"]["speedup"] == 4 / 2.5
    assert found["none"]["cpu_ratio"] == 4.75 / 4
    assert found["none"]["phases_s"] == {"learn_s": 1.25}
    assert found["none"]["phases_cpu_s"] == {"learn_s": 4.75 / 2}
    assert found["none"]["step_s_of_all"] == [2.5] * 6
    assert len(processes.table(found).splitlines()) == 1 + 2 * 2
    record = {"processes": 2, "arms": found, "commit": "c", "date": "2026-01-01", "machine": {}}
    (tmp_path / "processes-2026-01-01.json").write_text(json.dumps(record))
    text = page(tmp_path, tmp_path)
    assert "| 2 processes, sharding none / one | ≥ 1.6 | 1.60 | yes |" in text
    assert "| 2, sharding none | 10 | 2.50 | 1.25 | 1.60 | 4.75 | 1.19 |" in text


def test_phases_of_a_step_are_counted_by_cpu_seconds() -> None:
    watch = processes.Watch()

    class Clock:
        pass

    def phase(clock: Any, name: str) -> Any:
        from contextlib import nullcontext

        return nullcontext()

    def take(step: int) -> dict[str, Any]:
        for name in ("learn", "learn", "rollout"):
            with watch.phase(phase, Clock(), name):
                sum(range(10_000))
        return {"seconds": {"learn_s": 1.0, "rollout_s": 1.0}, "num_rows": 3, "loss": 0.1}

    watch.take(take, 1)
    watch.take(take, 2)
    first, second = watch.steps
    assert first["phases_cpu_s"].keys() == second["phases_cpu_s"].keys() == {"learn_s", "rollout_s"}
    assert 0 < second["phases_cpu_s"]["learn_s"] <= second["cpu_s"]
    assert first["phases_cpu_s"] is not second["phases_cpu_s"]
