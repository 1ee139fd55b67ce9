"""Where a model reference leads, and whether the weights there are the model's.

A reference is a folder, a GGUF file, an installed package or a hub id.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import safe_open
from torch import nn

from tutelage.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_CONSTANTS = {"masked_bias", "causal_mask", "inv_freq", "original_inv_freq", "position_ids"}
_CONSTANTS |= {"embed_positions", "cos_cached", "sin_cached"}
"""Buffers that older versions of transformers saved among the weights."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model reference leads: a folder, one GGUF file in a folder, or a hub id."""

    ref: str
    """The reference as the user wrote it."""
    source: str
    """Folder or hub id."""
    gguf_file: str | None = None
    """Name of the GGUF file inside `source`; None for a transformers folder."""
    is_local: bool = True
    """False for a hub id."""
    adapter: str | None = None
    """Folder of an adapter that is merged into the model at `source`; None for a whole model."""


def resolve_model(ref: str) -> ResolvedModel:
    """Find what a model reference points to, without loading it.

    Args:
        ref: A folder (of a model, or of an adapter that names its base), a `.gguf` file,
            `package:NAME/sub/folder` (a folder or the only GGUF file of an installed package, which
            is not imported), or a hub id.

    Returns:
        The place to load from.

    Raises:
        ModelError: Nothing usable is there.
    """
    if ref.startswith("package:"):
        return _resolve_path(ref, _package_path(ref))
    path = Path(ref).expanduser()
    # os.path.exists: a name too long for the file system is absent, not an error
    if ref and (os.path.exists(path) or ref.endswith(".gguf")):
        return _resolve_path(ref, path)
    if _HUB_ID.fullmatch(ref) and "/" in ref:
        return ResolvedModel(ref, ref, is_local=False)
    raise ModelError(
        f"model {ref!r} does not exist. Give a folder, a .gguf file, package:NAME/folder or a "
        "hub id such as Qwen/Qwen3-0.6B."
    )


def tokenizer_place(ref: str) -> ResolvedModel:
    """Where the tokenizer of a model reference is: of an adapter, its own before its base's.

    Raises:
        ModelError: the reference leads nowhere.
    """
    found = resolve_model(ref)
    if found.adapter is not None and has_tokenizer(found.adapter):
        return ResolvedModel(ref, found.adapter)
    return found


def has_tokenizer(folder: str) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((Path(folder) / name).is_file() for name in TOKENIZER_FILES)


def _resolve_path(ref: str, path: Path) -> ResolvedModel:
    if path.is_file() and path.suffix == ".gguf":
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise ModelError(
                f"model {ref!r} is not a GGUF file, it starts with {magic!r}. Download it again."
            )
        return ResolvedModel(ref, str(path.parent), gguf_file=path.name)
    if not path.is_dir():
        raise ModelError(f"model {ref!r} does not exist: no folder or .gguf file {path}.")
    if (path / ADAPTER_CONFIG).is_file() or (path / ADAPTER_WEIGHTS).is_file():
        return _resolve_adapter(ref, path)
    if (path / "config.json").is_file():
        return ResolvedModel(ref, str(path))
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(
            f"model {ref!r} is not a model folder: {path} holds no config.json and "
            f"{len(files)} .gguf files. Name the folder or file that holds the model."
        )
    return _resolve_path(ref, files[0])


def _resolve_adapter(ref: str, path: Path) -> ResolvedModel:
    """The base that an adapter names, and the adapter."""
    whole = [
        file.name for file in sorted(path.glob("*.safetensors")) if file.name != ADAPTER_WEIGHTS
    ]
    if whole:
        raise ModelError(
            f"model {ref!r} holds whole weights ({whole[0]}) and an adapter ({ADAPTER_CONFIG}), "
            "which may be part of them already. Keep one of them in the folder."
        )
    base = _base_of(ref, path)
    if not (path / ADAPTER_WEIGHTS).is_file():
        raise ModelError(
            f"model {ref!r} is an adapter without {ADAPTER_WEIGHTS}; pickled weights are not read. "
            "Save it as safetensors."
        )
    beside = path / base
    place = beside if beside.is_dir() else Path(base)
    if (place / ADAPTER_CONFIG).is_file():
        raise ModelError(f"model {ref!r} is an adapter of an adapter, {base!r}. Merge one first.")
    found = resolve_model(str(beside) if beside.is_dir() else base)
    return replace(found, ref=ref, adapter=str(path))


def _base_of(ref: str, path: Path) -> str:
    try:
        settings = json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base = settings["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"model {ref!r} is an adapter that does not name its base. Write the base model's "
            f"folder or hub id as base_model_name_or_path into its {ADAPTER_CONFIG}."
        )
    return base


