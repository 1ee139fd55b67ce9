"""A model's weights in several safetensors files, each of which may be written by another process.

A folder of them is read by transformers' `from_pretrained` as any other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INDEX = "model.safetensors.index.json"


def assign_files(
    stem: str, sizes: Mapping[str, int], limit: int, unit_of: Callable[[str], str] = str
) -> dict[str, list[str]]:
    """Distribute tensors over files of at most `limit` bytes, in the order given.

    Args:
        stem: of the files' names.
        sizes: bytes of each tensor.
        limit: a unit of more bytes has a file of its own.
        unit_of: the unit of a tensor; neighbours of one unit are in one file.

    Returns:
        Names of tensors by file: `STEM.safetensors`, or `STEM-00001-of-00002.safetensors` and so
        on.
    """
    groups: list[list[str]] = [[]]
    size = 0
    for _, members in groupby(sizes, unit_of):
        unit = list(members)
        num_bytes = sum(sizes[name] for name in unit)
        if groups[-1] and size + num_bytes > limit:
            groups.append([])
            size = 0
        groups[-1] += unit
        size += num_bytes
    count = len(groups)
    if count == 1:
        return {f"{stem}.safetensors": groups[0]}
    numbers = (f"{i:05d}-of-{count:05d}" for i in range(1, count + 1))
    return {f"{stem}-{n}.safetensors": group for n, group in zip(numbers, groups, strict=True)}


def saved_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights that a model folder holds, by name in the model; tied ones have one name.

    Those on the meta device have shapes and dtypes alone.
    """
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = set(model._keys_to_ignore_on_save or ())
    found = remove_tied_weights_from_state_dict(model.state_dict(), model)
    return {name: weight for name, weight in found.items() if name not in ignored}


def layer_of(model: PreTrainedModel) -> Callable[[str], str]:
    """The layer of a weight by the weight's name; weights outside layers are units of their own.

    Files may hold the weights of a layer in other pieces than the model does, such as one tensor an
    expert.
    """
    kinds = set(model._no_split_modules or ())
    layers = [f"{name}." for name, m in model.named_modules() if type(m).__name__ in kinds]
    return lambda name: next((layer for layer in layers if name.startswith(layer)), name)


def save_weights(model: PreTrainedModel, weights: dict[str, Tensor], path: Path) -> dict[str, int]:
    """Write weights of whole layers to one file.

    Args:
        model: the model they belong to.
        weights: in main memory, by name in the model.
        path: the file.

    Returns:
        Bytes of each tensor by its name in the file, which may be another.
    """
    from transformers.core_model_loading import revert_weight_conversion

    saved = revert_weight_conversion(model, weights)
    saved = {name: weight.contiguous() for name, weight in saved.items()}
    save_file(saved, path, {"format": "pt"})
    return {name: weight.nbytes for name, weight in saved.items()}


def write_index(
    model: PreTrainedModel, files: Mapping[str, Mapping[str, int]], folder: Path
) -> None:
    """Write what `from_pretrained` needs where there are several files.

    Args:
        model: the model.
        files: bytes of each tensor, by the name of its file.
        folder: of the files.
    """
    sizes = [size for tensors in files.values() for size in tensors.values()]
    index = {
        "metadata": {"total_parameters": model.num_parameters(), "total_size": sum(sizes)},
        "weight_map": {name: file for file, tensors in files.items() for name in tensors},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / _INDEX).write_text(text, encoding="utf-8")
