"""Metrics sent elsewhere are those of the run folder, and a missing package is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from tiny import tiny_config
from tutelage.config.parse import fingerprint
from tutelage.errors import ConfigError, MissingExtraError
from tutelage.setup import trackers
from tutelage.setup.trackers import numbers, require_trackers
from tutelage.train.loop import train

TASK = {"num_problems": 2, "num_samples": 2, "teacher": True}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_numbers_of_a_nested_record() -> None:
    record = {"step": 3, "loss": 0.5, "seconds": {"learn": 2.0}, "name": "x", "kl": None, "l": [1]}
    assert numbers(record, "p.") == {"p.loss": 0.5, "p.seconds.learn": 2.0}


def test_every_step_and_evaluation_reaches_the_tracker(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the services themselves: what accelerate is told."""
    told: list[tuple[int, dict[str, Any]]] = []
    started: list[str] = []
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name, *_: started.append(name))
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: told.append((step, values)))
    config = tiny_config(
        tiny_models, tmp_path / "run", num_steps=2, evaluation=TASK, trackers=["trackio"]
    )
    # accelerate warns about the package that is only pretended to be here
    with pytest.warns(UserWarning, match="no supported trackers"):
        train(config, log=lambda _: None)
    assert started == ["tutelage"]
    assert [step for step, _ in told] == [0, 0, 1, 2, 2]
    logged = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [values["loss"] for _, values in told if "loss" in values] == [r["loss"] for r in logged]
    evaluated = read_jsonl(tmp_path / "run" / "evaluation.jsonl")
    found = [v for _, values in told for k, v in values.items() if k.endswith("student.mean_at_k")]
    assert found == [r["mean_at_k"] for r in evaluated if r["model"] == "student"]


@pytest.mark.filterwarnings("ignore")  # of tensorboard and protobuf
def test_tensorboard_writes_its_file(tiny_models: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = tiny_config(tiny_models, tmp_path / "run", num_steps=1, trackers=["tensorboard"])
    train(config, log=lambda _: None)
    (events,) = (tmp_path / "run" / "tutelage").glob("events.out.*")
    assert b"grad_norm" in events.read_bytes()


def test_a_missing_package_is_one_line_before_anything_starts(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    config = tiny_config(tiny_models, tmp_path / "run", trackers=["wandb"])
    with pytest.raises(MissingExtraError, match=r"not installed.*pip install 'wandb'"):
        train(config, log=lambda _: None)
    assert not (tmp_path / "run").exists()


def test_unknown_trackers_are_refused_and_known_ones_change_no_result(
    tiny_models: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="trackers"):
        tiny_config(tiny_models, tmp_path, trackers=["mlfloww"])
    plain, tracked = (tiny_config(tiny_models, tmp_path, trackers=t) for t in ([], ["wandb"]))
    assert fingerprint(plain) == fingerprint(tracked)
    require_trackers(plain)
