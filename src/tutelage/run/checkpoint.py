"""Checkpoints: an HF folder with the optimizer's tensors beside it, whole or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tutelage.errors import RunError
from tutelage.models.load import save_model

if TYPE_CHECKING:
    from tutelage.run.setup import Parts

_PREFIX = "checkpoint-"
_MASTER = "master"
"""Name of a float32 master weight among its moments."""
_NUMBER = "#"
"""Ends the name of an optimizer's entry that is a plain number."""


def checkpoint_path(run: Path, step: int) -> Path:
    """Folder of the checkpoint taken after `step` updates."""
    return run / f"{_PREFIX}{step:06d}"


def list_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint, oldest first."""
    found = []
    for path in run.glob(f"{_PREFIX}*"):
        number = path.name.removeprefix(_PREFIX)
        if number.isdigit() and (path / "state.json").exists():
            found.append((int(number), path))
    return sorted(found)


def save_checkpoint(
    run: Path,
    step: int,
    parts: Parts,
    optimizer: torch.optim.Optimizer,
    keep: int,
) -> Path:
    """Write weights, optimizer state and step, then drop checkpoints beyond the `keep` newest.

    Of a student with an adapter only the adapter is written; of one with master weights, both.

    No random state is saved because there is none: prompts, completions and random selections
    are functions of (seed, step).

    Raises:
        RunError: the disk is full or the folder cannot be written; older checkpoints stay.
    """
    final = checkpoint_path(run, step)
    temporary = run / f".{final.name}.{os.getpid()}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(mode=0o700)
        save_model(parts.student.model, parts.tokenizer, temporary / "model")
        save_file(_optimizer_tensors(parts, optimizer), temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step}) + "\n")
        _sync(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.replace(final)
        _sync_path(run)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"checkpoint {final} cannot be written: {error}. Earlier checkpoints are untouched; "
            "free some space and start the same command again."
        ) from None
    for _, old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return final


def load_optimizer(path: Path, parts: Parts, optimizer: torch.optim.Optimizer) -> None:
    """Restore the optimizer's state, and master weights, from a checkpoint.

    Raises:
        RunError: the file is damaged or belongs to another model.
    """
    file = path / "optimizer.safetensors"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{file} cannot be read: {error}. Delete {path} to use an older one."
        ) from None
    names = _parameter_names(parts)
    state: dict[int, dict[str, Tensor | int]] = {i: {} for i in range(len(names))}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("|")
        if name not in names:
            raise RunError(f"{file} has moments of {name!r}, which the model does not have.")
        index = names.index(name)
        if entry == _MASTER:
            parts.masters.masters[index].data.copy_(tensor)
        elif entry.endswith(_NUMBER):
            state[index][entry.removesuffix(_NUMBER)] = int(tensor)
        else:
            state[index][entry] = tensor
    groups = optimizer.state_dict()["param_groups"]
    filled = {index: entries for index, entries in state.items() if entries}
    optimizer.load_state_dict({"state": filled, "param_groups": groups})


def _optimizer_tensors(parts: Parts, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    masters = parts.masters
    both = zip(masters.weights, masters.masters, strict=True)
    for name, (weight, master) in zip(_parameter_names(parts), both, strict=True):
        if weight is not master:
            tensors[f"{name}|{_MASTER}"] = master.detach()
        for entry, value in optimizer.state[master].items():
            if isinstance(value, Tensor):
                # cloned where several weights share one table, which a file would refuse
                tensor = value.clone() if entry.startswith("qmap") else value
                tensors[f"{name}|{entry}"] = tensor.contiguous()
            elif value is not None:
                tensors[f"{name}|{entry}{_NUMBER}"] = torch.tensor(value)
    return tensors


def _parameter_names(parts: Parts) -> list[str]:
    """Names in the order in which the optimizer numbers its parameters."""
    named = parts.student.model.named_parameters()
    return [name for name, parameter in named if parameter.requires_grad]


def _sync(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        _sync_path(path)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
