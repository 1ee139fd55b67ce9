"""The forward pass of the Llama family over whole sequences, written out for a CPU.

The same products and norms as the model's own; what is left out is work that nobody reads. The
last layer's queries and MLP, and the final norm, begin at the first column that predicts a
completion token: prompts before it end as keys and values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.models.llama_cpu.layers import is_fast_family
from tutelage.models.llama_cpu.ops import rotate, swiglu
from tutelage.models.packing import attends_by_sdpa

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_written_out(model: PreTrainedModel) -> bool:
    """Whether `last_hidden` computes what the model computes, up to float32 rounding."""
    base: Any = model.base_model
    if not is_fast_family(model) or not attends_by_sdpa(model):
        return False
    weight = base.embed_tokens.weight
    is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    # A layer that trains checkpoints its activations or drops some.
    return is_plain and not base.layers[0].training


def last_hidden(model: PreTrainedModel, input_ids: Tensor, first: int) -> Tensor:
    """Hidden states after the final norm, of the columns from `first` on.

    Args:
        model: one that `is_written_out`.
        input_ids: sequences, padded on the right, `[B, T]`.
        first: the first column that is needed.

    Returns:
        `[B, T − first, D]`.
    """
    base: Any = model.base_model
    x: Tensor = base.embed_tokens(input_ids)
    positions = torch.arange(input_ids.shape[1])[None]
    cos, sin = (table[:, :, None] for table in base.rotary_emb(x, positions))
    *layers, last = base.layers
    for layer in layers:
        x = _through(layer, x, cos, sin, 0)
    hidden: Tensor = base.norm(_through(last, x, cos, sin, first))
    return hidden


def _through(layer: Any, x: Tensor, cos: Tensor, sin: Tensor, first: int) -> Tensor:
    """A decoder layer's output `[B, T − first, D]` for its input `[B, T, D]`."""
    read = _attended(layer.self_attn, layer.input_layernorm(x), cos, sin, first)
    x = x[:, first:] + read
    return x + _transformed(layer.mlp, layer.post_attention_layernorm(x))


def _transformed(mlp: Any, x: Tensor) -> Tensor:
    """What the MLP makes of each token, `[…, D]`."""
    if mlp.config.hidden_act != "silu":
        whole: Tensor = mlp(x)
        return whole
    out: Tensor = mlp.down_proj(swiglu(mlp.gate_proj(x), mlp.up_proj(x)))
    return out


def _attended(attention: Any, x: Tensor, cos: Tensor, sin: Tensor, first: int) -> Tensor:
    """What the columns from `first` on read, `[B, T − first, D]`."""
    after = slice(first, None)
    q, k, v = (
        project(columns).unflatten(-1, (-1, attention.head_dim))
        for project, columns in (
            (attention.q_proj, x[:, after]),
            (attention.k_proj, x),
            (attention.v_proj, x),
        )
    )
    norms = dict(attention.named_children())
    if "q_norm" in norms:
        q, k = norms["q_norm"](q), norms["k_norm"](k)
    q, k = rotate(q, cos[:, after], sin[:, after]), rotate(k, cos, sin)
    mask = None
    if first:
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(first)
    read = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=attention.scaling,
        enable_gqa=k.shape[2] != q.shape[2],
    )
    out: Tensor = attention.o_proj(read.transpose(1, 2).flatten(2))
    return out
