"""Ctrl-C on the command line: exit code 130, a checkpoint, and the same command continues."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from patience import HANG_S, wait_until
from tiny import tiny_table
from tutelage.config.parse import load_config
from tutelage.errors import ModelError
from tutelage.models.load import load_model
from tutelage.train.checkpoint import list_checkpoints
from tutelage.train.loop import train
from tutelage.train.signals import Stop, StoppedError


def as_toml(table: dict[str, Any]) -> str:
    tables = {k: v for k, v in table.items() if isinstance(v, dict)}
    plain = {k: v for k, v in table.items() if k not in tables}
    lines = [f"{k} = {json.dumps(v)}" for k, v in plain.items()]
    for name, entries in tables.items():
        lines += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in entries.items())]
    return "\n".join(lines)


def logged_steps(folder: Path) -> list[int]:
    return [json.loads(x)["step"] for x in (folder / "metrics.jsonl").read_text().splitlines()]


def test_ctrl_c_leaves_a_checkpoint_that_the_same_command_continues(
    tmp_path: Path, tiny_models: Path
) -> None:
    out, path = tmp_path / "run", tmp_path / "tiny.toml"
    path.write_text(as_toml(tiny_table(tiny_models, out, num_steps=100000, checkpoint_every=0)))
    process = subprocess.Popen(
        [sys.executable, "-m", "tutelage", "train", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        log = out / "metrics.jsonl"
        wait_until(lambda: log.exists() and log.read_text().count("\n") >= 2, process)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=HANG_S)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in stderr
    steps = logged_steps(out)
    assert f"stopped after step {steps[-1]}; the same command continues" in stdout
    assert steps == list(range(1, len(steps) + 1))
    assert [step for step, _ in list_checkpoints(out)] == [steps[-1]]
    assert not (out / "lock").exists()

    lines: list[str] = []

    def stop(metrics: dict[str, Any]) -> None:
        signal.raise_signal(signal.SIGTERM)

    result = train(load_config(path), "tiny", log=lines.append, on_step=stop)
    assert not result.is_finished
    assert f"continues: found checkpoint-{steps[-1]:06d} of 100000" in lines[0]
    assert logged_steps(out) == [*steps, steps[-1] + 1]


def test_a_second_signal_interrupts_at_once(tmp_path: Path, tiny_models: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(as_toml(tiny_table(tiny_models, tmp_path / "run")))

    def twice(metrics: dict[str, Any]) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(load_config(path), "tiny", log=lambda _: None, on_step=twice)
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "run" / "lock").exists()
    assert list_checkpoints(tmp_path / "run") == []


PHASES = {
    "writing": "tutelage.train.step.Step.generate",
    "reading": "tutelage.models.teacher.Teacher.forward",
    "learning": "tutelage.train.update.Updater._backward",
    "updating": "tutelage.train.update.Updater._apply",
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_ends_a_phase_at_once_until_the_first_update(
    phase: str, tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(as_toml(tiny_table(tiny_models, tmp_path / "run", num_steps=4)))
    module, owner, name = PHASES[phase].rsplit(".", 2)
    kind = getattr(importlib.import_module(module), owner)
    original, went_on = getattr(kind, name), []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if logged and not went_on:
            signal.raise_signal(signal.SIGTERM)
            went_on.append(phase)
        return original(*arguments, **options)

    logged: list[dict[str, Any]] = []
    monkeypatch.setattr(kind, name, interrupted)
    result = train(load_config(path), "tiny", log=lambda _: None, on_step=logged.append)
    # After an update the step has to be finished, or half of it would be saved.
    is_finished_first = phase == "updating"
    assert bool(went_on) == is_finished_first
    assert logged_steps(tmp_path / "run") == ([1, 2] if is_finished_first else [1])
    assert not result.is_finished
    assert list_checkpoints(tmp_path / "run")[-1][0] == len(logged)


@pytest.mark.parametrize("is_signal", [True, False])
def test_a_stop_while_a_model_is_read_is_no_damaged_file(
    is_signal: bool, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Stop()

    def reading(*_: object, **__: object) -> None:
        if is_signal:
            stop.ask()
        raise RuntimeError("a file that is cut off")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", reading)
    with stop.interruptible(), pytest.raises(StoppedError if is_signal else ModelError):
        load_model(str(tiny_models / "teacher"))
