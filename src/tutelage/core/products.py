"""Products a bᵀ of matrices, without gradient, by torch or by a faster library for a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_PIECE = 2048
"""Rows of a result that are computed at a time where they go into existing memory."""


@dataclass(frozen=True)
class FastProduct:
    """A library's a bᵀ of `[m, k]` and `[n, k]`, and where it is faster than torch's."""

    is_faster: Callable[[Tensor, Tensor], bool]
    product: Callable[[Tensor, Tensor], Tensor]


_FAST: dict[str, FastProduct] = {}


def register_product(device_type: str, fast: FastProduct) -> None:
    """Use another library's products on a type of device wherever they are faster.

    Results depend on what is registered in their last bits, so a library registers when it is
    imported (`models.llama_cpu.products` for "cpu"), never by a measurement.
    """
    _FAST[device_type] = fast


def _fast(a: Tensor, b: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The registered product where it is faster."""
    fast = _FAST.get(a.device.type)
    return fast.product if fast is not None and fast.is_faster(a, b) else None


def product(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ of `[m, k]` and `[n, k]`, `[m, n]`, without gradient."""
    fast = _fast(a, b)
    return a @ b.t() if fast is None else fast(a, b)


def _check_out(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Refuse what a piece would be cast or broadcast into, and what torch would resize."""
    if out.shape != (len(a), len(b)) or out.dtype != a.dtype:
        raise ValueError(
            f"out is {list(out.shape)} of {out.dtype}, but the product is "
            f"{[len(a), len(b)]} of {a.dtype}. Give an out of that shape and dtype."
        )


def product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out ← a bᵀ for `[m, k]` and `[n, k]`, without gradient.

    Raises:
        ValueError: out has another shape or dtype.
    """
    _check_out(out, a, b)
    fast = _fast(a, b)
    if fast is None:
        torch.mm(a, b.t(), out=out)
        return
    for low in range(0, len(b), _PIECE):
        here = slice(low, low + _PIECE)
        out[:, here] = fast(a, b[here])


def add_product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out ← out + a bᵀ for `[m, k]` and `[n, k]`, without gradient.

    Raises:
        ValueError: out has another shape or dtype.
    """
    _check_out(out, a, b)
    fast = _fast(a, b)
    if fast is None:
        out.addmm_(a, b.t())
        return
    for low in range(0, len(a), _PIECE):
        here = slice(low, low + _PIECE)
        out[here].add_(fast(a[here], b))
