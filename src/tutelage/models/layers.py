"""The parts of a decoder layer of the Llama family, for a step written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from tutelage.core.products import Linear, linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Call = Callable[[Tensor], Tensor]

_FAST_FAMILIES = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}
"""Pre-norm decoders with RMS norms, rotary positions and nothing between attention and MLP."""
_TABLE_ROPES = {"default", "linear", "llama3", "yarn"}
"""Rotary embeddings that depend on the position alone, not on the length of the sequence."""
_SMALL_BYTES = 1 << 20
"""Weights up to this size are copied to save calls, which cost more than such products."""


class Layer(NamedTuple):
    """The parts of one decoder layer: functions for the products, modules for the norms."""

    norm: Any
    qkv: Call
    """Queries, keys and values of all heads, side by side."""
    qk_scale: Tensor | None
    """Weights of the norms of queries and keys, a row for each of their heads."""
    o: Call
    mlp_norm: Any
    gate_up: Call
    """The gate of the MLP and what it lets through, side by side."""
    act: Call
    down: Call


def parts_of(layer: Any, num_heads: int, num_groups: int) -> Layer:
    """What a step needs of a decoder layer with so many heads of queries and of keys."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = dict(attention.named_children())
    qk_scale = None
    if "q_norm" in norms:
        q, k = norms["q_norm"].weight, norms["k_norm"].weight
        qk_scale = torch.cat((q.expand(num_heads, -1), k.expand(num_groups, -1)))
    return Layer(
        norm=layer.input_layernorm,
        qkv=_side_by_side(attention.q_proj, attention.k_proj, attention.v_proj),
        qk_scale=qk_scale,
        o=_call(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm,
        gate_up=_side_by_side(mlp.gate_proj, mlp.up_proj),
        act=mlp.act_fn,
        down=_call(mlp.down_proj),
    )


def _side_by_side(*modules: nn.Module) -> Call:
    """Several layers of one input; small plain ones as one product, on a copy of their weights."""
    plain = [module for module in modules if _is_plain(module)]
    biases: list[Tensor] = [module.bias for module in plain if module.bias is not None]
    is_small = sum(module.weight.nbytes for module in plain) <= _SMALL_BYTES
    if len(plain) == len(modules) and len(biases) in (0, len(plain)) and is_small:
        weights: list[Tensor] = [module.weight for module in plain]
        bias = torch.cat(biases) if biases else None
        return partial(linear, weight=torch.cat(weights), bias=bias)
    calls = [_call(module) for module in modules]
    return lambda x: torch.cat([call(x) for call in calls], dim=-1)


def _call(module: nn.Module) -> Call:
    """A plain linear layer without the cost of calling a module; adapters and such as they are."""
    if _is_plain(module):
        return partial(linear, weight=module.weight, bias=module.bias)
    return module


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) in (nn.Linear, Linear)


def is_fast_family(model: PreTrainedModel) -> bool:
    """Whether a model is built of such layers and nothing else; `agrees` then tries it."""
    base: Any = model.base_model
    if type(base).__name__ not in _FAST_FAMILIES:
        return False
    config = base.config.to_dict()
    is_full = {"full_attention"} >= set(config.get("layer_types") or [])
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    rope = config.get("rope_parameters") or {}
    is_table = rope.get("rope_type") in _TABLE_ROPES and rope.get("partial_rotary_factor", 1) == 1
    same_dtype = base.norm.weight.dtype == base.embed_tokens.weight.dtype
    # Hooks (sharding, offloading) belong to the modules' own calls, some of which a step skips.
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    return is_full and window is None and is_table and same_dtype and not hooked
