"""The teacher's hidden states with stored rollouts: the steps are equal and need its head alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import tiny_config
from tiny_runs import are_equal, metrics_of, run
from tutelage.config.parse import parse_config
from tutelage.core import LazyLogits
from tutelage.errors import ConfigError, RunError, TutelageError
from tutelage.models.stored_teacher import StoredTeacher, write_head
from tutelage.models.teacher import Teacher
from tutelage.setup import components
from tutelage.setup.validate import validate
from tutelage.train import loop
from tutelage.train.stored import store
from tutelage.train.stored.states import States

PLAIN = {"source": "stored"}
STORED = PLAIN | {"teacher_states": "float32"}
METHODS: dict[str, dict[str, Any]] = {
    "kl": {},
    "selection": {"selection": {"rule": "soft_or", "keep": 0.5}, "updates_per_step": 2},
    "packed": {"micro_batches": "packed", "objective": {"kind": "sampled"}},
    "reload": {"teacher": {"mode": "reload"}},
}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("packed", "reload")]


@pytest.mark.parametrize("method", ["kl", "selection", *SLOW])
def test_a_run_equals_one_whose_teacher_runs_in_every_step(
    tiny_models: Path, tmp_path: Path, method: str
) -> None:
    changes = METHODS[method] | {"num_steps": 2}
    expected = run(tiny_models, tmp_path / "plain", rollouts=PLAIN, **changes)
    found = run(tiny_models, tmp_path / "states", rollouts=STORED, **changes)
    assert are_equal(expected, found)
    assert metrics_of(tmp_path / "plain") == metrics_of(tmp_path / "states")


def test_the_first_step_equals_live(tiny_models: Path, tmp_path: Path) -> None:
    live = run(tiny_models, tmp_path / "live", num_steps=1)
    assert are_equal(live, run(tiny_models, tmp_path / "states", num_steps=1, rollouts=STORED))


def test_half_of_the_bits_round(tiny_models: Path, tmp_path: Path) -> None:
    """The negative control: the states in the store are those that the steps have."""
    run(tiny_models, tmp_path / "plain", rollouts=PLAIN, num_steps=1)
    half = STORED | {"teacher_states": "bfloat16"}
    run(tiny_models, tmp_path / "half", rollouts=half, num_steps=1)
    losses = [metrics_of(tmp_path / name)[0]["loss"] for name in ("plain", "half")]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("the teacher was used")


def test_the_teacher_may_be_gone_once_its_states_are_stored(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = shutil.copytree(tiny_models, tmp_path / "models")
    changes: dict[str, Any] = {"rollouts": STORED}
    changes["evaluation"] = {"num_problems": 2, "num_samples": 1, "every": 2}
    expected = run(models, tmp_path / "whole", **changes)
    kept = States.fill
    with monkeypatch.context() as patch:

        def fills(self: States, *arguments: Any) -> None:
            kept(self, *arguments)
            patch.setattr(Teacher, "forward", never)
            shutil.rmtree(models / "teacher")

        patch.setattr(States, "fill", fills)
        assert are_equal(expected, run(models, tmp_path / "cut", **changes))
    shutil.rmtree(tmp_path / "cut/checkpoint-000004")
    shutil.rmtree(tmp_path / "cut/student")
    with monkeypatch.context() as patch:
        patch.setattr(components, "load_teacher", never)
        assert are_equal(expected, run(models, tmp_path / "cut", **changes))
    logs = [(tmp_path / out / "evaluation.jsonl").read_text() for out in ("whole", "cut")]
    assert logs[0] == logs[1]
    rows = [json.loads(line) for line in logs[0].splitlines()]
    nats = [row["held_out_reverse_kl_nats"] for row in rows if row["model"] == "student"]
    assert nats[0] > 0
    assert nats[1:] == [None, None]
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "cut")
    manifests = [json.loads((tmp_path / x / "manifest.json").read_text()) for x in ("whole", "cut")]
    assert manifests[0]["inputs"] == manifests[1]["inputs"]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("at", [2, pytest.param("head", marks=pytest.mark.slow)])
def test_a_run_that_died_while_states_were_stored_goes_on(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int | str
) -> None:
    expected = run(tiny_models, tmp_path / "whole", rollouts=STORED, num_steps=2)
    write, wrote = store.Store.write, []

    def dies(self: store.Store, step: int | str, filled: Callable[[Path], None]) -> None:
        def half(folder: Path) -> None:
            filled(folder)
            if self.folder.name == "teacher":
                wrote.append(step)
                if step == at and wrote.count(at) == 1:
                    raise Interrupted

        write(self, step, half)

    monkeypatch.setattr(store.Store, "write", dies)
    with pytest.raises(Interrupted):
        run(tiny_models, tmp_path / "cut", rollouts=STORED, num_steps=2)
    found = run(tiny_models, tmp_path / "cut", rollouts=STORED, num_steps=2)
    assert wrote == ([1, 2, 2, "head"] if at == 2 else [1, 2, "head", "head"])
    assert are_equal(expected, found)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "cut")


def refused(models: Path, out: Path, **changes: Any) -> str:
    with pytest.raises(TutelageError) as caught:
        loop.train(tiny_config(models, out, **changes), log=lambda _: None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_damaged_states_are_one_line(tiny_models: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "run", {"rollouts": STORED, "num_steps": 2, "checkpoint_every": 1}
    run(tiny_models, out, **again)
    shutil.rmtree(out / "checkpoint-000002")
    shutil.rmtree(out / "student")
    states = out / "rollouts/teacher"
    whole = shutil.copytree(states, tmp_path / "copy")
    part = states / "step-000002/states.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    found = refused(tiny_models, out, **again)
    assert "step-000002 cannot be used: states.safetensors was changed" in found
    shutil.rmtree(part.parent)
    found = refused(tiny_models, out, **again)
    assert "the teacher's states of step 2 are not in" in found
    shutil.rmtree(states)
    shutil.copytree(whole, states)
    (states / "head/head.json").write_text("{}")
    found = refused(tiny_models, out, **again)
    assert "head cannot be used: head.json was changed" in found
    shutil.rmtree(states / "head")
    run(tiny_models, out, **again)  # the teacher is loaded once more


def test_a_head_is_read_as_it_was_written(tmp_path: Path) -> None:
    hidden, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    for swap in (None, (1, 3)):
        head = LazyLogits(hidden, weight, bias, 0.5, 7.0, swap)
        write_head(tmp_path, head)
        found = replace(StoredTeacher.read(tmp_path, torch.device("cpu"))._left, hidden=hidden)
        assert torch.equal(found.block(0, 3), head.block(0, 3))


def test_states_of_other_tokens_are_refused(tiny_models: Path, tmp_path: Path) -> None:
    run(tiny_models, tmp_path, rollouts=STORED, num_steps=2)
    folder = tmp_path / "rollouts/teacher"
    teacher = StoredTeacher.read(folder / "head", torch.device("cpu"))
    teacher.open(folder / "step-000001")
    name, (tokens, hidden) = next(iter(teacher._rows.items()))
    teacher._rows[name] = (tokens + 1, hidden)

    class Batch:
        names = (name,)

    Batch.tokens = tokens  # type: ignore[attr-defined]
    with pytest.raises(RunError, match="of other tokens"):
        teacher.forward(Batch)  # type: ignore[arg-type]


def test_states_that_do_not_fit_are_refused_before_a_forward(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Teacher.forward
    monkeypatch.setattr(Teacher, "forward", never)
    found = refused(tiny_models, tmp_path, rollouts=STORED | {"max_bytes": 60_000})
    assert "storing the teacher's states needs about" in found
    assert "rollouts.max_bytes = 60,000" in found
    monkeypatch.setattr(Teacher, "forward", forward)


def test_what_needs_the_teacher_is_refused(tiny_models: Path, tmp_path: Path) -> None:
    base = {"student": {"model": "a"}, "teacher": {"model": "b"}, "rollouts": STORED}
    with pytest.raises(ConfigError, match=r"recording.every must be 0 with rollouts.teacher"):
        parse_config(base | {"recording": {"every": 1}})
    with pytest.raises(ConfigError, match=r"teacher.sharding must be none"):
        parse_config(base | {"teacher": {"model": "b", "sharding": "fsdp2"}})
    mixed = {"source": "mixed", "on_policy_share": 0.5, "teacher_states": "float32"}
    with pytest.raises(ConfigError, match=r"belongs to rollouts.source stored"):
        parse_config(base | {"rollouts": mixed})
    with pytest.raises(ConfigError, match=r"works with one process, got 2"):
        validate(tiny_config(tiny_models, tmp_path, rollouts=STORED), tmp_path, 2)
