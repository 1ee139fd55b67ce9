"""Checkpoints: an HF folder with the optimizer's tensors beside it, whole or not there at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tutelage.errors import RunError, remedy
from tutelage.files.atomic import discard, move, new_folder
from tutelage.files.checksums import DamagedError, seal, unseal
from tutelage.models.load import save_model
from tutelage.models.optimizer import DiskAdamW
from tutelage.models.sharding import is_shard, own_rows
from tutelage.models.student import trained_names
from tutelage.models.weight_files import assign_files

if TYPE_CHECKING:
    from tutelage.setup.components import Components

_PREFIX = "checkpoint-"
_MASTER = "master"
"""Name of a float32 master weight among its moments."""
_AVERAGE = "average"
"""Name of the average of a master weight among its moments."""
_NUMBER = "#"
"""Ends the name of an optimizer's entry that is a plain number."""
OPTIMIZER = "optimizer"
"""Stem of the files of an optimizer's state."""
ROLLOUTS = "rollouts.jsonl"
"""Completions of the step after a checkpoint, where they were sampled before it."""
_FILE_BYTES = 1 << 30
"""Most bytes of state in one file; more are written, and summed, by several threads."""
_NUM_THREADS = 8
_SPARE_BYTES = 16 << 20
"""Room that a checkpoint needs beside its tensors: tokenizer, headers, logs."""


def checkpoint_path(run: Path, step: int) -> Path:
    """Folder of the checkpoint taken after `step` updates."""
    return run / f"{_PREFIX}{step:06d}"


def list_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, oldest first; `newest_checkpoint` looks into them."""
    found = []
    for path in run.glob(f"{_PREFIX}*"):
        number = path.name.removeprefix(_PREFIX)
        if number.isdigit() and path.is_dir():
            found.append((int(number), path))
    return sorted(found)


def newest_checkpoint(run: Path, log: Callable[[str], None]) -> tuple[int, Path] | None:
    """(step, folder) of the newest checkpoint whose every byte is as it was written.

    Damaged ones after it are named, and set aside as `checkpoint-….damaged`.

    Raises:
        RunError: there are checkpoints, and all are damaged.
    """
    damaged: list[tuple[Path, str]] = []
    for step, path in reversed(list_checkpoints(run)):
        try:
            if unseal(path) != {"step": step}:
                raise DamagedError("it belongs to another step")
        except (DamagedError, OSError) as error:
            damaged.append((path, str(error)))
            continue
        _set_aside(damaged, path, log)
        return step, path
    if damaged:
        path, why = damaged[0]
        raise RunError(
            f"no checkpoint of {run} is whole; of {path.name}, {why}. "
            "Restore one, or delete them to start anew."
        )
    return None


def _set_aside(damaged: Iterable[tuple[Path, str]], used: Path, log: Callable[[str], None]) -> None:
    for path, why in damaged:
        aside = path.with_name(f"{path.name}.damaged")
        if aside.exists():
            discard(aside)
        move(path, aside)
        log(f"warning: {path.name} is damaged ({why}) and set aside; {used.name} is used")


@dataclass(frozen=True)
class Snapshot:
    """The numbers of one moment, which a checkpoint is written from."""

    step: int
    model: dict[str, Tensor] | None
    """Weights by name; None for those that the model holds while it is written."""
    optimizer: dict[str, Tensor]
    """Moments and master weights by name."""
    rollouts: str = ""
    """Lines of the next step's completions, where they were sampled already."""


def save_checkpoint(
    run: Path,
    step: int,
    components: Components,
    optimizer: torch.optim.Optimizer,
    keep: int,
    rollouts: str = "",
    best: int | None = None,
) -> Path:
    """Write weights, optimizer state and step, then drop checkpoints beyond the `keep` newest.

    The one of step `best` stays besides.

    Of a student with an adapter only the adapter is written; of one with master weights, both.

    No random state is saved because there is none: prompts, completions and random selections
    are functions of (seed, step).

    Raises:
        RunError: the disk is full, the folder cannot be written, or a number to be saved is not
            finite; older checkpoints stay.
    """
    tensors = savable_tensors(run, step, components, optimizer)
    try:
        snapshot = Snapshot(step, None, tensors, rollouts)
        return write_snapshot(run, snapshot, components, keep, best)
    finally:
        if isinstance(optimizer, DiskAdamW):
            optimizer.release()


