"""Whole runs of a tiny pair on the ledger task: metrics, resume, refusals, export."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tiny import MEASURED, tiny_config
from tutelage.config.schema import Config
from tutelage.data.types import Rollout
from tutelage.errors import ModelError, RunError
from tutelage.files.checksums import seal
from tutelage.models.load import load_model
from tutelage.train.checkpoint import list_checkpoints
from tutelage.train.loop import RunResult, train
from tutelage.train.step import Step
from tutelage.train.token_scores import ScoreRequest, score

PROMISED = {
    "step",
    "loss",
    "num_rows",
    "num_kept",
    "reverse_kl_nats",
    "entropy_nats",
    "grad_norm",
    "num_skipped_updates",
    "num_memory_splits",
    "learning_rate",
    "seconds",
    "peak_rss_bytes",
}


class Events:
    """What a run said and measured; optionally asks it to stop after a step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.lines: list[str] = []
        self.steps: list[dict[str, Any]] = []
        self.stop_after = stop_after

    def on_step(self, metrics: dict[str, Any]) -> None:
        self.steps.append(metrics)
        if metrics["step"] == self.stop_after:
            signal.raise_signal(signal.SIGINT)


def go(config: Config, events: Events | None = None, allow: tuple[str, ...] = ()) -> RunResult:
    events = events or Events()
    return train(config, allow_change=allow, log=events.lines.append, on_step=events.on_step)


