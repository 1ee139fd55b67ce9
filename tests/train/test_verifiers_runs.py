"""Whole runs on an environment behind verifiers' protocol, without the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fake_verifiers
from tiny import MEASURED, tiny_config
from tutelage.envs import verifiers
from tutelage.rollout.verifiers_sampler import VerifiersSampler
from tutelage.setup.run_folder import RunFolder
from tutelage.train.loop import train

KEYS: dict[str, Any] = {
    "data": {
        "kind": "verifiers",
        "environment": "fine",
        "arguments": {"num_tasks": 9, "reward": 1.0},
        "num_held_out": 3,
        "max_turn_tokens": 4,
    },
    "sampling": {"num_samples": 2, "max_new_tokens": 10},
    "selection": {"rule": "soft_or", "keep": 0.5},
    "evaluation": {"num_problems": 2, "num_samples": 2},
    "recording": {"every": 1, "num_prompts": 1},
    "num_steps": 2,
}


def run(models: Path, out: Path, **changes: Any) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    train(tiny_config(models, out, **{**KEYS, **changes}), log=lambda _: None, on_step=steps.append)
    return [{k: v for k, v in step.items() if k not in MEASURED} for step in steps]


def test_a_run_trains_on_what_the_student_generated(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifiers, "_PROGRAM", Path(fake_verifiers.__file__))
    seen = []
    sample = VerifiersSampler.sample

    def watched(self: VerifiersSampler, request: Any) -> Any:
        found = sample(self, request)
        seen.append(found)
        return found

    monkeypatch.setattr(VerifiersSampler, "sample", watched)
    steps = run(tiny_models, tmp_path / "run")
    rows = [sum(len(rollout.generated_ids) for rollout in rollouts) for rollouts in seen]
    assert len(steps) == 2
    assert {step["num_rows"] for step in steps} < set(rows)
    assert all(step["num_kept"] == -(-step["num_rows"] // 2) for step in steps)
    assert all(len(r.completion_ids) > len(r.generated_ids) for found in seen for r in found)
    measured = RunFolder(tmp_path / "run", is_writer=False).read("evaluation.jsonl")
    assert {(m["model"], m["mean_at_k"]) for m in measured} == {("student", 1.0), ("teacher", 1.0)}
    again = run(tiny_models, tmp_path / "again")
    assert again == steps
