"""Parts of a decoder layer in few passes over memory, their gradients in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight ⊙ x · (mean(x²) + eps)^(−1/2) over the last dimension, differentiable once.

    Args:
        x: `[…, D]`.
        weight: `[D]`.
        eps: added to the mean of squares.

    Returns:
        `[…, D]`.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467).
    """
    y: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


class _RMSNorm(torch.autograd.Function):
    """With r = (mean(x²) + eps)^(−1/2): ∂x = r g⊙weight − x r³/D Σ g⊙weight⊙x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # In the order of transformers' own norms, which gives their bits.
        r = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return torch.mul(x, r).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, r = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        product = grad * x
        grad_weight = None
        if needs_weight:  # a sum by pairs; as a product of matrices its rounding would pile up
            grad_weight = (product * r).reshape(-1, x.shape[-1]).sum(0)
        if not needs_x:
            return None, grad_weight, None
        slope = (product @ weight)[..., None] * (r.pow(3) / -x.shape[-1])
        grad_x = torch.mul(grad, weight, out=product).mul_(r).addcmul_(x, slope)
        return grad_x, grad_weight, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, x ⊙ cos + (−x₂, x₁) ⊙ sin with x₁ and x₂ the halves of x.

    Args:
        x: `[…, D]`, differentiable once.
        cos: cosines, broadcast over x, without gradient.
        sin: sines, of the shape of `cos`.

    Returns:
        `[…, D]`.

    Source: Su et al., RoFormer (arXiv 2104.09864), the halves as in GPT-NeoX.
    """
    y: Tensor = _Rotation.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y


class _Rotation(torch.autograd.Function):
    """The gradient turns back: the two halves of the sines change places and signs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, -1)
        return _turned(x, cos, first.neg(), second)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, -1)
        return _turned(grad, cos, second, first.neg()), None, None


def _turned(x: Tensor, cos: Tensor, to_first: Tensor, to_second: Tensor) -> Tensor:
    """x ⊙ cos, with the other half of x, times its sines, added to each half."""
    y = x * cos
    for into, other, sin in zip(
        y.chunk(2, -1), x.chunk(2, -1)[::-1], (to_first, to_second), strict=True
    ):
        into.addcmul_(other, sin)
    return y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ⊙ up, differentiable once; silu(gate) is computed again rather than kept.

    Args:
        gate: `[…, D]`.
        up: of the shape of `gate`.

    Returns:
        `[…, D]`.

    Source: Shazeer, GLU Variants Improve Transformer (arXiv 2002.05202).
    """
    y: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return y


class _SwiGLU(torch.autograd.Function):
    """∂up = g ⊙ silu(gate), ∂gate = g ⊙ up ⊙ silu′(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), grad_up
