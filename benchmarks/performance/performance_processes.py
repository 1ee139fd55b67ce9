"""The part of docs/results/performance.md about several processes, from published JSON alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from performance_gpu import table

GOAL = 1.6
"""Times one process that two have to be, on as many cores without other work."""


def processes_table(record: dict[str, Any]) -> str:
    """Seconds of a step, its phases in the slowest process, and CPU seconds of all processes."""
    rows, arms = [], record["arms"]
    phases = list(arms["one"]["phases_s"])
    for name, arm in arms.items():
        who = "one process" if name == "one" else f"{record['processes']}, sharding {name}"
        spent = [f"{arm['phases_s'].get(phase, 0.0):.2f}" for phase in phases]
        ratios = [f"{arm['speedup']:.2f}", f"{arm['cpu_s']:.2f}", f"{arm['cpu_ratio']:.2f}"]
        rows.append([who, f"{arm['rows']:,.0f}", f"{arm['step_s']:.2f}", *spent, *ratios])
    names = [f"{phase.removesuffix('_s')} s" for phase in phases]
    header = ["", "rows", "step s", *names, "× one", "CPU s of all", "× one's"]
    return table(header, rows)


def processes_goals(record: dict[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """What was aimed at: how many times as fast as one process."""
    for name, arm in record["arms"].items():
        if name != "one":
            yield f"{record['processes']} processes, sharding {name} / one", GOAL, arm["speedup"]
