"""The disk that a run will take: said and checked before it starts, and close to what it took."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny import tiny_config
from tiny_runs import LORA, needs_peft
from tutelage.commands.check import check
from tutelage.config.schema import Config
from tutelage.errors import RunError
from tutelage.setup.components import build_components
from tutelage.train.disk import num_checkpoints, plan_disk
from tutelage.train.loop import train


def plan_of(config: Config, folder: Path) -> dict[str, int]:
    return plan_disk(config, build_components(config, is_run=False), folder, 20).parts


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "student",
    [
        {},
        {"dtype": "bfloat16"},
        pytest.param({"lora": LORA}, marks=needs_peft),
    ],
)
def test_weights_and_moments_take_what_was_said(
    tmp_path: Path, tiny_models: Path, student: dict[str, Any]
) -> None:
    out = tmp_path / "run"
    model = {"model": str(tiny_models / "student")}
    config = tiny_config(tiny_models, out, student=model | student, num_steps=1)
    parts, lines = plan_of(config, out), []
    train(config, log=lines.append)
    assert any(line.startswith("run: needs about ") for line in lines)
    files = bytes_of(out / "checkpoint-000001")
    assert parts["checkpoints"] == pytest.approx(files, rel=0.1, abs=16_384)  # names
    assert parts["exported student"] == pytest.approx(bytes_of(out / "student"), rel=0.1)
    assert plan_of(config, out)["checkpoints"] <= 0.1 * files + 16_384  # it stands


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"num_steps": 10, "checkpoint_every": 2, "keep_checkpoints": 2}, 3),
        ({"num_steps": 10, "checkpoint_every": 0, "keep_checkpoints": 2}, 1),
        ({"num_steps": 4, "checkpoint_every": 3, "keep_checkpoints": 2}, 2),
        ({"num_steps": 10, "checkpoint_every": 2, "keep_checkpoints": 2, "keep_best": True}, 4),
        ({"num_steps": 4, "checkpoint_every": 0, "keep_checkpoints": 9, "keep_best": True}, 3),
    ],
)
def test_checkpoints_are_counted_as_they_stand_at_once(
    tmp_path: Path, tiny_models: Path, changes: dict[str, Any], count: int
) -> None:
    if changes.pop("keep_best", False):
        evaluation = {"num_problems": 1, "every": 2, "teacher": False}
        changes |= {"keep_best": "held_out_reverse_kl_nats", "evaluation": evaluation}
    assert num_checkpoints(tiny_config(tiny_models, tmp_path, **changes)) == count


@pytest.mark.parametrize("command", [check, train])
def test_a_run_that_does_not_fit_is_refused_before_it_starts(
    tmp_path: Path,
    tiny_models: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[..., Any],
) -> None:
    config = tiny_config(
        tiny_models, tmp_path / "run", recording={"every": 1, "max_bytes": 1 << 31}
    )
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        RunError,
        match=r"the run needs about 2\.0 GiB of disk \(recordings 2\.0 GiB.* 1\.0 GiB free",
    ) as e:
        list(command(config, "run") or [])
    assert "\n" not in str(e.value)
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_what_is_stored_of_rollouts_counts(tmp_path: Path, tiny_models: Path) -> None:
    config = tiny_config(tiny_models, tmp_path / "run", rollouts={"source": "stored"})
    assert plan_of(config, tmp_path / "run")["rollouts"] > 4 * 8 * 10 * 36
