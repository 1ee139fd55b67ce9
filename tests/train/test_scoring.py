"""Scores from the states that tokens were drawn from: the same choice, without another pass."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import tutelage.models.student
from tiny import tiny_config
from tutelage.core import TokenSelection
from tutelage.data.batch import Batch
from tutelage.data.types import Rollout
from tutelage.errors import RunError
from tutelage.setup.components import build_components
from tutelage.train.distributed import StepRows
from tutelage.train.loop import train
from tutelage.train.step import Step

METHOD: dict[str, Any] = {
    "selection": {"rule": "soft_or", "keep": 0.4},
    "objective": {"kind": "eopd", "estimator": "sampled"},
    "sampling": {"num_samples": 2, "max_new_tokens": 20},
}


class Watched(Step):
    """Remembers what it chose, and can spoil what was recorded."""

    chosen: list[list[int]]
    spoil: float = 0.0

    def choose(self, gathered: StepRows, step: int) -> TokenSelection:
        chosen = super().choose(gathered, step)
        self.chosen.append(chosen.rows.tolist())
        return chosen

    def generate(self, step: int) -> list[Rollout]:
        drawn = super().generate(step)
        if not self.spoil:
            return drawn
        spoilt = [(r, r.hidden * (1 + self.spoil)) for r in drawn if r.hidden is not None]
        return [replace(rollout, hidden=hidden) for rollout, hidden in spoilt]


def stepper(models: Path, **changes: Any) -> Watched:
    config = tiny_config(models, Path("unused"), **(METHOD | changes))
    components = build_components(config)
    descent = torch.optim.SGD(
        [p for p in components.student.parameters() if p.requires_grad], lr=0.1
    )
    step = Watched(config, components, Accelerator(cpu=True), components.student, descent)
    step.chosen = []
    return step


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every pass of the student's backbone over a batch, whether it has a gradient."""
    seen: list[bool] = []
    plain = tutelage.models.student.hidden_rows

    def counted(model: Any, batch: Batch) -> torch.Tensor:
        seen.append(torch.is_grad_enabled())
        return plain(model, batch)

    monkeypatch.setattr(tutelage.models.student, "hidden_rows", counted)
    return seen


@pytest.mark.parametrize("num_updates", [1, 2])
def test_recorded_states_choose_as_a_pass_of_their_own(
    tiny_models: Path, passes: list[bool], num_updates: int
) -> None:
    taken = {}
    for scoring in ("recorded", "forward"):
        step = stepper(tiny_models, scoring=scoring, updates_per_step=num_updates)
        metrics = [step.take(1)]
        passes.clear()
        metrics.append(step.take(2))
        batches = passes.count(True)
        assert passes.count(False) == (0 if scoring == "recorded" else batches)
        taken[scoring] = (step.chosen, metrics, step.components.student.state_dict())
    (rows, metrics, weights), (expected, others, plain) = taken["recorded"], taken["forward"]
    assert rows == expected
    for found, other in zip(metrics, others, strict=True):
        for key in ("loss", "grad_norm", "entropy_nats", "reverse_kl_nats"):
            assert found[key] == pytest.approx(other[key], rel=1e-4)
    gap = max(float((weights[name] - plain[name]).abs().max()) for name in plain)
    assert gap <= 1e-5
    assert 0 <= metrics[0]["max_relative_hidden_gap"] < 1e-4
    assert metrics[1]["max_relative_hidden_gap"] is None  # one step is enough, and the cheapest
    assert others[0]["max_relative_hidden_gap"] is None


def test_states_that_are_not_the_tokens_own_stop_the_run(tiny_models: Path) -> None:
    """Negative control: one percent off is found, and nothing is learned."""
    step = stepper(tiny_models)
    step.spoil = 0.01
    before = [p.detach().clone() for p in step.components.student.parameters()]
    with pytest.raises(RunError, match=r"differ from a fresh forward pass by .* Use scoring ="):
        step.take(1)
    assert all(map(torch.equal, before, step.components.student.parameters()))


