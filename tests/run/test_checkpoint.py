"""Checkpoints: whole or absent, the newest kept, moments restored bit by bit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tutelage.errors import RunError
from tutelage.models.load import load_model, load_tokenizer
from tutelage.models.optimizer import MasterWeights
from tutelage.run.checkpoint import (
    checkpoint_path,
    list_checkpoints,
    load_optimizer,
    save_checkpoint,
)


def trained(models: Path, seed: int = 0) -> tuple[Any, torch.optim.Optimizer]:
    """A model and an optimizer that has taken two steps along random gradients."""
    model = load_model(str(models / "student"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return model, optimizer


def parts_of(models: Path, model: Any) -> Any:
    """What a checkpoint needs of a run's parts."""
    tokenizer = load_tokenizer(str(models / "student"))
    weights = [p for p in model.parameters() if p.requires_grad]
    student = SimpleNamespace(model=model)
    return SimpleNamespace(student=student, masters=MasterWeights(weights), tokenizer=tokenizer)


def save(run: Path, step: int, models: Path, keep: int = 2) -> Path:
    model, optimizer = trained(models, seed=step)
    return save_checkpoint(run, step, parts_of(models, model), optimizer, keep)


def state_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return [state[i][name] for i in sorted(state) for name in sorted(state[i])]


def test_weights_and_moments_come_back_bit_by_bit(tmp_path: Path, tiny_models: Path) -> None:
    path = save(tmp_path, 3, tiny_models)
    model, optimizer = trained(tiny_models, seed=3)
    again = AutoModelForCausalLM.from_pretrained(path / "model")
    fresh = torch.optim.AdamW(again.parameters(), lr=0.5)
    load_optimizer(path, parts_of(tiny_models, again), fresh)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    found, expected = state_of(fresh), state_of(optimizer)
    assert len(expected) == 3 * len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert fresh.param_groups[0]["lr"] == 0.5  # the schedule sets it, not the checkpoint
    assert json.loads((path / "state.json").read_text()) == {"step": 3}


def test_only_the_newest_are_kept_and_sorted_by_number(tmp_path: Path, tiny_models: Path) -> None:
    for step in (2, 9, 10, 11):
        save(tmp_path, step, tiny_models, keep=3)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [9, 10, 11]
    assert not checkpoint_path(tmp_path, 2).exists()
    assert list_checkpoints(tmp_path)[-1][1] == checkpoint_path(tmp_path, 11)


def test_a_checkpoint_that_never_became_whole_is_invisible(
    tmp_path: Path, tiny_models: Path
) -> None:
    good = save(tmp_path, 1, tiny_models)
    torn = tmp_path / f".checkpoint-000002.{os.getpid() + 1}.tmp"
    shutil.copytree(good, torn)
    without_state = checkpoint_path(tmp_path, 3)
    shutil.copytree(good, without_state)
    (without_state / "state.json").unlink()
    (tmp_path / "checkpoint-old").mkdir()
    assert list_checkpoints(tmp_path) == [(1, good)]


def test_saving_again_replaces_a_torn_attempt_and_leaves_nothing_temporary(
    tmp_path: Path, tiny_models: Path
) -> None:
    torn = tmp_path / f".checkpoint-000002.{os.getpid()}.tmp"
    torn.mkdir()
    (torn / "junk").write_text("half a file")
    path = save(tmp_path, 2, tiny_models)
    assert sorted(p.name for p in path.iterdir()) == [
        "model",
        "optimizer.safetensors",
        "state.json",
    ]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_failure_while_writing_keeps_the_older_checkpoint(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = save(tmp_path, 1, tiny_models, keep=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tutelage.run.checkpoint.save_file", full)
    with pytest.raises(RunError, match=r"No space left on device.*Earlier checkpoints are untou"):
        save(tmp_path, 2, tiny_models, keep=1)
    monkeypatch.undo()
    assert list_checkpoints(tmp_path) == [(1, good)]
    assert [p.name for p in tmp_path.iterdir()] == [good.name]


@pytest.mark.parametrize("damage", ["truncate", "delete", "foreign"])
def test_a_damaged_optimizer_file_is_one_line(
    tmp_path: Path, tiny_models: Path, damage: str
) -> None:
    path = save(tmp_path, 1, tiny_models)
    file = path / "optimizer.safetensors"
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "delete":
        file.unlink()
    model = load_model(str(tiny_models / "student"))
    if damage == "foreign":
        model.model.norm.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    message = "which the model does not have" if damage == "foreign" else "cannot be read"
    with pytest.raises(RunError, match=message) as caught:
        load_optimizer(path, parts_of(tiny_models, model), torch.optim.AdamW(parameters))
    assert "\n" not in str(caught.value)