def read(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Logged lines, without times and memory."""
    lines = (folder / name).read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in MEASURED} for x in lines]


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }


def assert_same_run(found: Path, expected: Path) -> None:
    """Bit by bit: every logged number, the last weights and moments, the exported student."""
    for name in ("metrics.jsonl", "evaluation.jsonl", "samples.jsonl"):
        assert read(found, name) == read(expected, name)
    last = "checkpoint-000004"
    assert digest(found / last) == digest(expected / last) != {}
    assert digest(found / "student") == digest(expected / "student") != {}


SOFT_OR = {"rule": "soft_or", "keep": 0.5}
EVALUATION = {"num_problems": 2, "num_samples": 2, "every": 2}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    """Four steps with Soft-OR and evaluations, never interrupted."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    config = tiny_config(tiny_models, out, selection=SOFT_OR, evaluation=EVALUATION)
    assert go(config) == RunResult(out, 4, True)
    return out


@pytest.fixture
def resumed(tmp_path: Path, tiny_models: Path) -> Config:
    """The configuration of `unbroken` in another folder."""
    return tiny_config(tiny_models, tmp_path / "run", selection=SOFT_OR, evaluation=EVALUATION)


@pytest.mark.parametrize(
    ("rule", "keep"),
    [("soft_or", "0.5"), ("entropy", "0.5"), ("q3", "0.1"), ("random", "0.29"), ("all", "1")],
)
def test_exactly_the_promised_rows_are_trained(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch, rule: str, keep: str
) -> None:
    lengths: list[list[int]] = []
    write: Callable[[Step, int], list[Rollout]] = Step.generate

    def recorded(self: Step, step: int) -> list[Rollout]:
        drawn = write(self, step)
        lengths.append([len(r.completion_ids) for r in drawn])
        return drawn

    monkeypatch.setattr(Step, "generate", recorded)
    selection = {"rule": rule} | ({} if rule == "all" else {"keep": float(keep)})
    out = tmp_path / "run"
    go(tiny_config(tiny_models, out, selection=selection, num_steps=3))
    metrics = read(out)
    assert [m["step"] for m in metrics] == [1, 2, 3]
    for m, completions in zip(metrics, lengths, strict=True):
        assert m["num_rows"] == sum(completions)
        budget = [max(1, math.floor(Fraction(keep) * length)) for length in completions]
        assert m["num_kept"] == sum(budget)
        assert m["completion_length_mean"] == sum(completions) / len(completions)
    assert len({tuple(x) for x in lengths}) > 1  # ragged, and new at every step


def test_metrics_hold_what_is_promised(unbroken: Path) -> None:
    lines = (unbroken / "metrics.jsonl").read_text().splitlines()
    for line in lines:
        metrics = json.loads(line)
        assert metrics.keys() >= PROMISED
        assert metrics["seconds"].keys() == {"rollout_s", "teacher_s", "score_s", "learn_s"}
        assert metrics["peak_rss_bytes"].keys() == {"rollout", "teacher", "score", "learn"}
        assert metrics["num_nonfinite"] == 0
        assert metrics["grad_norm"] > 0
        assert sum(q["share"] for q in metrics["quadrants"].values()) == pytest.approx(1)
    evaluated = [(e["step"], e["model"]) for e in read(unbroken, "evaluation.jsonl")]
    assert evaluated == [(0, "teacher"), (0, "student"), (2, "student"), (4, "student")]


def test_training_lowers_the_divergence_it_trains_on(tmp_path: Path, tiny_models: Path) -> None:
    optimizer = {"learning_rate": 5e-3, "schedule": "constant"}
    config = tiny_config(tiny_models, tmp_path / "run", optimizer=optimizer, num_steps=12)
    go(config)
    losses = [m["loss"] for m in read(tmp_path / "run")]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_stopped_run_continues_bit_by_bit(
    unbroken: Path, resumed: Config, stop_after: int
) -> None:
    folder = Path(str(resumed.out))
    first = Events(stop_after)
    assert go(resumed, first) == RunResult(folder, stop_after, False)
    assert first.lines[-1] == (
        f"stopped after step {stop_after}; the same command continues from there"
    )
    assert not (folder / "lock").exists()
    second = Events()
    assert go(resumed, second) == RunResult(folder, 4, True)
    assert second.lines[0].endswith(f"continues: found checkpoint-00000{stop_after} of 4")
    assert [m["step"] for m in second.steps] == list(range(stop_after + 1, 5))
    assert read(folder) == read(unbroken)
    assert digest(folder / "checkpoint-000004") == digest(unbroken / "checkpoint-000004")
    assert digest(folder / "student") == digest(unbroken / "student")


def test_a_run_that_lost_everything_after_a_checkpoint_repeats_it_bit_by_bit(
    unbroken: Path, resumed: Config
) -> None:
    """As after a power cut: the logs are ahead of the last checkpoint, one line is torn."""
    folder = Path(str(resumed.out))
    shutil.copytree(unbroken, folder)
    shutil.rmtree(folder / "checkpoint-000004")
    shutil.rmtree(folder / "student")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    events = Events()
    go(resumed, events)
    assert [m["step"] for m in events.steps] == [3, 4]
    assert_same_run(folder, unbroken)


def test_another_seed_or_state_would_not_pass_for_the_same_run(
    unbroken: Path, tmp_path: Path, tiny_models: Path
) -> None:
    """Negative control: the comparison sees a seed, and a continuation without its moments."""
    out = tmp_path / "seed"
    go(tiny_config(tiny_models, out, selection=SOFT_OR, seed=1))
    assert [m["loss"] for m in read(out)] != [m["loss"] for m in read(unbroken)]

    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    shutil.rmtree(folder / "checkpoint-000004")
    moments = folder / "checkpoint-000002" / "optimizer.safetensors"
    save_file({name: torch.zeros_like(x) for name, x in load_file(moments).items()}, moments)
    seal(moments.parent, {"step": 2})
    go(tiny_config(tiny_models, folder, selection=SOFT_OR, evaluation=EVALUATION))
    assert digest(folder / "checkpoint-000004") != digest(unbroken / "checkpoint-000004")


def test_evaluating_and_saving_in_between_change_nothing(
    unbroken: Path, tmp_path: Path, tiny_models: Path
) -> None:
    config = tiny_config(
        tiny_models,
        tmp_path / "run",
        selection=SOFT_OR,
        evaluation={"num_problems": 0},
        checkpoint_every=0,
    )
    go(config)
    assert read(tmp_path / "run") == read(unbroken)
    assert digest(tmp_path / "run" / "student") == digest(unbroken / "student")
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [4]


def test_a_finished_run_says_so_and_stays_as_it_is(unbroken: Path, resumed: Config) -> None:
    folder = Path(str(resumed.out))
    shutil.copytree(unbroken, folder)
    events = Events()
    assert go(resumed, events) == RunResult(folder, 4, True)
    finished = f"run {folder} is finished: found checkpoint-000004 of 4"
    assert events.lines == [finished, "1 process on cpu"]
    assert events.steps == []
    assert_same_run(folder, unbroken)


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"seed": 1}, "seed"),
        ({"optimizer": {"learning_rate": 1e-5}}, "optimizer.learning_rate"),
        ({"selection": {"rule": "soft_or", "keep": 0.4}, "num_steps": 5}, "num_steps, selection.k"),
    ],
)
def test_another_configuration_is_refused_for_the_same_folder(
    unbroken: Path, tiny_models: Path, change: dict[str, Any], keys: str
) -> None:
    base = {"selection": SOFT_OR, "evaluation": EVALUATION}
    with pytest.raises(RunError, match=f"holds another run: {keys}.*--allow-change KEY") as caught:
        go(tiny_config(tiny_models, unbroken, **(base | change)))
    assert "\n" not in str(caught.value)
    assert not (unbroken / "lock").exists()