@pytest.mark.parametrize("factor", [1.0, 1000.0])
def test_a_massive_activation_hides_no_other_row(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """Half precision: one row is far larger than the others, of which one is wrong by a half."""
    student = build_components(tiny_config(tiny_models, Path("unused"))).student
    fresh = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    fresh[0] *= factor
    known = fresh.clone()
    known[3] *= 1.5
    monkeypatch.setattr(tutelage.models.student, "hidden_rows", lambda *_: fresh)
    gap, limit = student.hidden_gap(None, known)  # type: ignore[arg-type]
    assert gap == pytest.approx(0.5, rel=0.01)
    assert gap > limit


def test_rounding_may_send_some_tokens_to_other_experts(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minority of the rows of a mixture may differ by any amount, but not most of them."""
    student = build_components(tiny_config(tiny_models, Path("unused"))).student
    fresh = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    monkeypatch.setattr(tutelage.models.student, "hidden_rows", lambda *_: fresh)
    known = fresh.clone()
    known[:2] *= 1.5
    gap, limit = student.hidden_gap(None, known)  # type: ignore[arg-type]
    assert gap > limit
    student.model.model.experts = torch.nn.Linear(2, 2)
    gap, limit = student.hidden_gap(None, known)  # type: ignore[arg-type]
    assert gap <= limit
    known[2] *= 1.5
    gap, limit = student.hidden_gap(None, known)  # type: ignore[arg-type]
    assert gap > limit


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_products_in_8_bits_are_rounding_too(tiny_models: Path) -> None:
    """They round their inputs, which differ in the last bits with the batch, to 8 bits."""
    student = {"model": str(tiny_models / "student"), "quantization": "8bit", "lora": {"rank": 2}}
    gap = stepper(tiny_models, student=student).take(1)["max_relative_hidden_gap"]
    assert 1e-3 < gap < 0.1
    step = stepper(tiny_models, student=student)
    step.spoil = 0.2
    with pytest.raises(RunError, match="differ from a fresh forward pass"):
        step.take(1)


def test_dropout_is_off_while_tokens_are_scored(tiny_models: Path) -> None:
    """An adapter with dropout: recorded states still are those that scoring would compute."""
    lora = {"rank": 4, "dropout": 0.5}
    student = {"model": str(tiny_models / "student"), "lora": lora}
    taken = [stepper(tiny_models, scoring=s, student=student) for s in ("recorded", "forward")]
    first, second = (step.take(1) for step in taken)
    assert first["max_relative_hidden_gap"] < 1e-4
    assert taken[0].chosen == taken[1].chosen
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)


@pytest.mark.parametrize("scoring", ["recorded", "forward"])
def test_a_continued_run_repeats_every_bit(tmp_path: Path, tiny_models: Path, scoring: str) -> None:
    changes = METHOD | {"scoring": scoring, "updates_per_step": 2, "checkpoint_every": 2}
    lines = {}
    for name in ("whole", "continued"):
        config = tiny_config(tiny_models, tmp_path / name, **changes)
        if name == "continued":  # as if the run had died after its checkpoint
            optimizer = replace(config.optimizer, schedule="constant")
            config = replace(config, optimizer=optimizer)
            train(replace(config, num_steps=2), log=lambda _: None)
            train(config, allow_change=("num_steps",), log=lambda _: None)
        else:
            config = replace(config, optimizer=replace(config.optimizer, schedule="constant"))
            train(config, log=lambda _: None)
        text = (tmp_path / name / "metrics.jsonl").read_text()
        lines[name] = [line.partition('"seconds"')[0] for line in text.splitlines()]
    assert lines["continued"] == lines["whole"]
    assert len(lines["whole"]) == 4
    weights = [tmp_path / name / "student" / "model.safetensors" for name in lines]
    assert weights[0].read_bytes() == weights[1].read_bytes()
