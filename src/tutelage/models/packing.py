"""Attention over sequences that lie one after the other in one row, each by itself.

A model that reads such rows attends by a function registered here under its own name; whatever is
not packed goes on to torch's scaled dot-product attention, as before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.data.batch import Batch
from tutelage.errors import ConfigError, ModelError
from tutelage.models.forward import is_llama_like

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "tutelage_packed"
"""Name of the function among transformers' attention implementations."""

_HINT = 'Use micro_batches = "padded".'
_KNOWN = {"position_ids", "use_cache", "past_key_values", "cu_seq_lens_k", "max_length_k"}
"""What a layer may hand on that attention has no use for."""


def use_own_attention(model: PreTrainedModel) -> bool:
    """Let a model read packed rows too, and rows padded on the right without asking for a mask.

    Args:
        model: loaded with torch's scaled dot-product attention.

    Returns:
        False if it stays as it is: it may mix tokens in other ways than its attention shows.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if not is_llama_like(model) or not attends_by_sdpa(model):
        return False
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)
    return True


def require_packed(model: PreTrainedModel, who: str) -> None:
    """Let a model read packed rows.

    Args:
        model: loaded with torch's scaled dot-product attention.
        who: names it in messages, such as "student 'folder'".

    Raises:
        ConfigError: it cannot.
    """
    if not use_own_attention(model):
        raise ConfigError(
            'micro_batches = "packed" takes Llama, Mistral, Qwen2 and Qwen3 models with rotary '
            "positions that do not depend on length, in one dtype and without hooks, got the "
            f"{who}, a {type(model).__name__}. {_HINT}"
        )


def attends_by_sdpa(model: PreTrainedModel) -> bool:
    """Whether rectangles are read by torch's scaled dot-product attention."""
    return model.config._attn_implementation in ("sdpa", ATTENTION)


def attends_by_own(model: PreTrainedModel) -> bool:
    """Whether a model attends by `attention`."""
    return bool(model.config._attn_implementation == ATTENTION)


def unmasked_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """What a backbone takes to read a batch that is packed or padded on the right.

    Where nothing is given for a mask, transformers looks for packed rows itself, among the
    positions, and asks the device for what it found; what has four dimensions counts as made.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if attends_by_own(model):
        mask = torch.empty(1, 1, 1, 1, device=batch.input_ids.device)
        inputs |= {"attention_mask": mask, "has_mask": False}
    if batch.packed is None:
        return inputs
    if not attends_by_own(model):
        raise ValueError("a packed batch needs a model that attends to its sequences one by one.")
    starts, lengths = batch.packed.starts, batch.packed.lengths
    return inputs | {
        "position_ids": batch.position_ids,
        "cu_seq_lens_q": starts,
        "max_length_q": max(lengths),
        "lengths": lengths,
    }


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    lengths: tuple[int, ...] = (),
    has_mask: bool = True,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention, within each sequence of packed rows, as transformers calls it.

    Args:
        module: the layer.
        query: `[B, H, T, d]`, B being 1 for packed rows.
        key: `[B, G, T, d]`, G dividing H.
        value: of the shape of `key`.
        attention_mask: what a token sees; without meaning for packed rows.
        dropout: must be 0 for them.
        scaling: of the products of queries and keys.
        sliding_window: tokens that one sees, itself included; None for all.
        cu_seq_lens_q: where sequences begin and the last ends, int32 `[B + 1]`; None where
            nothing is packed.
        max_length_q: of the longest sequence.
        lengths: of all.
        has_mask: False if a token sees all before it, or its window, whatever `attention_mask` is.
        others: what else the layer hands on.

    Returns:
        `[B, T, H, d]`.

    Raises:
        ModelError: rows are packed, and the layer asks for more than that.
    """
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        mask = attention_mask if has_mask else _window_mask(query, sliding_window)
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **others
        )
        return plain
    unknown = sorted(n for n, given in others.items() if given is not None and n not in _KNOWN)
    if unknown or dropout or not module.is_causal:
        raise ModelError(
            f"{type(module).__name__} does not attend to packed rows: it asks for "
            f"{', '.join(unknown) or 'dropout, or for no causal mask'}. {_HINT}"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return _by_kernel(q, k, v, cu_seq_lens_q, max_length_q, scale, sliding_window)[None], None
    return _by_sequence(query, key, value, lengths, scale, sliding_window), None


def _by_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """By torch's variable-length attention, `[T, H, d]` for queries of that shape."""
    from torch.nn.attention.varlen import varlen_attn

    attend: Any = varlen_attn
    out: Tensor = attend(
        query, key, value, starts, starts, longest, longest,
        scale=scale,
        window_size=(window - 1 if window else -1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out


def _by_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None,
) -> Tensor:
    """Sequence after sequence, `[1, T, H, d]`: for devices and dtypes without such a kernel."""
    parts = (torch.split(x, list(lengths), 2) for x in (query, key, value))
    read = [
        F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=_window_mask(q, window),
            is_causal=window is None or window >= q.shape[2],
            scale=scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        for q, k, v in zip(*parts, strict=True)
    ]  # fmt: skip
    return torch.cat(read, dim=2).transpose(1, 2)


def _window_mask(query: Tensor, window: int | None) -> Tensor | None:
    """Which columns each token sees; None where it sees all before it."""
    length = query.shape[2]
    if window is None or window >= length:
        return None
    every = torch.ones(length, length, dtype=torch.bool, device=query.device)
    return every.tril().triu(1 - window)
