"""How many tokens a model can read, and how wide its 4-bit layers have to be."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from tutelage.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAMES = (
    "keep_window_size",
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_target_positions",
)
_TABLE = re.compile(r"(^|[._])(wpe|pos|position|positions|positional)([._]|$)")
_TYPES = {"doge", "mpt"}
"""Model types with an end but no table: MPT's bias of positions ends there, and beyond Doge's
window (`keep_window_size`) what a token reads depends on those after it."""
_SLACK = 8
"""Rows of a table of positions beside those of positions: padding, and an offset."""
_BLOCK = 64
"""Numbers that bitsandbytes scales together in 4 bits."""


def context_limit(model: PreTrainedModel) -> int | None:
    """Most tokens of a sequence that a model was made for, by its configuration; None: no limit."""
    config: Any = model.config.get_text_config(decoder=True)
    values = config.to_dict()
    found = [values.get(name) for name in _NAMES]
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def has_position_table(model: PreTrainedModel) -> bool:
    """Whether a model looks positions up in a table, so that it cannot read beyond its limit.

    Rotary positions have no end: a longer sequence is read, though the model never learned to.
    """
    known = _TABLES.get(model)
    if known is None:
        known = _TABLES[model] = _finds_table(model)
    return known


def refuse_beyond_table(model: PreTrainedModel, num_tokens: int) -> None:
    """A sequence that a model has no positions for.

    Raises:
        ModelError: the model cannot read so many tokens.
    """
    limit = context_limit(model) if has_position_table(model) else None
    if limit is not None and num_tokens > limit:
        raise ModelError(
            f"{type(model).__name__} has positions for {limit} tokens, but a prompt with its "
            f"completion may have {num_tokens}. Lower sampling.max_new_tokens (with tools, also "
            "data.max_inserted_tokens) or leave out long prompts (data.max_prompt_tokens)."
        )


_TABLES: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def _finds_table(model: PreTrainedModel) -> bool:
    limit, config = context_limit(model), model.config.get_text_config(decoder=True)
    if limit is None:
        return False
    if config.model_type in _TYPES:
        return True
    for tensors in (model.named_parameters(), model.named_buffers()):
        for name, tensor in tensors:
            size = max(tensor.shape[:-1], default=0)
            if _TABLE.search(name) and limit <= size <= limit + _SLACK:
                return True
    return False


def refuse_partial_blocks(model: PreTrainedModel, ref: str) -> None:
    """Refuse 4-bit layers whose rows are not whole blocks: bitsandbytes has no CPU product of them.

    Raises:
        ModelError: a layer has such rows.
    """
    for layer in model.modules():
        if not isinstance(layer, torch.nn.Linear) or not hasattr(layer.weight, "quant_state"):
            continue
        width = layer.in_features
        if width % _BLOCK:
            raise ModelError(
                f"model {ref!r} has a layer with {width} inputs, which on a CPU must be a multiple "
                f"of {_BLOCK} for quantization = '4bit'. Use 8bit or none, or CUDA."
            )
