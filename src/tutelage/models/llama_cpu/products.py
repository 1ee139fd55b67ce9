"""Products of float32 matrices by oneDNN, where torch would take a slower library on this CPU."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from tutelage.core.products import FastProduct, register_product

LEAST_MULTIPLICATIONS = 1 << 20
"""Below so many multiplications, oneDNN's longer way to its kernel costs more than it gains."""


@cache
def _is_onednn_faster() -> bool:
    """Whether oneDNN multiplies float32 faster here than MKL, which torch takes.

    On AMD's processors MKL leaves AVX-512 unused and takes about twice the time. The answer
    depends on the processor alone, never on a measurement: a resumed run has to compute the same.
    """
    # The operator is the one that torch's compiler emits; its name is not a promise.
    has_operator = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not has_operator or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False  # not Linux


def _suits(a: Tensor, b: Tensor) -> bool:
    """Whether a bᵀ is for oneDNN; `torch.backends.mkldnn.flags(enabled=False)` forbids it."""
    return (
        a.numel() * b.shape[0] >= LEAST_MULTIPLICATIONS  # first, for small products are many
        and _is_onednn_faster()
        and a.device.type == b.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and a.shape[-1] == b.shape[-1]  # torch says better what does not fit
        and bool(torch.backends.mkldnn.enabled)
    )


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    # The operator reads a bias as if it lay in one piece.
    bias = None if bias is None else bias.contiguous()
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return product


def add_linear(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """x + y weightᵀ for `[m, n]`, `[m, k]` and `[n, k]`, without gradient."""
    return x + _onednn(y, weight) if _suits(y, weight) else torch.addmm(x, y, weight.t())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias, as `torch.nn.functional.linear`, with gradients.

    Args:
        x: `[…, k]`.
        weight: `[n, k]`.
        bias: `[n]`, or None.

    Returns:
        `[…, n]`.
    """
    # oneDNN's operator knows no tangents: forward-mode derivatives would silently be zero.
    is_forward_mode = forward_ad._current_level >= 0
    if is_forward_mode or not _suits(x, weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    inputs = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        y: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return y
    return _onednn(x, weight, bias)


class _Linear(torch.autograd.Function):
    """The same with gradients, each a product of its own; differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = linear(grad, weight.t()) if needs_x else None
        grad_weight = linear(rows.t(), x.reshape(-1, x.shape[-1]).t()) if needs_weight else None
        return grad_x, grad_weight, rows.sum(0) if needs_bias else None


class Linear(nn.Linear):
    """A linear layer that multiplies with `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """`[…, in_features]` to `[…, out_features]`."""
        return linear(input, self.weight, self.bias)


register_product("cpu", FastProduct(_suits, _onednn))
