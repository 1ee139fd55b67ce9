"""The parts of a decoder layer of the Llama family, for a step written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from tutelage.models.forward import is_llama_like
from tutelage.models.llama_cpu.products import Linear, add_linear, linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Call = Callable[[Tensor], Tensor]
Update = Callable[[Tensor, Tensor], Tensor]

_SMALL_BYTES = 1 << 20
"""Weights up to this size are copied to save calls, which cost more than such products."""


class Norm:
    """What an RMS norm computes, in as few calls as possible.

    ``weight·x/√(mean(x²) + eps)``, as ``(√D·weight)·x/√(|x|² + D·eps)``; other dtypes than float32
    go through float32 and are rounded as in transformers.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.is_float32 = weight.dtype == torch.float32
        self.eps = eps
        root = weight.shape[-1] ** 0.5
        self.scale = weight * root
        self.floor = torch.tensor(root * eps**0.5, device=weight.device)

    def direction(self, x: Tensor) -> Tensor:
        """x/√(|x|² + D·eps)."""
        return x / torch.hypot(torch.linalg.vector_norm(x, 2, -1, True), self.floor)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The norm of `[…, D]`, also in place."""
        if self.is_float32:
            return torch.mul(self.direction(x), self.scale, out=out)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return torch.mul(wide.to(x.dtype), self.weight, out=out)


class Layer(NamedTuple):
    """The parts of one decoder layer, its norms within them."""

    qkv: Call
    """Queries, keys and values of all heads, side by side, from the residual stream. The two
    halves of a query or key, which rotary positions turn as pairs, are interleaved."""
    qk_norm: Norm | None
    """Norm of queries and keys, interleaved, with a weight for each of their heads."""
    o: Update
    """Adds the product to the residual stream."""
    gate_up: Call
    """The gate of the MLP and what it lets through, side by side, from the residual stream."""
    act: Call
    down: Update
    """Adds the product to the residual stream."""


def parts_of(layer: Any, num_heads: int, num_groups: int) -> Layer:
    """What a step needs of a decoder layer with so many heads of queries and of keys."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = dict(attention.named_children())
    qk_norm = None
    if "q_norm" in norms:
        q, k = norms["q_norm"].weight, norms["k_norm"].weight
        weight = torch.cat((q.expand(num_heads, -1), k.expand(num_groups, -1)))
        qk_norm = Norm(interleaved(weight), norms["q_norm"].variance_epsilon)
    width = attention.head_dim
    turned = [(attention.q_proj, width), (attention.k_proj, width), (attention.v_proj, 0)]
    return Layer(
        qkv=_side_by_side(layer.input_layernorm, turned),
        qk_norm=qk_norm,
        o=_update(attention.o_proj),
        gate_up=_side_by_side(
            layer.post_attention_layernorm, [(mlp.gate_proj, 0), (mlp.up_proj, 0)]
        ),
        act=mlp.act_fn,
        down=_update(mlp.down_proj),
    )


def interleaved(x: Tensor) -> Tensor:
    """`[…, 2h]` with element i of the first half followed by element i of the second."""
    return x.view(*x.shape[:-1], 2, -1).mT.flatten(-2)


def _side_by_side(norm: Any, modules: Sequence[tuple[nn.Module, int]]) -> Call:
    """Several layers of one normed input; small plain ones as one product, on a copy of weights.

    Args:
        norm: RMS norm of the input.
        modules: layers, each with the width of heads to interleave in its output, or 0.
    """
    before = Norm(norm.weight, norm.variance_epsilon)
    plain = [module for module, _ in modules if _is_plain(module)]
    biases: list[Tensor] = [module.bias for module in plain if module.bias is not None]
    is_small = sum(module.weight.nbytes for module in plain) <= _SMALL_BYTES
    if len(plain) < len(modules) or len(biases) not in (0, len(plain)) or not is_small:
        calls = [(_call(module), width) for module, width in modules]
        return lambda x: _joined(calls, before(x))
    widths = [width for _, width in modules]
    weight = torch.cat([_by_head(m.weight.t(), w).t() for m, w in zip(plain, widths, strict=True)])
    bias = None
    if biases:
        bias = torch.cat([_by_head(b, w) for b, w in zip(biases, widths, strict=True)])
    if not before.is_float32:
        return lambda x: linear(before(x), weight, bias)
    folded = weight * before.scale
    return lambda x: linear(before.direction(x), folded, bias)


def _joined(calls: Sequence[tuple[Call, int]], x: Tensor) -> Tensor:
    return torch.cat([_by_head(call(x), width) for call, width in calls], dim=-1)


def _by_head(x: Tensor, width: int) -> Tensor:
    """`[…, heads·width]` with every head interleaved; as it is for a width of 0."""
    return interleaved(x.view(*x.shape[:-1], -1, width)).flatten(-2) if width else x


def _call(module: nn.Module) -> Call:
    """A plain linear layer without the cost of calling a module; adapters and such as they are."""
    if _is_plain(module):
        weight, bias = module.weight, module.bias
        return lambda x: linear(x, weight, bias)
    return module


def _update(module: nn.Module) -> Update:
    """A layer's product added to the residual stream."""
    if _is_plain(module) and "bias" not in dict(module.named_parameters()):
        weight = module.weight
        if weight.dtype == torch.float32:
            return lambda x, y: add_linear(x, y, weight)
    call = _call(module)
    return lambda x, y: x + call(y)


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) in (nn.Linear, Linear)


def is_fast_family(model: PreTrainedModel) -> bool:
    """Whether a model is built of such layers and sees everything; `agrees` then tries it."""
    if not is_llama_like(model):
        return False
    config = vars(model.base_model.config)  # `to_dict` copies it, which takes as long as a layer
    is_full = {"full_attention"} >= set(config.get("layer_types") or [])
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return is_full and window is None
