"""Runs of a student that teaches itself: what teaches, what it reads, and what a run keeps."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from tiny import MEASURED, tiny_config
from tutelage.commands.dry_run import dry_run
from tutelage.config.schema import Config
from tutelage.data.batch import collate
from tutelage.errors import ConfigError, DataError, RunError
from tutelage.models.privileged import PrivilegedReading, read_beside
from tutelage.models.tokenizers import decode
from tutelage.setup.components import Components, build_components
from tutelage.setup.validate import validate
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


def test_every_update_that_is_skipped_leaves_the_average(tmp_path: Path, tiny_models: Path) -> None:
    teacher = {"weights": "ema", "ema_decay": 0.5, "context": HINT}
    step = step_of(config_of(tiny_models, tmp_path / "run", teacher))
    masters = step.components.masters
    rollouts = step.generate(1)
    micro_batches = step.pack(rollouts)
    step.teacher_forward(micro_batches)
    view = micro_batches[0].teacher_logits
    assert view is not None
    view.hidden[0] = float("nan")  # type: ignore[attr-defined]
    before = [average.clone() for average in masters.averages]
    result = step.update(micro_batches, step.select(micro_batches, rollouts, 1), 1)
    assert result.num_skipped == 1
    assert all(map(torch.equal, masters.averages, before))


def components_of(models: Path, out: Path, **teacher: Any) -> Components:
    return build_components(config_of(models, out, teacher))


def test_a_teacher_reads_its_context_before_the_same_completion(
    tmp_path: Path, tiny_models: Path
) -> None:
    components = components_of(tiny_models, tmp_path / "run", context=HINT)
    step = step_of(config_of(tiny_models, tmp_path / "run", {"context": HINT}))
    rollouts = step.generate(1)
    reading = components.reading
    assert reading is not None
    for own, told in zip(rollouts, reading(rollouts), strict=True):
        assert told.completion_ids == own.completion_ids
        text = decode(components.tokenizer, told.prompt_ids)
        assert text == f"{own.prompt.answer};{own.prompt.content}"


def test_held_out_divergence_is_measured_behind_the_context(
    tmp_path: Path, tiny_models: Path
) -> None:
    found = {}
    for context in ("", HINT):
        out = tmp_path / f"run{len(context)}"
        evaluation = {"num_problems": 2, "num_samples": 2}
        teacher = {"context": context}
        go(config_of(tiny_models, out, teacher, evaluation=evaluation, num_steps=1))
        first = json.loads((out / "evaluation.jsonl").read_text().splitlines()[0])
        found[context] = first["held_out_reverse_kl_nats"]
        assert first["model"] == "student"
    assert found[""] == 0
    assert found[HINT] > 1e-4


def test_rows_that_differ_are_refused_wherever_a_teacher_reads(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_of(config_of(tiny_models, tmp_path / "run", {"context": HINT}))
    rollouts, reading = step.generate(1), step.components.reading
    assert reading is not None
    honest: Callable[..., Any] = PrivilegedReading.__call__

    def other(self: PrivilegedReading, given: Any) -> Any:
        first, *rest = honest(self, given)
        ids = (*first.completion_ids[:-1], first.completion_ids[-1] ^ 1)
        return [replace(first, completion_ids=ids), *rest]

    monkeypatch.setattr(PrivilegedReading, "__call__", other)
    with pytest.raises(RunError, match="differ in tokens"):
        step.pack(rollouts)
    with pytest.raises(RunError, match="differ in tokens"):
        list(read_beside([collate(rollouts, 0)], rollouts, reading, 0))


RECORDS = [
    {"id": "a", "prompt": "a1+1;>", "answer": "2", "way": "1+1=2"},
    {"id": "b", "prompt": "b2+1;>", "answer": "3", "hint": 7},
]


def file_config(models: Path, folder: Path, context: str, records: Any = RECORDS) -> Config:
    path = folder / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    data = {"kind": "file", "path": str(path), "chat": False, "num_held_out": 0}
    teacher = {"context": context}
    return config_of(models, folder / "run", teacher, data=data, prompts_per_step=1)


def test_columns_of_a_file_reach_the_template(tmp_path: Path, tiny_models: Path) -> None:
    config = file_config(tiny_models, tmp_path, "{way};{answer};", RECORDS[:1])
    inputs = validate(config, tmp_path / "run")
    assert inputs.prompts is not None
    assert inputs.prompts.longest_told == inputs.prompts.longest + len("1+1=2;2;")
    components = build_components(config, inputs=inputs)
    assert components.reading is not None
    (prompt,) = components.task.prompts(0, 1, 0)
    told = decode(components.tokenizer, components.reading.prompt_ids(prompt))
    assert told == "1+1=2;2;a1+1;>"


@pytest.mark.parametrize(
    ("context", "parts"),
    [
        ("{way}", ["'b' lacks the field 'way'", "'prompt', 'answer', 'hint'"]),
        ("{hint}", ["'a' lacks the field 'hint'", "'prompt', 'answer', 'way'"]),
    ],
)
def test_a_prompt_without_a_field_is_named_before_training(
    tmp_path: Path, tiny_models: Path, context: str, parts: list[str]
) -> None:
    config = file_config(tiny_models, tmp_path, context)
    with pytest.raises(DataError) as caught:
        validate(config, tmp_path / "run")
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


def test_the_embedded_task_offers_the_answer_alone(tmp_path: Path, tiny_models: Path) -> None:
    config = config_of(tiny_models, tmp_path / "run", {"context": "{solution}"})
    with pytest.raises(DataError, match=r"lacks the field 'solution'.*it has 'answer'"):
        validate(config, tmp_path / "run")


def test_a_context_that_leaves_no_room_is_refused(tmp_path: Path, tiny_models: Path) -> None:
    config = config_of(tiny_models, tmp_path / "run", {"context": "1" * 120 + "{answer}"})
    with pytest.raises(ConfigError, match=r"with teacher\.context prompt .* the 128 positions"):
        build_components(config, inputs=validate(config, tmp_path / "run"))


def test_other_fields_are_another_run(tmp_path: Path, tiny_models: Path) -> None:
    config = file_config(tiny_models, tmp_path, "{way}", RECORDS[:1])
    go(replace(config, num_steps=1))
    file_config(tiny_models, tmp_path, "{way}", [{**RECORDS[0], "way": "1+1=3"}])
    with pytest.raises(RunError, match=r"the training prompts of data\.path"):
        go(replace(config, num_steps=1))


@pytest.mark.parametrize(
    ("teacher", "when"), [({}, "in the first step"), ({"weights": "live"}, "in every step")]
)
def test_a_teacher_without_a_context_is_warned_about(
    tmp_path: Path, tiny_models: Path, teacher: dict[str, Any], when: str
) -> None:
    config = config_of(tiny_models, tmp_path / "run", teacher)
    (warning,) = [w for w in build_components(config).warnings if "teacher.context" in w]
    assert f"loss and gradient are 0 {when}" in warning


def test_a_checkpoint_without_an_average_does_not_begin_one(
    tmp_path: Path, tiny_models: Path
) -> None:
    config = config_of(tiny_models, tmp_path / "run", {"context": HINT}, num_steps=2)
    go(config)
    other = config_of(
        tiny_models, tmp_path / "run", {"weights": "ema", "ema_decay": 0.5, "context": HINT}
    )
    keys = ("teacher.weights", "teacher.ema_decay", "num_steps")
    with pytest.raises(RunError, match="has no average of"):
        train(other, allow_change=keys, log=lambda line: None)


def test_a_dry_run_needs_no_teacher(tmp_path: Path, tiny_models: Path) -> None:
    lines = list(dry_run(config_of(tiny_models, tmp_path / "run", {})))
    assert "teacher: the student itself, weights frozen" in lines
    assert lines[-1].startswith("continued from the checkpoint of step 1")


def test_a_continued_adapter_is_taught_by_its_base(tmp_path: Path, tiny_models: Path) -> None:
    own = {"model": str(tiny_models / "student"), **LORA}
    config = config_of(tiny_models, tmp_path / "run", {"context": HINT}, student=own)
    step = step_of(config)
    batch = step.pack(step.generate(1))[0].batch
    first = step.components.student.logits(batch).block(0, 5)
    go(replace(config, num_steps=2))
    saved = str(tmp_path / "run" / "checkpoint-000002" / "model")
    components = build_components(config, saved)
    with components.teacher.on_device():
        assert torch.equal(components.teacher.forward(batch).block(0, 5), first)
    assert not torch.equal(components.student.logits(batch).block(0, 5), first)
