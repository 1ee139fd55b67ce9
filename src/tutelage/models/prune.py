"""Depth pruning: a shallower copy of a model as the student of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from tutelage.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PER_LAYER_SETTINGS = ("layer_types", "no_rope_layers")


def prune_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """Cut a model to `num_layers` decoder layers, in place: first and last stay, the rest evenly.

    Args:
        model: A decoder with its layers in `model.model.layers` (Llama, Qwen3, SmolLM2, ...).
        num_layers: Layers to keep, from 1 to the number there are.

    Returns:
        The same model, its configuration and layer indices renumbered.

    Raises:
        ModelError: num_layers is out of range or the architecture is not of this kind.
    """
    layers = dict(model.base_model.named_children()).get("layers")
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(
            f"layers of {type(model).__name__} cannot be pruned: it has no list 'layers'. "
            "Use a model of the Llama or Qwen family."
        )
    if not 1 <= num_layers <= len(layers):
        raise ModelError(
            f"student.num_layers must be between 1 and {len(layers)}, got {num_layers}. "
            "A model can only lose layers."
        )
    kept = _evenly_spaced(len(layers), num_layers)
    model.base_model.layers = nn.ModuleList(layers[i] for i in kept)
    for index, layer in enumerate(model.base_model.layers):
        for module in layer.modules():
            if "layer_idx" in module.__dict__:
                module.__dict__["layer_idx"] = index
    _prune_config(model.config, kept)
    return model


def _evenly_spaced(total: int, count: int) -> list[int]:
    if count == 1:
        return [0]
    last, gaps = total - 1, count - 1
    return [(2 * i * last + gaps) // (2 * gaps) for i in range(count)]


def _prune_config(config: Any, kept: Sequence[int]) -> None:
    present = config.to_dict()
    for name in _PER_LAYER_SETTINGS:
        if present.get(name) is not None:
            setattr(config, name, [present[name][i] for i in kept])
    config.num_hidden_layers = len(kept)
