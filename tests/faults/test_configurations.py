"""A short version of the harness of random configurations, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from .__main__ import HARNESSES
from .record import ROOT


def test_what_check_accepts_train_can_do() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", "--short", "--json", "configurations"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stdout + done.stderr
    outcome = json.loads(lines[-1])
    assert outcome["failures"] == 0, outcome["details"]
    assert outcome["trials"] == HARNESSES["configurations"][0]
    assert outcome["details"]["accepted"] > 10
    assert all(seen > 0 for seen in outcome["control"].values())