def write_snapshot(
    run: Path, snapshot: Snapshot, components: Components, keep: int, best: int | None = None
) -> Path:
    """The part of `save_checkpoint` that needs no number but the snapshot's."""
    final = checkpoint_path(run, snapshot.step)
    with explained_checkpoint(final), new_folder(final) as temporary:
        model, folder = components.student.model, temporary / "model"
        save_model(model, components.tokenizer, folder, tensors=snapshot.model)
        _save_tensors(snapshot.optimizer, temporary)
        write_rollouts(temporary, snapshot.rollouts)
        seal(temporary, {"step": snapshot.step})  # reads every byte back
    rotate(run, keep, best)
    return final


def write_rollouts(folder: Path, lines: str) -> None:
    """Completions of the next step into a checkpoint's folder; no file where there are none."""
    if lines:
        (folder / ROLLOUTS).write_text(lines, encoding="utf-8")


@contextmanager
def explained_checkpoint(final: Path) -> Iterator[None]:
    """Turn an error of the disk into one line that names the checkpoint."""
    try:
        yield
    except (OSError, SafetensorError, RunError) as error:
        cause = error.__cause__ or error
        raise RunError(
            f"checkpoint {final} cannot be written: {_sentence(cause)} "
            f"Earlier checkpoints are untouched. {remedy(cause)}"
        ) from None


def _save_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    """`optimizer.safetensors`, or several files of at most `_FILE_BYTES`, written side by side."""
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    files = assign_files(OPTIMIZER, sizes, _FILE_BYTES)
    groups = [{name: tensors[name] for name in names} for names in files.values()]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        list(pool.map(save_file, groups, [folder / name for name in files]))


