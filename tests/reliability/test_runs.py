"""Short versions of the harnesses that kill, signal and damage whole runs.

Each runs in a process of its own, which forks: this one has computed and must not. None shares its
process, its folder or its end with another.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import reliability.__main__
from ranks import run_script_alone
from reliability import partition
from reliability.__main__ import HARNESSES

SLOW = pytest.mark.slow
"""The same promise for other kinds of runs, which have tests of their own of going on."""


def outcome_of(name: str) -> dict[str, Any]:
    """What a harness saw that held; it fails here where it did not."""
    done = run_script_alone(Path(reliability.__main__.__file__), ["--short", "--json", name])
    lines = [line for line in done.said.splitlines() if line.startswith("{")]
    assert len(lines) == 1, done.said
    outcome: dict[str, Any] = json.loads(lines[0])
    check(name, outcome)
    return outcome


def check(name: str, outcome: dict[str, Any]) -> None:
    """Whether all held, and the control saw something."""
    assert outcome["failures"] == 0, outcome["details"]
    assert outcome["trials"] == HARNESSES[name][0]
    assert all(seen > 0 for seen in outcome["control"].values())


@pytest.mark.parametrize(
    "name",
    [
        "kill",
        *(pytest.param(f"kill_{what}", marks=SLOW) for what in ("conversations", "stored", "grpo")),
        "signals",
        "crash",
        "corruption",
    ],
)
def test_the_promise_holds_and_the_detector_sees(name: str) -> None:
    outcome_of(name)


def test_gradients_do_not_depend_on_how_a_batch_is_shared_out() -> None:
    """The harness itself starts ranks, and only looks at what they wrote."""
    check("partition", partition.run(HARNESSES["partition"][0]).table())


def test_a_disk_that_is_really_full_ends_a_run_that_goes_on_later() -> None:
    details = outcome_of("disk")["details"]
    assert not details["problems"]
    if details["mounting refused"]:
        pytest.skip(f"no tmpfs may be mounted here: {details['mounting refused']}")
    assert details["runs ended, by call"]["full disk"] == 1
