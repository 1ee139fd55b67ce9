"""Layers of transformers that do the same in fewer passes over memory, on a CPU in float32."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.models.llama_cpu.ops import rms_norm
from tutelage.models.llama_cpu.products import Linear

NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"}
"""weight ⊙ x · rsqrt(mean(x²) + variance_epsilon), and nothing else."""


def use_fast_layers(model: nn.Module) -> None:
    """Let a model's plain layers compute faster; weights, names, hooks and sharing stay."""
    for layer in model.modules():
        kind: Any = type(layer)
        if kind is nn.Linear:
            layer.__class__ = Linear
        elif kind.__name__ in NORMS and kind.__module__.startswith("transformers."):
            layer.__class__ = _fast_norm(kind)


@cache
def _fast_norm(kind: Any) -> Any:
    """A subclass with `_Norm`'s forward pass, under the name by which others know the layer."""
    return type(kind.__name__, (_Norm, kind), {"__module__": __name__})


def _suits(*tensors: Tensor) -> bool:
    is_plain = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    return is_plain and not torch.is_autocast_enabled("cpu")


class _Norm(nn.Module):
    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Any:
        if not _suits(hidden_states, self.weight):
            return super().forward(hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)
