"""Checkpoints: whole or absent, the newest kept, moments restored bit by bit."""

from __future__ import annotations

import concurrent.futures
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny import tiny_config
from tutelage.errors import RunError
from tutelage.files.atomic import new_folder
from tutelage.files.checksums import DamagedError, seal, unseal
from tutelage.models.load import load_model, load_tokenizer, save_model
from tutelage.models.optimizer import MasterWeights
from tutelage.train import checkpoint, checkpoint_thread
from tutelage.train.checkpoint import (
    checkpoint_path,
    list_checkpoints,
    load_optimizer,
    newest_checkpoint,
    save_checkpoint,
)
from tutelage.train.checkpoint_thread import CheckpointThread
from tutelage.train.loop import train


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


def components_of(models: Path, model: Any) -> Any:
    """What a checkpoint needs of a run's parts."""
    tokenizer = load_tokenizer(str(models / "student"))
    weights = [p for p in model.parameters() if p.requires_grad]
    student = SimpleNamespace(model=model, plain=model)
    return SimpleNamespace(student=student, masters=MasterWeights(weights), tokenizer=tokenizer)


def save(run: Path, step: int, models: Path, keep: int = 2) -> Path:
    model, optimizer = trained(models, seed=step)
    return save_checkpoint(run, step, components_of(models, model), optimizer, keep)


def state_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return [state[i][name] for i in sorted(state) for name in sorted(state[i])]


def test_weights_and_moments_come_back_bit_by_bit(tmp_path: Path, tiny_models: Path) -> None:
    path = save(tmp_path, 3, tiny_models)
    model, optimizer = trained(tiny_models, seed=3)
    again = AutoModelForCausalLM.from_pretrained(path / "model")
    fresh = torch.optim.AdamW(again.parameters(), lr=0.5)
    load_optimizer(path, components_of(tiny_models, again), fresh)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    found, expected = state_of(fresh), state_of(optimizer)
    assert len(expected) == 3 * len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert fresh.param_groups[0]["lr"] == 0.5  # the schedule sets it, not the checkpoint
    assert unseal(path) == {"step": 3}


def test_only_the_newest_are_kept_and_sorted_by_number(tmp_path: Path, tiny_models: Path) -> None:
    for step in (2, 9, 10, 11):
        save(tmp_path, step, tiny_models, keep=3)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [9, 10, 11]
    assert not checkpoint_path(tmp_path, 2).exists()
    assert list_checkpoints(tmp_path)[-1][1] == checkpoint_path(tmp_path, 11)


def test_what_is_no_checkpoint_is_invisible(tmp_path: Path, tiny_models: Path) -> None:
    good = save(tmp_path, 1, tiny_models)
    torn = tmp_path / f".checkpoint-000002.{os.getpid() + 1}.tmp"
    shutil.copytree(good, torn)
    (tmp_path / "checkpoint-old").mkdir()
    assert list_checkpoints(tmp_path) == [(1, good)]


def damage_seal(path: Path) -> None:
    (path / "state.json").write_text((path / "state.json").read_text().replace("  ", " ", 1))


def flip(path: Path, place: int = 1000) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (
        lambda p: flip(p / "optimizer.safetensors", -7),
        r"optimizer\.safetensors was changed",
    ),
    "cut short": (
        lambda p: os.truncate(p / "model" / "model.safetensors", 99),
        r"model/model\.safetensors was changed or cut short",
    ),
    "file gone": (lambda p: (p / "model" / "config.json").unlink(), r"config\.json is missing"),
    "file added": (lambda p: (p / "model" / "adapter_config.json").touch(), "does not belong"),
    "no seal": (lambda p: (p / "state.json").unlink(), r"state\.json is missing"),
    "a space in the seal": (damage_seal, r"state\.json was changed"),
    "an empty seal": (lambda p: (p / "state.json").write_text("[]"), "lists no files"),
    "another step": (lambda p: seal(p, {"step": 3}), "belongs to another step"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    tmp_path: Path, tiny_models: Path, name: str
) -> None:
    damage, why = DAMAGES[name]
    good, bad = save(tmp_path, 1, tiny_models), save(tmp_path, 2, tiny_models)
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append) == (2, bad)
    damage(bad)
    assert newest_checkpoint(tmp_path, said.append) == (1, good)
    assert len(said) == 1
    assert re.search(f"checkpoint-000002 is damaged.*{why}.*checkpoint-000001 is used", said[0])
    assert not bad.exists()
    assert (tmp_path / "checkpoint-000002.damaged").is_dir()
    save(tmp_path, 2, tiny_models, keep=1)  # the damaged one counts for nothing
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2]
    damage(bad)
    with pytest.raises(RunError, match=rf"no checkpoint of .* is whole; .*{why}") as caught:
        newest_checkpoint(tmp_path, said.append)
    assert "\n" not in str(caught.value)
    assert bad.is_dir()  # nothing is set aside where nothing takes its place


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path, print) is None


