"""Short versions of the harnesses that kill, signal and damage whole runs.

Each runs in a process of its own, which forks: this one has computed and must not. None shares its
process, its folder or its end with another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from reliability.__main__ import HARNESSES
from reliability.record import ROOT

SLOW = pytest.mark.slow
"""The same promise for other kinds of runs, which have tests of their own of going on."""


def outcome_of(name: str) -> dict[str, Any]:
    """What a harness saw that held; it fails here where it did not."""
    done = subprocess.run(
        [sys.executable, "-m", "reliability", "--short", "--json", name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1, done.stdout + done.stderr
    outcome: dict[str, Any] = json.loads(lines[0])
    assert outcome["failures"] == 0, outcome["details"]
    assert outcome["trials"] == HARNESSES[name][0]
    assert all(seen > 0 for seen in outcome["control"].values())
    return outcome


@pytest.mark.parametrize(
    "name",
    [
        "kill",
        *(pytest.param(f"kill_{what}", marks=SLOW) for what in ("conversations", "stored", "grpo")),
        "signals",
        "crash",
        "corruption",
        "partition",
    ],
)
def test_the_promise_holds_and_the_detector_sees(name: str) -> None:
    outcome_of(name)


def test_a_disk_that_is_really_full_ends_a_run_that_goes_on_later() -> None:
    details = outcome_of("disk")["details"]
    assert not details["problems"]
    if details["mounting refused"]:
        pytest.skip(f"no tmpfs may be mounted here: {details['mounting refused']}")
    assert details["runs ended, by call"]["full disk"] == 1
