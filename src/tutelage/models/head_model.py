"""The head of a model whose body is elsewhere: its files are read for no other weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tutelage.data.hub import is_hub_reachable
from tutelage.errors import ModelError
from tutelage.models.forward import foreign
from tutelage.models.head import head_form, output_embeddings
from tutelage.models.load import DTYPES, load_model_config
from tutelage.models.reference import (
    ResolvedModel,
    causal_class,
    refuse_parts_elsewhere,
    resolve_model,
)

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

_NUM_IDS = 64
"""Ids of the embeddings that stand in for the model's own, which are not loaded."""
_GENERATION = "generation_config.json"
_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")


def load_head_model(ref: str, dtype: str, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A model with its own head, without layers, and with few embeddings that stand in for its own.

    What it computes is of no use; its class, configuration, head and `head_form` are the model's.

    Args:
        ref: folder or hub id; of a hub id only the files with the head are downloaded.
        dtype: of the head.
        device: where the head is to be.

    Raises:
        ModelError: the head cannot be found, or the architecture cannot be made without layers.
    """
    found = resolve_model(ref)
    if found.gguf_file is not None or found.adapter is not None:
        kind = "a GGUF file" if found.gguf_file is not None else "an adapter"
        raise ModelError(
            f"teacher.model {ref!r} is {kind}, but the head of a served model is read from "
            "safetensors. Give the folder or hub id of the whole model."
        )
    refuse_parts_elsewhere(found)
    config = load_model_config(found).get_text_config()
    model = without_layers(config)
    head_form(model)  # measured once, and known from here on, however the head is replaced
    weight, bias = _head_of(found, model, bool(config.tie_word_embeddings))
    size = output_embeddings(model).weight.shape[1]
    if weight.ndim != 2 or weight.shape[1] != size:
        raise ModelError(
            f"the head of model {ref!r} has the shape {tuple(weight.shape)}, but its config.json "
            f"says {size} columns. Its files belong to another config.json."
        )
    model.to(device, DTYPES[dtype])
    bias = None if bias is None else bias.to(device, DTYPES[dtype])
    model.generation_config = _generation_config(found) or model.generation_config
    return _with_head(model, weight.to(device, DTYPES[dtype]), bias)


def head_shape_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The same without numbers, from a configuration alone."""
    text = config.get_text_config()
    model: PreTrainedModel = without_layers(text).to(dtype)
    projection = output_embeddings(model)
    size = projection.weight.shape[1]
    weight = torch.empty(text.vocab_size, size, dtype=dtype, device="meta")
    bias = None if projection.bias is None else weight[:, 0]
    return _with_head(model, weight, bias)


def shape_of_head(ref: str) -> PreTrainedModel:
    """`head_shape_model` of a folder or hub id."""
    return head_shape_model(load_model_config(resolve_model(ref)), torch.float32)


def _with_head(model: PreTrainedModel, weight: Tensor, bias: Tensor | None) -> PreTrainedModel:
    projection = nn.Linear(weight.shape[1], len(weight), bias is not None, device="meta")
    projection.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        projection.bias = nn.Parameter(bias, requires_grad=False)
    model.set_output_embeddings(projection)
    return model.eval().requires_grad_(False)


def without_layers(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of a text configuration with no layers and few ids, in float32.

    Raises:
        ModelError: its architecture cannot be made so.
    """
    small: Any = copy.deepcopy(config)
    with foreign("cannot be made without layers, as the head of a served model needs", config):
        for name in _PER_LAYER:
            if small.to_dict().get(name) is not None:
                setattr(small, name, [])
        small.num_hidden_layers = 0
        small.vocab_size = _NUM_IDS
        small.pad_token_id = None
        kind = causal_class(config, str(config.model_type))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: PreTrainedModel = kind.auto.from_config(small, dtype=torch.float32)
        return model.eval().requires_grad_(False)


def _head_of(
    found: ResolvedModel, model: PreTrainedModel, is_tied: bool
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the head in a model's files."""
    modules = {id(module): name for name, module in model.named_modules()}
    own = modules[id(output_embeddings(model))]
    table = modules[id(model.get_input_embeddings())]
    files = _files(found)
    wanted = [f"{table}.weight", f"{own}.weight"][:: 1 if is_tied else -1]
    name = next((name for name in (_named(files, w) for w in wanted[: 1 + is_tied]) if name), None)
    if name is None:
        raise ModelError(
            f"model {found.ref!r} has no head in its files: neither {' nor '.join(wanted)}. Its "
            "files are incomplete or belong to another config.json."
        )
    bias = _named(files, f"{own}.bias")
    return _tensor(found, files[name], name), (
        None if bias is None else _tensor(found, files[bias], bias)
    )


def _generation_config(found: ResolvedModel) -> GenerationConfig | None:
    """What says, besides the tokenizer, which ids end a text; None where there is none."""
    from transformers import GenerationConfig

    place = _place(found, _GENERATION)
    if place is None:
        return None
    try:
        return GenerationConfig.from_pretrained(place.parent, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ModelError(f"{place} cannot be read: {reason}. Copy it again.") from None


def _named(names: dict[str, str], wanted: str) -> str | None:
    """The name in the files of a tensor of the model, which may have a prefix more or less."""
    if wanted in names:
        return wanted
    ending = f".{'.'.join(wanted.split('.')[-2:])}"
    close = [name for name in names if f".{name}".endswith(ending)]
    return close[0] if len(close) == 1 else None


def _files(found: ResolvedModel) -> dict[str, str]:
    """The file of each tensor, by the tensor's name."""
    index = _place(found, _INDEX)
    if index is not None:
        table = json.loads(index.read_text(encoding="utf-8"))
        return {str(name): str(file) for name, file in table["weight_map"].items()}
    whole = _place(found, _WHOLE)
    if whole is None:
        raise ModelError(
            f"model {found.ref!r} has neither {_WHOLE} nor {_INDEX}. Give a folder or hub id with "
            "safetensors."
        )
    try:
        with safe_open(whole, framework="pt") as file:
            return dict.fromkeys(file.keys(), _WHOLE)
    except SafetensorError as error:
        raise ModelError(f"{whole} cannot be read: {error}. Copy it again.") from None


def _tensor(found: ResolvedModel, file: str, name: str) -> Tensor:
    place = _place(found, file)
    try:
        if place is not None:
            with safe_open(place, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
                return tensor
    except SafetensorError as error:
        raise ModelError(f"{place} cannot be read: {error}. Copy it again.") from None
    raise ModelError(f"model {found.ref!r} lacks {file}, which its index names. Copy it again.")


def _place(found: ResolvedModel, name: str) -> Path | None:
    """A file of a model, downloaded where it is on the hub; None where there is none."""
    if found.is_local:
        path = Path(found.source) / name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    try:
        cached = cached_file(
            found.source,
            name,
            local_files_only=not is_hub_reachable(),
            _raise_exceptions_for_missing_entries=False,
        )
    except OSError as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ModelError(
            f"cannot load the head of {found.ref!r}: {reason}. Check the name and the network, or "
            "give a folder."
        ) from None
    return None if cached is None else Path(str(cached))