def test_every_byte_of_the_seal_is_sealed(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"abc")
    seal(tmp_path, {"step": 1})
    assert unseal(tmp_path) == {"step": 1}
    text = (tmp_path / "state.json").read_bytes()
    for place in range(len(text)):
        for bit in range(8):
            changed = bytearray(text)
            changed[place] ^= 1 << bit
            (tmp_path / "state.json").write_bytes(changed)
            with pytest.raises(DamagedError):
                unseal(tmp_path)


def test_numbers_that_are_not_finite_are_never_saved(tmp_path: Path, tiny_models: Path) -> None:
    good = save(tmp_path, 1, tiny_models, keep=1)
    model, optimizer = trained(tiny_models)
    weight = model.get_parameter("model.norm.weight")
    weight.data[3] = torch.inf
    with pytest.raises(RunError, match=r"model\.norm\.weight holds numbers that are not finite"):
        save_checkpoint(tmp_path, 2, components_of(tiny_models, model), optimizer, 1)
    weight.data[3] = 1.0
    optimizer.state[weight]["exp_avg"][0] = torch.nan
    with pytest.raises(RunError, match=r"norm\.weight\|exp_avg holds numbers that are not finite"):
        save_checkpoint(tmp_path, 2, components_of(tiny_models, model), optimizer, 1)
    assert list(tmp_path.iterdir()) == [good]


def test_a_disk_without_room_is_seen_before_anything_is_written(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = save(tmp_path, 1, tiny_models, keep=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=12345))
    with pytest.raises(
        RunError, match=r"needs [\d,]+ bytes and the disk of .* has 12,345 left"
    ) as e:
        save(tmp_path, 2, tiny_models, keep=1)
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == [good]


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

    monkeypatch.setattr("tutelage.train.checkpoint.save_file", full)
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
        load_optimizer(path, components_of(tiny_models, model), torch.optim.AdamW(parameters))
    assert "\n" not in str(caught.value)


def test_a_folder_is_flushed_then_renamed_then_its_name_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noted_replace(path: Path, target: Path) -> Path:
        events.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    with new_folder(tmp_path / "target") as temporary:
        (temporary / "below").mkdir()
        (temporary / "below" / "file").write_text("x")
        inode = temporary.stat().st_ino
    assert (tmp_path / "target").stat().st_ino == inode  # a copy would be there in part first
    place = events.index("rename")
    assert sorted(events[:place]) == sorted(["file", "below", temporary.name])
    assert events[place + 1 :] == [tmp_path.name]


def beside(models: Path, run: Path, seed: int = 3) -> tuple[Any, torch.optim.Optimizer, Any]:
    model, optimizer = trained(models, seed)
    components = components_of(models, model)
    components.device = torch.device("cpu")
    return model, optimizer, CheckpointThread(run, components, optimizer, keep=2)


def test_a_thread_writes_the_files_that_are_written_inline(
    tmp_path: Path, tiny_models: Path
) -> None:
    (tmp_path / "beside").mkdir()
    inline = save(tmp_path, 3, tiny_models)
    _, _, thread = beside(tiny_models, tmp_path / "beside")
    thread.save(3)
    thread.wait()
    thread.close()
    found = tmp_path / "beside" / inline.name
    files = sorted(p.relative_to(inline) for p in inline.rglob("*") if p.is_file())
    assert [p.relative_to(found) for p in sorted(found.rglob("*")) if p.is_file()] == files
    assert len(files) > 4
    assert all((found / f).read_bytes() == (inline / f).read_bytes() for f in files)


