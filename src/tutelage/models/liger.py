"""Norms and gated units of a model's own layers by Liger's kernels, in fewer passes over memory.

Single layers get another `forward`, so that other models of the process, and those loaded later,
stay as they are (Liger's own patches replace classes in transformers' modules).
"""

from __future__ import annotations

import importlib.util
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tutelage.errors import ConfigError, MissingExtraError, ModelError
from tutelage.models.forward import is_llama_like, relative_gap, rounding, trial_ids
from tutelage.models.llama_cpu.patch import NORMS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNITS = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"}
"""down(silu(gate(x)) ⊙ up(x)), where the activation is silu."""
_HINT = 'Use student.layers = "transformers".'
_TRIAL_TOKENS = 4096
"""Liger reads many short rows, such as those of the norms of queries, by kernels of their own."""


def use_liger_layers(model: PreTrainedModel, who: str, num_tokens: int = _TRIAL_TOKENS) -> None:
    """Let a model's norms and gated units compute by Liger's kernels.

    The first layer is compared with what it was: its output, and the gradients of its input and of
    its weights.

    Args:
        model: on its device.
        who: names it in messages, such as "student 'folder'".
        num_tokens: tokens that the two are compared on.

    Raises:
        MissingExtraError: Liger is not installed.
        ConfigError: the model has other layers.
        ModelError: the layer computes something else.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise MissingExtraError("liger-kernel", "liger", "student.layers = 'liger'")
    if not is_llama_like(model) or model.config.to_dict().get("hidden_act") != "silu":
        raise ConfigError(
            "student.layers = 'liger' computes Llama, Mistral, Qwen2 and Qwen3 models with silu, "
            "rotary positions that do not depend on length, one dtype and no hooks, "
            f"got the {who}, a {type(model).__name__}. {_HINT}"
        )
    before = _of_first_layer(model, num_tokens)
    for layer in model.modules():
        bind_liger(layer)
    after = _of_first_layer(model, num_tokens)
    pairs = zip(after, before, strict=True)
    gap = max(relative_gap(a.flatten()[None], b.flatten()[None]) for a, b in pairs)
    if not gap <= rounding(model):
        raise ModelError(
            f"Liger's layers do not compute what those of the {who} do: outputs or gradients "
            f"differ by {gap:.2g} of their size. {_HINT}"
        )


def bind_liger(layer: nn.Module) -> None:
    """Give a norm or gated unit Liger's forward pass; other layers stay as they are."""
    kind = type(layer).__name__
    if kind in NORMS:
        layer.forward = MethodType(_norm, layer)
    elif kind in _UNITS:
        layer.forward = MethodType(_unit, layer)


def with_own_layers(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its layers' own forward passes, for devices without Liger's kernels."""
    for layer in model.modules():
        if layer.__dict__.get("forward") in (MethodType(_norm, layer), MethodType(_unit, layer)):
            del layer.forward
    return model


def _norm(layer: Any, hidden_states: Tensor) -> Any:
    from liger_kernel.ops import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(hidden_states, layer.weight, layer.variance_epsilon)


def _unit(layer: Any, x: Tensor) -> Any:
    from liger_kernel.ops import LigerSiLUMulFunction

    gate, up = layer.gate_proj(x), layer.up_proj(x)
    return layer.down_proj(LigerSiLUMulFunction.apply(gate, up))


def _of_first_layer(model: PreTrainedModel, num_tokens: int) -> list[Tensor]:
    """The first layer's output for some tokens, and the gradients of its input and weights."""
    base: Any = model.base_model
    ids = torch.tensor([trial_ids(model, num_tokens)], device=model.device)
    x = base.embed_tokens(ids).detach().requires_grad_()
    turn = base.rotary_emb(x, torch.arange(num_tokens, device=x.device)[None])
    layer = base.layers[0]
    with torch.enable_grad():
        output = layer(x, position_embeddings=turn)
        output = output[0] if isinstance(output, tuple) else output
        weights = [weight for weight in layer.parameters() if weight.requires_grad]
        # A direction that no norm takes away, the same each time.
        found = torch.autograd.grad((output * x.detach().roll(1, 1)).sum(), [x, *weights])
    return [output.detach(), *found]
