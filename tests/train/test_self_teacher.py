"""Runs of a student that teaches itself: what teaches, what it reads, and what a run keeps."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from tiny import MEASURED, tiny_config
from tutelage.config.schema import Config
from tutelage.setup.components import build_components
from tutelage.train.loop import train
from tutelage.train.optimizer import build_optimizer
from tutelage.train.step import Step

HINT = "{answer};"


def config_of(models: Path, out: Path, teacher: dict[str, Any], **changes: Any) -> Config:
    return tiny_config(models, out, teacher={"kind": "self", **teacher}, **changes)


def step_of(config: Config) -> Step:
    components = build_components(config)
    optimizer = build_optimizer(
        config.optimizer, components.student, components.masters, Path(config.out or ".")
    )
    return Step(config, components, Accelerator(cpu=True), components.student, optimizer)


def go(config: Config) -> list[str]:
    lines: list[str] = []
    train(config, log=lines.append)
    return lines


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in MEASURED} for x in lines]


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }


@pytest.mark.parametrize("teacher", [{}, {"weights": "live"}, {"weights": "ema", "ema_decay": 0.9}])
@pytest.mark.parametrize("how", ["padded", "packed"])
def test_without_a_context_the_first_step_has_no_loss_and_no_gradient(
    tmp_path: Path, tiny_models: Path, teacher: dict[str, Any], how: str
) -> None:
    step = step_of(config_of(tiny_models, tmp_path / "run", teacher, micro_batches=how))
    found = step.take(1)
    assert (found["loss"], found["grad_norm"], found["num_kept"]) == (0, 0, found["num_rows"])


def test_a_context_teaches_something_else(tmp_path: Path, tiny_models: Path) -> None:
    found = step_of(config_of(tiny_models, tmp_path / "run", {"context": HINT})).take(1)
    assert found["loss"] > 1e-4
    assert found["grad_norm"] > 1e-4


LORA = {"lora": {"rank": 2}}


@pytest.mark.parametrize("student", [{}, {"num_layers": 1}, LORA], ids=["all", "pruned", "lora"])
@pytest.mark.parametrize("mode", ["resident", "offload"])
def test_frozen_weights_are_those_of_the_start_whatever_was_learned_since(
    tmp_path: Path, tiny_models: Path, student: dict[str, Any], mode: str
) -> None:
    if "lora" in student and mode == "offload":
        pytest.skip("an adapter's base is not copied")
    teacher = {"context": HINT, "mode": mode}
    own = {"model": str(tiny_models / "student"), **student}
    config = config_of(tiny_models, tmp_path / "run", teacher, student=own)
    step = step_of(config)
    (micro_batch, *_) = step.pack(step.generate(1))
    batch = micro_batch.batch
    first = step.components.student.logits(batch).block(0, 9)
    step.take(1)
    step.take(2)
    now = step.components.student.logits(batch).block(0, 9)
    with step.components.teacher.on_device():
        taught = step.components.teacher.forward(batch).block(0, 9)
    assert torch.equal(taught, first)
    assert not torch.equal(taught, now)
    assert torch.equal(step.components.student.logits(batch).block(0, 9), now)


def test_live_weights_are_the_students_of_this_moment(tmp_path: Path, tiny_models: Path) -> None:
    step = step_of(config_of(tiny_models, tmp_path / "run", {"weights": "live", "context": HINT}))
    (micro_batch, *_) = step.pack(step.generate(1))
    for _ in range(2):
        step.take(1)
        now = step.components.student.logits(micro_batch.batch)
        with step.components.teacher.on_device():
            taught = step.components.teacher.forward(micro_batch.batch)
        assert torch.equal(taught.block(0, 9), now.block(0, 9))
        assert not taught.weight.requires_grad


@pytest.mark.parametrize("weights", [{"weights": "live"}, {"weights": "ema", "ema_decay": 0.5}])
def test_later_updates_of_a_step_learn_from_the_head_that_read(
    tmp_path: Path, tiny_models: Path, weights: dict[str, Any]
) -> None:
    teacher = {**weights, "context": HINT}
    step = step_of(config_of(tiny_models, tmp_path / "run", teacher, updates_per_step=2))
    rollouts = step.generate(1)
    micro_batches = step.pack(rollouts)
    step.teacher_forward(micro_batches)
    views = [m.teacher_logits for m in micro_batches if m.teacher_logits is not None]
    before = [view.block(0, 3).clone() for view in views]
    step.update(micro_batches, step.select(micro_batches, rollouts, 1), 1)
    for view, expected in zip(views, before, strict=True):
        assert torch.equal(view.block(0, 3), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_average_follows_every_applied_update_in_float32(
    tmp_path: Path, tiny_models: Path, dtype: str
) -> None:
    own = {"model": str(tiny_models / "student"), "dtype": dtype}
    teacher = {"weights": "ema", "ema_decay": 0.75, "context": HINT}
    step = step_of(config_of(tiny_models, tmp_path / "run", teacher, student=own))
    masters = step.components.masters
    expected = [m.detach().double() for m in masters.masters]
    for number in (1, 2):
        step.take(number)
        pairs = zip(expected, masters.masters, strict=True)
        expected = [0.75 * e + 0.25 * m.detach().double() for e, m in pairs]
    for average, reference in zip(masters.averages, expected, strict=True):
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), reference, rtol=1e-6, atol=1e-7)
    with step.components.teacher.on_device():
        batch = step.pack(step.generate(3))[0].batch
        taught = step.components.teacher.forward(batch)
    name = next(n for n, _ in step.components.student.model.named_parameters() if "lm_head" in n)
    place = [n for n, _ in step.components.student.model.named_parameters()].index(name)
    rounded = masters.averages[place].to(taught.weight.dtype)
    assert torch.equal(taught.weight, rounded[: len(taught.weight)])


@pytest.mark.parametrize("writer", ["inline", "thread"])
@pytest.mark.parametrize(
    "teacher", [{"weights": "ema", "ema_decay": 0.75}, {}, {"weights": "live"}], ids=str
)
def test_a_continued_run_is_the_same_bit_for_bit(
    tmp_path: Path, tiny_models: Path, teacher: dict[str, Any], writer: str
) -> None:
    if writer == "thread" and teacher.get("weights") != "ema":
        pytest.skip("only an average is saved")
    teacher = {**teacher, "context": HINT}
    whole = config_of(tiny_models, tmp_path / "whole", teacher, checkpoint_writer=writer)
    go(whole)
    run = replace(whole, out=str(tmp_path / "run"))
    go(run)
    for name in ("checkpoint-000004", "student"):
        shutil.rmtree(tmp_path / "run" / name)
    go(run)
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    last = "checkpoint-000004"
    assert digest(tmp_path / "run" / last) == digest(tmp_path / "whole" / last) != {}
    saved = load_file(tmp_path / "run" / last / "optimizer.safetensors")
    assert any(key.endswith("|average") for key in saved) == ("ema_decay" in teacher)