def test_what_changes_while_the_thread_writes_is_not_in_its_checkpoint(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, thread = beside(tiny_models, tmp_path)
    go = threading.Event()
    monkeypatch.setattr(
        checkpoint, "save_model", lambda *args, **kw: go.wait() and save_model(*args, **kw)
    )
    before = [p.detach().clone() for p in model.parameters()]
    moments = [t.clone() for t in state_of(optimizer)]
    thread.save(1)
    optimizer.step()  # weights, moments and counts change while nothing is written yet
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    go.set()
    thread.wait()
    path = checkpoint_path(tmp_path, 1)
    again = load_model(str(path / "model"))
    assert all(torch.equal(a, b) for a, b in zip(before, again.parameters(), strict=True))
    fresh = torch.optim.AdamW(again.parameters())
    load_optimizer(path, components_of(tiny_models, again), fresh)
    assert all(torch.equal(a, b) for a, b in zip(moments, state_of(fresh), strict=True))
    thread.close()


def test_a_thread_that_cannot_write_says_so_at_the_next_checkpoint(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, thread = beside(tiny_models, tmp_path)
    monkeypatch.setattr(checkpoint, "seal", raising(OSError(28, "No space left on device")))
    thread.save(1)
    with pytest.raises(RunError, match=r"checkpoint-000001 cannot be written: .*No space left"):
        thread.save(2)
    assert list_checkpoints(tmp_path) == []
    thread.close()


def test_a_look_tells_of_a_failure_at_once_and_waits_for_nothing(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, thread = beside(tiny_models, tmp_path)
    thread.look()  # nothing was written yet
    go = threading.Event()
    failed = raising(OSError(28, "No space left on device"))
    monkeypatch.setattr(checkpoint, "seal", lambda *args: go.wait() and failed(*args))
    thread.save(1)
    thread.look()  # it is still being written
    go.set()
    concurrent.futures.wait([thread._writing])
    with pytest.raises(RunError, match=r"checkpoint-000001 cannot be written: .*No space left"):
        thread.look()
    thread.look()  # told once
    thread.close()


def test_a_run_whose_thread_writes_equals_one_that_writes_inline(
    tmp_path: Path, tiny_models: Path
) -> None:
    for writer in ("thread", "inline"):
        config = tiny_config(
            tiny_models,
            tmp_path / writer,
            num_steps=3,
            checkpoint_every=1,
            checkpoint_writer=writer,
            evaluation={"num_problems": 0},
        )
        assert train(config, log=lambda _: None).is_finished
    one, other = (tmp_path / w / "checkpoint-000003" for w in ("thread", "inline"))
    assert unseal(one) == unseal(other)
    for name in ("optimizer.safetensors", "model/model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_large_states_lie_in_several_files_and_come_back(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_FILE_BYTES", 4096)
    path = save(tmp_path, 3, tiny_models)
    files = sorted(file.name for file in path.glob("optimizer*"))
    assert len(files) > 3
    assert files[0] == f"optimizer-00001-of-{len(files):05d}.safetensors"
    again = AutoModelForCausalLM.from_pretrained(path / "model")
    fresh = torch.optim.AdamW(again.parameters())
    load_optimizer(path, components_of(tiny_models, again), fresh)
    _, optimizer = trained(tiny_models, seed=3)
    found, expected = state_of(fresh), state_of(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_saving_leaves_the_standard_error_of_others_alone(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = (
        load_model(str(tiny_models / "student")),
        load_tokenizer(str(tiny_models / "student")),
    )
    before, seen = sys.stderr, []
    plain = type(model).save_pretrained

    def saved(*args: Any, **options: Any) -> Any:
        seen.append(sys.stderr is before)
        return plain(*args, **options)

    monkeypatch.setattr(type(model), "save_pretrained", saved)
    save_model(model, tokenizer, tmp_path / "model")
    assert seen == [True]


def test_a_copy_that_does_not_fit_is_refused_or_left_out(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_thread, "available_bytes", lambda device: 1000)
    cuda = torch.device("cuda")
    for writer, expected in (("auto", False), ("inline", False)):
        config = tiny_config(tiny_models, tmp_path / "run", checkpoint_writer=writer)
        assert checkpoint_thread.is_written_beside(config, cuda, 2000) is expected
    auto = tiny_config(tiny_models, tmp_path / "run")
    assert checkpoint_thread.is_written_beside(auto, cuda, 999)
    assert not checkpoint_thread.is_written_beside(auto, torch.device("cpu"), 999)
    config = tiny_config(tiny_models, tmp_path / "run", checkpoint_writer="thread")
    with pytest.raises(RunError, match=r"copies 2,000 bytes to main memory, of which 1,000 are"):
        checkpoint_thread.is_written_beside(config, cuda, 2000)
