"""The plan of cards that are not here: by configurations of models alone, or one line."""

from __future__ import annotations

import shutil
from pathlib import Path

from calling import LEDGER, call

DATA = ("data.kind=file", "data.path=nowhere.jsonl", "data.max_prompt_tokens=64")


def test_a_plan_needs_no_weights(tiny_models: Path, tmp_path: Path) -> None:
    sides = []
    for who in ("student", "teacher"):
        (tmp_path / who).mkdir()
        shutil.copy(tiny_models / who / "config.json", tmp_path / who)
        sides.append(f"{who}.model={tmp_path / who}")
    path = tmp_path / "plan.toml"
    path.write_text("num_steps = 1\nprompts_per_step = 8\n")
    asked = (path, *DATA, *sides, "student.sharding=fsdp2", "--card-gib", "24", "--processes", "8")
    outcome = call("check", *asked)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[1] == "memory: of each of 8 processes, student fsdp2 in groups of 8"
    assert [line for line in lines if line.endswith("24,576 MiB available")]
    assert "available" not in lines[-1]  # how much main memory the hosts have is unknown


def test_prompts_of_an_embedded_task_are_measured() -> None:
    outcome = call("check", LEDGER, "student.sharding=fsdp2", "--card-gib", "24")
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("24,576 MiB available") == 1
    assert outcome.out.count("memory: plan of one process, which holds all weights;") == 1


def test_what_cannot_be_planned_is_one_line() -> None:
    for options, part in (
        (("data.kind=file", "data.path=no.jsonl", "--card-gib", "24"), "data.max_prompt_tokens"),
        (("data.kind=verifiers", "data.environment=no", "--card-gib", "24"), "'verifiers'"),
        (("--card-gib", "24", "--allow-change", "seed"), "--allow-change seed"),
        (("--dry-run", "--processes", "2"), "--dry-run makes none"),
        (("--processes", "3", "--hosts", "2"), "multiple of the number of hosts"),
    ):
        outcome = call("check", LEDGER, *options)
        assert outcome.code == 2
        assert part in outcome.err
        assert outcome.err.count("\n") == 1
