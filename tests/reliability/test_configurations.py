"""A short version of the harness of random configurations, in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import reliability.__main__
from ranks import run_script_alone
from reliability import config_values
from reliability.__main__ import HARNESSES
from reliability.config_values import LABELS, VALUES, forgotten
from reliability.configurations import LEAST_EACH, Trial, shortfalls


def test_every_key_of_a_configuration_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert forgotten() == []
    assert all(usable and unusable for usable, _, unusable in VALUES.values())
    monkeypatch.setattr(config_values, "KEYS", (*VALUES, "student.new"))
    assert "student.new" in forgotten()


def test_what_is_met_too_seldom_is_said() -> None:
    enough = [Trial({}, set(LABELS), is_accepted=True) for _ in range(LEAST_EACH)]
    assert shortfalls(enough) == []
    enough[0].labels.remove("seed")
    refused = [Trial({}, set(LABELS)) for _ in range(LEAST_EACH)]
    assert shortfalls(enough + refused) == ["4 of 5 times seed"]
    assert shortfalls([*enough, *refused, refused[0]])[1:] == [
        "5 of 11 accepted, which is less than half"
    ]


def test_what_check_accepts_train_can_do() -> None:
    script = Path(reliability.__main__.__file__)
    done = run_script_alone(script, ["--short", "--json", "configurations"])
    lines = [line for line in done.said.splitlines() if line.startswith("{")]
    assert lines, done.said
    outcome = json.loads(lines[-1])
    assert outcome["failures"] == 0, outcome["details"]
    assert outcome["trials"] == HARNESSES["configurations"][0]
    assert outcome["details"]["accepted"] > outcome["trials"] // 3
    assert all(seen > 0 for seen in outcome["control"].values())