def _package_path(ref: str) -> Path:
    name, _, inside = ref.removeprefix("package:").partition("/")
    if not name.isidentifier() or ".." in Path(inside).parts:
        raise ModelError(f"model {ref!r} is malformed. Write package:NAME/folder/in/it.")
    # A top-level name: the package is located, none of its code runs.
    spec = importlib.util.find_spec(name)
    locations = [] if spec is None else list(spec.submodule_search_locations or [])
    if not locations:
        raise ModelError(f"model {ref!r} needs the package {name!r}. Install it with pip.")
    candidates = [Path(location) / inside for location in locations]
    return next((path for path in candidates if path.exists()), candidates[0])


class CausalClass(NamedTuple):
    """A class of transformers that gives logits for text."""

    auto: Any
    """The automatic class that loads it."""
    has_sdpa: bool
    """Whether it has fused attention; else only its own, eager one."""


def causal_class(config: PreTrainedConfig, ref: str) -> CausalClass:
    """The class of a causal language model, else of a model of images and text.

    The latter reads text alone as well; its vision layers stay as they are.

    Raises:
        ModelError: transformers has neither for this type.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            kind = found[0] if isinstance(found, tuple | list) else found
            return CausalClass(auto, bool(kind._supports_sdpa))
    raise ModelError(
        f"model {ref!r} is of type {config.model_type!r}, for which transformers has no causal "
        "language model. Use the whole model that it is a part of, or another one."
    )


def restore_padding_row(found: ResolvedModel, model: PreTrainedModel) -> None:
    """Give the padding token's embedding the file's numbers, in place.

    Some classes of transformers set it to zero after they have read it (Youtu). Where the head is
    tied, that row has been trained.
    """
    embeddings: Any = model.get_input_embeddings()
    index = embeddings.__dict__.get("padding_idx")
    if index is None:
        return
    names = {name for name, weight in model.named_parameters() if weight is embeddings.weight}
    for path in sorted(Path(found.source).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in names & {*file.keys()}:
                row = file.get_slice(name)[index : index + 1]
                embeddings.weight[index].copy_(row[0])


def refuse_parts_elsewhere(found: ResolvedModel) -> None:
    """An index of weights that leads out of its folder.

    Raises:
        ModelError: it names a file that does not lie beside it.
        OSError, ValueError: it cannot be read; so says the one who loads it.
    """
    if not found.is_local or found.gguf_file is not None:
        return
    # A configuration may name any of them.
    for index in sorted(Path(found.source).rglob("*.safetensors.index.json")):
        table = json.loads(index.read_text(encoding="utf-8"))
        parts = table.get("weight_map") if isinstance(table, dict) else None
        for name in sorted(set(map(str, parts.values()))) if isinstance(parts, dict) else ():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ModelError(
                    f"model {found.ref!r} takes weights from {name!r}, outside its folder. "
                    f"Correct {index.name}."
                )


def refuse_unread_weights(
    found: ResolvedModel, model: PreTrainedModel, names: Iterable[str]
) -> None:
    """Weights of layers that the model has, or would have, and which it leaves out.

    A config.json of another model, scales of quantised weights without their settings, a bias that
    the architecture lacks, or an adapter saved among the weights: transformers reads what it knows
    and goes on, with other numbers. What belongs to no layer (heads for a reward or for several
    tokens, towers for pictures) changes nothing of what the model says, nor do masks and tables of
    positions that older versions saved (GPT-2, GPT-J, GPT-Neo, CodeGen).

    Args:
        found: the model, for the message.
        model: as it was loaded.
        names: weights in its files that were not used.

    Raises:
        ModelError: there are some.
    """
    modules = dict(model.named_modules())
    unread = sorted(name for name in names if _is_of_a_layer(name, modules, model))
    shapes = dict(_shapes(Path(found.source))) if unread and found.is_local else {}
    unread = [name for name in unread if not _is_constant(name, shapes.get(name))]
    if unread:
        raise ModelError(
            f"model {found.ref!r} has {len(unread)} weights that {type(model).__name__} does not "
            f"use, first {unread[0]!r}. Its config.json belongs to other weights, or lacks their "
            "quantization."
        )


def _is_of_a_layer(name: str, modules: Mapping[str, nn.Module], model: PreTrainedModel) -> bool:
    parts = name.split(".")
    places = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    place = next((place for place in places if place in modules), "")
    if isinstance(modules[place], nn.ModuleList):  # a layer more; some predict several tokens
        return not vars(model.config.get_text_config()).get("num_nextn_predict_layers")
    is_part = any(part.isdigit() for part in place.split("."))
    return is_part or (bool(place) and not any(modules[place].children()))


def _is_constant(name: str, shape: list[int] | None) -> bool:
    """Whether numbers follow from a model's settings; the shape is not known of a hub id."""
    parts = name.split(".")
    if parts[-1] in _CONSTANTS:
        return True
    is_mask = shape is None or (len(shape) == 4 and shape[:2] == [1, 1] and shape[2] == shape[3])
    return is_mask and parts[-2:] in (["attn", "bias"], ["attention", "bias"])


def _shapes(folder: Path) -> Iterator[tuple[str, list[int]]]:
    for path in filter(Path.is_file, sorted(folder.glob("*.safetensors"))):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 -- not a dictionary
                yield name, weights.get_slice(name).get_shape()