def savable_tensors(
    run: Path, step: int, components: Components, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Moments and master weights, once all of a checkpoint is known to be finite and to fit.

    Raises:
        RunError: it is not.
    """
    tensors = own_state(components, optimizer)
    weights = {
        name: p for name, p in components.student.model.named_parameters() if p.requires_grad
    }
    refuse_nonfinite(step, (weights | tensors).items())
    require_space(run, sum(t.nbytes for t in (*weights.values(), *tensors.values())))
    return tensors


def require_space(run: Path, num_bytes: int) -> None:
    """Refuse to fill a disk that has too little room for a checkpoint's tensors.

    Raises:
        RunError: the file system of `run` has fewer bytes left.
    """
    needed, free = num_bytes + _SPARE_BYTES, shutil.disk_usage(run).free
    if free < needed:
        raise RunError(
            f"a checkpoint needs {needed:,} bytes and the disk of {run} has {free:,} left. "
            "Checkpoints there are untouched; free some space and start the same command again."
        )


def rotate(run: Path, keep: int, best: int | None = None) -> None:
    """Drop all but the `keep` newest checkpoints, the newest of which is known to be whole.

    Args:
        run: the run folder.
        keep: how many stay.
        best: step of one more that stays.

    Raises:
        RunError: one cannot be removed.
    """
    for step, old in list_checkpoints(run)[:-keep]:
        if step == best:
            continue
        try:
            discard(old)
        except OSError as error:
            raise RunError(
                f"checkpoint {old} is no longer needed and cannot be removed: {error.strerror}. "
                "Remove it, then start the same command again."
            ) from None


def _sentence(error: BaseException) -> str:
    return str(error).removesuffix(".") + "."


def refuse_nonfinite(step: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise RunError(
                f"{name} holds numbers that are not finite after step {step}, so nothing was "
                "saved. Lower optimizer.learning_rate and start the same command again."
            )


def load_optimizer(path: Path, components: Components, optimizer: torch.optim.Optimizer) -> None:
    """Restore the optimizer's state, and master weights, from a checkpoint.

    Raises:
        RunError: the file is damaged or belongs to another model.
    """
    names = trained_names(components.student)
    masters = dict(zip(names, components.masters.masters, strict=True))
    weights = dict(zip(names, components.masters.weights, strict=True))
    # torch numbers weights in the order of the optimizer's groups, which need not be the model's
    updated = [master for group in optimizer.param_groups for master in group["params"]]
    number = {id(master): i for i, master in enumerate(updated)}
    place = {name: number[id(master)] for name, master in masters.items()}
    averages = dict(zip(names, components.masters.averages, strict=False))
    state: dict[int, dict[str, Tensor | int]] = {i: {} for i in range(len(updated))}
    for key, tensor in _own_tensors(path, weights):
        name, _, entry = key.rpartition("|")
        index = place[name]
        if entry == _MASTER:
            masters[name].data.copy_(tensor)
        elif entry == _AVERAGE:
            if averages:
                averages.pop(name).copy_(tensor)
        elif entry.endswith(_NUMBER):
            state[index][entry.removesuffix(_NUMBER)] = int(tensor)
        else:
            state[index][entry] = tensor
    if averages:
        raise RunError(
            f"{path} has no average of {min(averages)!r}: it was saved by a run without teacher."
            "weights = ema. Choose another out=FOLDER."
        )
    groups = optimizer.state_dict()["param_groups"]
    filled = {index: entries for index, entries in state.items() if entries}
    optimizer.load_state_dict({"state": filled, "param_groups": groups})


def has_own_master(weight: Tensor, master: Tensor, plain: Tensor) -> bool:
    """Whether a master is saved beside its weight.

    Args:
        weight: whole, or sharded.
        master: what the optimizer updates for it.
        plain: the weight in the model's dtype, with or without numbers.
    """
    return master.dtype != plain.dtype if is_shard(weight) else weight is not master


def _own_tensors(path: Path, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Of a checkpoint's moments and masters what belongs to this process; only that is read."""
    whole = path / f"{OPTIMIZER}.safetensors"
    for file in sorted(path.glob(f"{OPTIMIZER}-*.safetensors")) or [whole]:
        try:
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (it is no mapping)
                    weight = weights.get(key.rpartition("|")[0])
                    if weight is None:
                        raise RunError(
                            f"{file} has {key.rpartition('|')[2]} of {key.rpartition('|')[0]!r}, "
                            "which the model does not have."
                        )
                    yield key, _own_rows(tensors, key, weight)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"{file} cannot be read: {error}. Delete {path} to use an older one."
            ) from None


def _own_rows(tensors: Any, key: str, weight: Tensor) -> Tensor:
    """A tensor of a file, or of one cut as a sharded weight is the rows of this process."""
    if is_shard(weight) and tensors.get_slice(key).get_shape():
        rows: Tensor = tensors.get_slice(key)[own_rows(weight)]
        return rows
    tensor: Tensor = tensors.get_tensor(key)
    return tensor


def own_state(components: Components, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and master weights by name; of a sharded student the rows of this process."""
    tensors: dict[str, Tensor] = {}
    masters, plain = components.masters, dict(components.student.plain.named_parameters())
    names = trained_names(components.student)
    for name, average in zip(names, masters.averages, strict=False):
        tensors[f"{name}|{_AVERAGE}"] = average
    both = zip(masters.weights, masters.masters, strict=True)
    for name, (weight, master) in zip(names, both, strict=True):
        if has_own_master(weight, master, plain[name]):
            tensors[f"{name}|{_MASTER}"] = master.detach()
        for entry, value in optimizer.state[master].items():
            if isinstance(value, Tensor):
                # cloned where several weights share one table, which a file would refuse
                tensor = value.clone() if entry.startswith("qmap") else value
                tensors[f"{name}|{entry}"] = tensor.contiguous()
            elif value is not None:
                tensors[f"{name}|{entry}{_NUMBER}"] = torch.tensor(value)
    return tensors
