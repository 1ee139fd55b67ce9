"""A step whose loss or gradient is not finite changes nothing, and is said aloud."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tiny import tiny_config
from tutelage.errors import RunError
from tutelage.models.student import Student, trained_names
from tutelage.setup.components import build_components
from tutelage.train.checkpoint import list_checkpoints
from tutelage.train.loop import train
from tutelage.train.step import Step


class Spoiler:
    """Puts a number into a gradient in some steps, as an overflow would."""

    def __init__(self, name: str, value: float, steps: set[int]) -> None:
        self.name, self.value, self.steps = name, value, steps

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backward, take = torch.Tensor.backward, Step.take
        now: list[Any] = []

        def spoiled_take(step: Step, number: int) -> dict[str, Any]:
            now[:] = [step.components.student.model, number]
            return take(step, number)

        def spoiled_backward(loss: torch.Tensor, *rest: Any) -> None:
            backward(loss, *rest)
            model, number = now
            if number in self.steps:
                model.get_parameter(self.name).grad.view(-1)[-1] = self.value

        monkeypatch.setattr(Step, "take", spoiled_take)
        monkeypatch.setattr(torch.Tensor, "backward", spoiled_backward)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def state_of(step: Step) -> list[torch.Tensor]:
    """All that learning may change."""
    moments = step.optimizer.state_dict()["state"]
    tensors = [moments[i][name] for i in sorted(moments) for name in sorted(moments[i])]
    return [t.clone() for t in (*step.components.student.parameters(), *tensors)]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_gradient_of_any_weight_leaves_weights_and_moments(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    config = tiny_config(tiny_models, tmp_path)
    components = build_components(config)
    optimizer = torch.optim.AdamW(components.student.parameters(), lr=1e-2, weight_decay=0.1)
    step = Step(config, components, Accelerator(cpu=True), components.student, optimizer)
    first = step.take(1)
    assert first["num_skipped_updates"] == 0
    assert "nonfinite" not in first
    before = state_of(step)
    for name in trained_names(components.student):
        with monkeypatch.context() as patch:
            Spoiler(name, value, {2}).install(patch)
            metrics = step.take(2)
        assert metrics["nonfinite"] == [name]
        assert (metrics["loss"], metrics["grad_norm"]) == (None, None)
        assert metrics["num_skipped_updates"] == 1
        assert all(torch.equal(a, b) for a, b in zip(before, state_of(step), strict=True))
    step.take(2)
    assert not all(torch.equal(a, b) for a, b in zip(before, state_of(step), strict=True))


def test_a_loss_that_is_no_number_is_a_skip_too(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny_models, tmp_path)
    components = build_components(config)
    optimizer = torch.optim.AdamW(components.student.parameters(), lr=1e-2)
    step = Step(config, components, Accelerator(cpu=True), components.student, optimizer)
    forward = Student.forward

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        found.total.data.fill_(torch.nan)
        return found

    before = state_of(step)
    monkeypatch.setattr(Student, "forward", spoiled)
    assert step.take(1)["nonfinite"] == ["the loss"]
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(step), strict=True))


def test_a_run_skips_says_so_and_goes_on(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Spoiler("model.norm.weight", torch.nan, {2}).install(monkeypatch)
    said: list[str] = []
    config = tiny_config(tiny_models, tmp_path / "run", max_skipped_steps=2)
    assert train(config, log=said.append).is_finished
    found = lines(tmp_path / "run")
    assert [m["num_skipped_updates"] for m in found] == [0, 1, 0, 0]
    assert [m["loss"] is None for m in found] == [False, True, False, False]
    line = "warning: step 2 skipped 1 of 1 updates: not finite in model.norm.weight"
    assert line in said


@pytest.mark.parametrize("resumed_after", [None, 2])
def test_several_in_a_row_end_the_run_before_anything_is_saved(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch, resumed_after: int | None
) -> None:
    """Also where some of them came before the run was continued."""
    Spoiler("model.norm.weight", torch.inf, {2, 3, 4}).install(monkeypatch)
    config = tiny_config(tiny_models, tmp_path / "run", checkpoint_every=2)
    if resumed_after:

        def stop(metrics: dict[str, Any]) -> None:
            if metrics["step"] == resumed_after:
                signal.raise_signal(signal.SIGTERM)

        assert train(config, log=lambda _: None, on_step=stop).step == resumed_after
    with pytest.raises(RunError, match=r"3 steps in a row .* model\.norm\.weight") as caught:
        train(config, log=lambda _: None)
    assert "\n" not in str(caught.value)
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [2]
    assert [m["step"] for m in lines(tmp_path / "run")] == [1, 2, 3, 4]