def test_a_change_that_is_allowed_continues(
    unbroken: Path, tmp_path: Path, tiny_models: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    config = tiny_config(tiny_models, folder, selection=SOFT_OR, evaluation=EVALUATION, num_steps=5)
    events = Events()
    go(config, events, allow=("num_steps",))
    assert [m["step"] for m in events.steps] == [5]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["config"]["num_steps"] == 5


def test_the_exported_student_is_the_trained_one(unbroken: Path, tiny_models: Path) -> None:
    exported = AutoModelForCausalLM.from_pretrained(unbroken / "student")
    trained = AutoModelForCausalLM.from_pretrained(unbroken / "checkpoint-000004" / "model")
    start = AutoModelForCausalLM.from_pretrained(tiny_models / "student")
    ids = torch.tensor([[1, 5, 9, 20, 31]])
    with torch.no_grad():
        logits = [model(ids).logits for model in (exported, trained, start)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], atol=1e-3)
    assert "configuration fingerprint" in (unbroken / "student" / "README.md").read_text()


@pytest.mark.parametrize("is_same", [False, True])
def test_the_teacher_stays_as_it_is_without_gradient(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch, is_same: bool
) -> None:
    teachers: list[torch.nn.Module] = []
    take = Step.take

    def recorded(self: Step, step: int) -> dict[str, Any]:
        teachers.append(self.components.teacher.model)
        return take(self, step)

    monkeypatch.setattr(Step, "take", recorded)
    name = "student" if is_same else "teacher"
    out = tmp_path / "run"
    optimizer = {"learning_rate": 1e-2, "weight_decay": 0.1}
    teacher = {"model": str(tiny_models / name)}
    go(tiny_config(tiny_models, out, teacher=teacher, optimizer=optimizer, num_steps=2))
    before = load_model(str(tiny_models / name)).state_dict()
    after = teachers[-1].state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.grad is None and not p.requires_grad for p in teachers[-1].parameters())
    assert not teachers[-1].training
    if is_same:
        assert read(out)[0]["loss"] == pytest.approx(0.0, abs=1e-6)


def test_dividing_by_all_rows_only_rescales(tmp_path: Path, tiny_models: Path) -> None:
    first = {}
    for flag in (True, False):
        out = tmp_path / str(flag)
        go(tiny_config(tiny_models, out, selection=SOFT_OR, renormalize=flag, num_steps=1))
        first[flag] = read(out)[0]
    kept, rows = first[True]["num_kept"], first[True]["num_rows"]
    for key in ("loss", "grad_norm"):
        assert first[False][key] * rows == pytest.approx(first[True][key] * kept, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, -math.inf, 3e38])
def test_a_teacher_that_gives_no_numbers_is_named_before_anything_is_done(
    tmp_path: Path, tiny_models: Path, value: float
) -> None:
    """Weights that are no numbers, or numbers whose product overflows."""
    teacher = AutoModelForCausalLM.from_pretrained(tiny_models / "teacher")
    teacher.model.norm.weight.data.fill_(value)
    shutil.copytree(tiny_models / "teacher", tmp_path / "teacher")
    teacher.save_pretrained(tmp_path / "teacher")
    folder = str(tmp_path / "teacher")
    config = tiny_config(tiny_models, tmp_path / "run", teacher={"model": folder})
    for command in (go, lambda c: score(c, ScoreRequest())):
        with pytest.raises(ModelError, match=r"the teacher .* finite") as caught:
            command(config)
        assert repr(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not list_checkpoints(tmp_path / "run")


@pytest.mark.parametrize("rule", ["all", "soft_or"])
def test_a_teacher_that_gives_no_numbers_any_more_is_named(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    config = tiny_config(tiny_models, tmp_path / "run", selection={"rule": rule})

    def spoiled(step: Step, number: int) -> dict[str, Any]:
        step.components.teacher.model.model.norm.weight.data.fill_(math.nan)
        return take(step, number)

    take = Step.take
    monkeypatch.setattr(Step, "take", spoiled)
    name = re.escape(repr(str(tiny_models / "teacher")))
    with pytest.raises(RunError, match=f"step 1 are not finite, so the teacher {name} gives"):
        go(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_without_out_the_folder_is_named_after_configuration_and_fingerprint(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = replace(tiny_config(tiny_models, tmp_path, num_steps=1), out=None)
    result = train(config, "my-run", log=lambda _: None)
    assert result.folder.parent == Path("runs")
    assert result.folder.name.startswith("my-run-")
    assert (tmp_path / result.folder / "metrics.jsonl").exists()
