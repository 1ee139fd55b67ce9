"""What runs the parts: each in a process of its own, one after the other or together."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import gpu

PARTS = """
import os, sys, time

def barrier(own, other):
    open("PLACE" + own, "w").close()
    while not os.path.exists("PLACE" + other):
        time.sleep(0.01)
    return {"met": other}

def broken():
    print("a line before")
    raise ValueError("no such card")

PARTS = {
    "good": lambda: print("seen") or {"value": 1.5, "pid": os.getpid()},
    "broken": broken,
    "killed": lambda: os.kill(os.getpid(), 9),
    "endless": lambda: time.sleep(600),
    "a": lambda: barrier("a", "b"),
    "b": lambda: barrier("b", "a"),
}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "toy_parts.py").write_text(PARTS.replace("PLACE", f"{tmp_path}/"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(gpu, "MODULES", ("toy_parts",))
    monkeypatch.setattr(gpu, "PRELOADED", ())
    about = {"device": "Toy", "date": "today", "commit": "c0ffee"}
    monkeypatch.setattr(gpu, "environment", lambda: about)
    out = tmp_path / "results.json"

    def call(*arguments: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out), *arguments])
        ended = None
        try:
            gpu.main()
        except SystemExit as error:
            ended = error.code
        return ended, json.loads(out.read_text())["parts"] if out.exists() else {}

    return call


def test_results_and_what_ended_a_part_are_written(run: Any, capfd: Any) -> None:
    ended, found = run("--parts", "broken", "killed", "good")
    assert ended == 1
    assert found["good"]["value"] == 1.5
    assert found["good"]["commit"] == "c0ffee"
    assert "seen" in capfd.readouterr().out
    assert found["broken"]["failed"] == "exit status 1"
    assert found["broken"]["output"][0] == "a line before"
    assert found["broken"]["output"][-1] == "ValueError: no such card"
    assert found["killed"]["failed"] == "exit status -9"


def test_a_part_that_has_a_result_is_not_run_again(run: Any) -> None:
    first = run("--parts", "good")[1]
    assert run("--parts", "good")[1] == first
    again = run("--parts", "good", "--again")[1]
    assert again["good"]["pid"] != first["good"]["pid"]


def test_a_part_over_its_limit_is_ended(run: Any) -> None:
    ended, found = run("--parts", "endless", "--limit", "1")
    assert ended == 1
    assert found["endless"]["failed"] == "longer than 1 s"


def test_parts_run_together_wait_for_one_another(run: Any) -> None:
    ended, found = run("--together", "a", "b", "--limit", "60")
    assert ended is None
    assert found["a"]["met"] == "b"
    assert found["b"]["met"] == "a"
    alone = run("--again", "--parts", "a", "--limit", "60")[1]
    assert alone["a"]["met"] == "b"  # who came before has left its mark


def test_a_name_that_no_part_has_is_refused(run: Any) -> None:
    assert run("--parts", "goood")[0] == "no part is called 'goood'; --list shows them."
    assert run("--together", "goood")[0] == "no part is called 'goood'; --list shows them."
