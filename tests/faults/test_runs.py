"""Short versions of the harnesses that kill, signal and damage whole runs.

They run in a process of their own, which forks: this one has computed and must not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from .__main__ import HARNESSES
from .record import ROOT

NAMES = ("kill", "signals", "crash", "corruption", "disk", "partition")


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", "--short", "--json", *NAMES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(NAMES), done.stdout + done.stderr
    return dict(zip(NAMES, map(json.loads, lines), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_promise_holds_and_the_detector_sees(outcomes: dict[str, Any], name: str) -> None:
    outcome = outcomes[name]
    assert outcome["failures"] == 0, outcome["details"]
    assert outcome["trials"] == HARNESSES[name][0]
    assert all(seen > 0 for seen in outcome["control"].values())


def test_a_disk_that_is_really_full_ends_a_run_that_goes_on_later(
    outcomes: dict[str, Any],
) -> None:
    details = outcomes["disk"]["details"]
    if details["mounting refused"]:
        pytest.skip(f"no tmpfs may be mounted here: {details['mounting refused']}")
    assert details["runs ended, by call"]["full disk"] == 1
    assert not details["problems"]
