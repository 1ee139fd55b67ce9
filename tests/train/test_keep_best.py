"""Runs that keep their best checkpoint, and runs that end early, by scripted evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tiny import tiny_config
from tutelage.errors import ConfigError, DataError
from tutelage.evaluation.measure import Measured
from tutelage.train import measurements
from tutelage.train.checkpoint import list_checkpoints
from tutelage.train.loop import train

KL = "held_out_reverse_kl_nats"
VALUES = {0: 0.1, 1: 0.5, 2: 0.3, 3: 0.4, 4: 0.3, 5: 0.6, 6: 0.35}
MEASURED = {"num_problems": 1, "num_samples": 1, "every": 1, "teacher": False}


class Died(Exception):
    """The process is gone."""


@pytest.fixture(autouse=True)
def _scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "measure", scripted)


def scripted(_config: Any, _components: Any, step: int, *_: Any) -> Measured:
    unset = dict.fromkeys(
        f"{n}{end}" for n in ("mean_at_k", "pass_at_k") for end in ("", "_low", "_high")
    )
    head = {"step": step, "model": "student", "k": 1, "num_problems": 1}
    sample = {"prompt_id": "p", "sample": 0, "is_correct": None, "is_truncated": False}
    row = {**head, **sample, "num_tokens": 2, "reverse_kl_nats": 2 * VALUES[step]}
    return Measured([{**head, **unset, KL: VALUES[step]}], [row], [])


def run(models: Path, out: Path, dies_after: int = 0, **changes: Any) -> list[str]:
    """What a run of at most six steps says, which may die after one of them."""
    said: list[str] = []

    def look(metrics: dict[str, Any]) -> None:
        if metrics["step"] == dies_after:
            raise Died

    common = {"num_steps": 6, "checkpoint_every": 3, "keep_checkpoints": 1, "evaluation": MEASURED}
    allowed = ("stop_when.patience",) if changes.pop("allows", False) else ()
    try:
        train(tiny_config(models, out, **common | changes), "run", allowed, said.append, look)
    except Died:
        said.append("died")
    return said


def steps(out: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(out)]


def manifest(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return found


@pytest.mark.parametrize("writer", ["inline", "thread"])
def test_the_best_checkpoint_stays_also_after_a_death(
    tmp_path: Path, tiny_models: Path, writer: str
) -> None:
    out = tmp_path / "run"
    settings = {"keep_best": KL, "checkpoint_writer": writer}
    assert run(tiny_models, out, 5, **settings)[-1] == "died"
    assert steps(out) == [2, 3]  # step 3 was due, step 2 the best of the first three
    said = run(tiny_models, out, **settings)
    assert steps(out) == [2, 6]
    assert said[-1] == f"best: {KL} 0.3 after step 2, in {out}/checkpoint-000002/model"
    assert manifest(out)["best"] == {
        "metric": KL,
        "step": 2,
        "value": 0.3,
        "model": "checkpoint-000002/model",
    }


def test_a_run_ends_early_and_says_so_when_it_is_started_again(
    tmp_path: Path, tiny_models: Path
) -> None:
    out = tmp_path / "run"
    recording = {"every": 6, "num_prompts": 1, "num_rollouts": 1, "max_new_tokens": 4}
    stop = {"metric": KL, "patience": 2}
    said = run(tiny_models, out, stop_when=stop, keep_best=KL, recording=recording)
    reason = f"no better {KL} than 0.3 after step 2 in 2 evaluations"
    assert f"stopped early: {reason}" in said
    assert said[-2].startswith("verdict: ")
    assert said[-2].endswith(f"; stopped early: {reason}")
    assert steps(out) == [2, 4]
    assert (out / "student" / "model.safetensors").exists()
    lines = [json.loads(line) for line in (out / "tokens.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {0, 4}
    before = manifest(out)
    assert before["stopped_early"] == {"step": 4, "reason": reason}
    again = run(tiny_models, out, stop_when=stop, keep_best=KL, recording=recording)
    assert any(
        line.endswith(f"found checkpoint-000004 of 6; nothing is left to do: {reason}")
        for line in again
    )
    assert manifest(out) == before
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
    stop["patience"] = 5
    more = run(tiny_models, out, stop_when=stop, recording=recording, allows=True)
    assert not any("stopped early" in line for line in more)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 6
    assert {"stopped_early", "best"}.isdisjoint(manifest(out))


def test_a_run_that_took_every_step_was_not_stopped_early(
    tmp_path: Path, tiny_models: Path
) -> None:
    out, stop = tmp_path / "run", {"metric": KL, "patience": 4}
    for _ in range(2):  # the second time nothing is left to do
        said = run(tiny_models, out, stop_when=stop)
        assert not any("stopped early" in line or "no better" in line for line in said)
        assert "stopped_early" not in manifest(out)
    assert steps(out) == [6]


def test_a_death_between_the_evaluation_that_ends_a_run_and_its_checkpoint(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    stop = {"metric": KL, "value": 0.3}

    def die(*_: Any) -> None:
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr("tutelage.train.loop._Run._end_early", die)
        run(tiny_models, out, stop_when=stop, checkpoint_every=1)
    assert steps(out) == [2]
    said = run(tiny_models, out, stop_when=stop, checkpoint_every=1)
    assert any("is finished" in line and "reached 0.3 with 0.3" in line for line in said)
    assert (out / "student" / "model.safetensors").exists()
    assert manifest(out)["stopped_early"]["step"] == 2


def test_a_lost_best_checkpoint_is_not_named(tmp_path: Path, tiny_models: Path) -> None:
    out = tmp_path / "run"
    run(tiny_models, out, 5)
    assert steps(out) == [3]
    said = run(tiny_models, out, keep_best=KL)  # may be set later: it changes no number
    assert said[-1] == f"best: {KL} 0.3 after step 4, in {out}/checkpoint-000004/model"


def test_an_accuracy_that_is_not_measured_cannot_decide(tmp_path: Path, tiny_models: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}+1="}}\n' for i in range(6)))
    data = {"kind": "file", "path": str(path), "grader": "number", "num_held_out": 2, "chat": False}
    with pytest.raises(DataError, match="keep_best = mean_at_k needs graded problems, but none"):
        run(tiny_models, tmp_path / "run", data=data, keep_best="mean_at_k")
    stop = {"metric": "mean_at_k", "patience": 1}
    with pytest.raises(ConfigError, match=r"data\.grader must be number, math or exact with stop"):
        run(tiny_models, tmp_path / "run", data=data | {"grader": "none"}, stop_when=stop)
