"""Checkpoints and exports of a student whose weights lie in shards over the processes of a run.

They hold what those of whole weights do, under the same names.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from tutelage.files.checksums import seal
from tutelage.models.load import explained_save, fill_model_folder
from tutelage.models.optimizer import DiskAdamW
from tutelage.models.sharding import is_shard, local
from tutelage.models.student import Student, trained_names
from tutelage.models.weight_files import (
    assign_files,
    layer_of,
    save_weights,
    saved_weights,
    write_index,
)
from tutelage.train.agreement import in_all, in_main
from tutelage.train.checkpoint import (
    OPTIMIZER,
    checkpoint_path,
    explained_checkpoint,
    own_state,
    refuse_nonfinite,
    require_space,
    rotate,
    write_rollouts,
)
from tutelage.train.sharded_files import FILE_BYTES, Part, ShardedFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tutelage.setup.components import Components


def save_sharded_checkpoint(
    accelerator: Accelerator,
    run: Path,
    step: int,
    components: Components,
    optimizer: torch.optim.Optimizer,
    keep: int,
    rollouts: str = "",
    best: int | None = None,
) -> Path:
    """`save_checkpoint` of all processes together, each of which writes some of the files.

    Raises:
        RunError: as `save_checkpoint`, the same in every process; older checkpoints stay.
    """
    student, final = components.student, checkpoint_path(run, step)
    trained, state = trained_parts(student), _state_parts(accelerator, components, optimizer)
    saved = trained if _has_adapter(student) else _weight_parts(student)
    rounded = ((name, part.rounded()) for name, part in (trained | state).items())
    in_all(accelerator, lambda: refuse_nonfinite(step, rounded))
    num_bytes = sum(part.num_bytes for part in (saved | state).values())
    in_main(accelerator, lambda: require_space(run, num_bytes))
    explained = partial(explained_checkpoint, final)
    with ExitStack() as stack:
        if isinstance(optimizer, DiskAdamW):
            stack.callback(optimizer.release)
        folder = ShardedFolder(accelerator, final, explained, stack)
        _write_model(folder, "model", student, components.tokenizer, saved)
        files = assign_files(OPTIMIZER, {n: p.num_bytes for n, p in state.items()}, FILE_BYTES)
        folder.write(".", files, state, save_file)
        folder.by_main(lambda: write_rollouts(folder.path, rollouts))
        folder.by_main(lambda: seal(folder.path, {"step": step}, folder.checksums))
        folder.close()
    in_main(accelerator, lambda: rotate(run, keep, best))
    return final


def save_sharded_model(
    accelerator: Accelerator,
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
    target: Path,
    card: str,
) -> None:
    """`save_model` of all processes together, for a student without an adapter.

    Raises:
        RunError: as `save_model`, the same in every process.
    """
    with ExitStack() as stack:
        explained = partial(explained_save, target)
        folder = ShardedFolder(
            accelerator, target, explained, stack, is_private=False, replaces=True
        )
        _write_model(folder, ".", student, tokenizer, _weight_parts(student), card)
        folder.close()


def trained_parts(student: Student) -> dict[str, Part]:
    """Trained weights by name, in the model's dtype."""
    return _parts(student, {n: w for n, w in _named(student).items() if w.requires_grad})


def gathered_to_main(parts: dict[str, Part]) -> dict[str, Tensor]:
    """All tensors in the main process, none in others; every process has to call it."""
    found = {name: part.gathered_to(0) for name, part in parts.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _write_model(
    folder: ShardedFolder,
    place: str,
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
    parts: dict[str, Part],
    card: str | None = None,
) -> None:
    """A model folder, or for a student with an adapter the folder of the adapter."""
    plain, path = student.plain, folder.path / place

    def fill(tensors: dict[str, Tensor], _: Path | None = None) -> None:
        path.mkdir(exist_ok=True)
        fill_model_folder(plain, tokenizer, path, card, tensors)

    if _has_adapter(student):
        folder.write(place, {"adapter_model.safetensors": list(parts)}, parts, fill)
        return
    folder.by_main(lambda: fill({}))
    sizes = {name: part.num_bytes for name, part in parts.items()}
    files = assign_files("model", sizes, FILE_BYTES, layer_of(plain))
    written = folder.write(place, files, parts, partial(save_weights, plain))
    if len(files) > 1:
        folder.by_main(lambda: write_index(plain, written, path))


def _weight_parts(student: Student) -> dict[str, Part]:
    """What a model folder holds of this student."""
    return _parts(student, saved_weights(student.plain))


def _parts(student: Student, like: dict[str, Tensor]) -> dict[str, Part]:
    plain = student.plain.state_dict()
    named = _named(student)
    return {name: Part(local(named[name]), named[name], plain[name].dtype) for name in like}


def _named(student: Student) -> dict[str, Tensor]:
    model = student.model
    weights = model.named_parameters(remove_duplicate=False)
    return dict(weights) | dict(model.named_buffers(remove_duplicate=False))


def _state_parts(
    accelerator: Accelerator, components: Components, optimizer: torch.optim.Optimizer
) -> dict[str, Part]:
    """Moments and master weights; the main process, which has a row of each, lists them."""
    weights = dict(zip(trained_names(components.student), components.masters.weights, strict=True))
    own = own_state(components, optimizer)
    listed = {key: (t.dtype, None if t.dim() else t.cpu()) for key, t in own.items()}
    parts = {}
    for key, (dtype, number) in in_main(accelerator, lambda: listed).items():
        weight = weights[key.rpartition("|")[0]]
        if number is None and is_shard(weight):
            tensor = own.get(key, torch.empty_like(local(weight), dtype=dtype))
            parts[key] = Part(tensor, weight, dtype)
        else:
            tensor = own[key] if number is None else number
            parts[key] = Part(tensor, tensor, dtype)
    return parts


def _has_adapter(student: Student) -> bool:
    return bool(student.plain._hf_peft_config_loaded)
