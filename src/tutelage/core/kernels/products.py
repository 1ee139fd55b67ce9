"""Products that keep float32 sums of narrower operands, and what scales them."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tutelage.core.kernels import more_rows
from tutelage.core.lazy import LazyLogits

_SCALE_BLOCK = 4096


def project(side: LazyLogits, rows: slice, out: Tensor) -> None:
    """Raw logits of some rows, accumulated and kept in float32; swapped ids trade places."""
    multiply(side.hidden[rows], side.weight.t(), out)
    if side.swap is not None:
        first, second = side.swap
        kept = out[:, first].clone()
        out[:, first] = out[:, second]
        out[:, second] = kept


def swapped_bias(side: LazyLogits) -> Tensor | None:
    """The head's bias in the order of the logits of `project`."""
    if side.bias is None:
        return None
    bias = side.bias.detach().contiguous()
    if side.swap is None:
        return bias
    first, second = side.swap
    bias = bias.clone()
    bias[first], bias[second] = side.bias[second], side.bias[first]
    return bias


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out ← a b in float32 from operands of any one dtype, without gradient."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:  # the interpreter's device knows no product of mixed dtypes
        torch.mm(a.float(), b.float(), out=out)


def multiply_add(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out ← out + a b in float32 from operands of any one dtype, without gradient."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, out=out)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.addmm(out, a.float(), b.float(), out=out)


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor·x in `dtype`, rounded once, in place where that is what a dense x has."""
    out = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    if x.numel():
        with on_device(x.device):
            more_rows.scale_kernel[(math.ceil(x.numel() / _SCALE_BLOCK),)](
                x, factor, out, x.numel(), BLOCK=_SCALE_BLOCK, num_warps=8
            )
    return out


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
