"""Weighted sums of what terms add to a row."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def added(
    found: Iterable[tuple[tuple[Tensor, Tensor], Tensor]], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums of values `[r]`, float64, and of gradients `[r, V]` shaped as `like`.

    Args:
        found: value and gradient of each term with its weights `[r]`.
        like: `[r, V]`.
    """
    total = torch.zeros(len(like), dtype=torch.float64, device=like.device)
    gradient = torch.zeros_like(like)
    for (value, slope), weight in found:
        total += weighted(weight, value)
        gradient += slope.mul(weight[:, None]).masked_fill_((weight == 0)[:, None], 0.0)
    return total, gradient


def weighted(weight: Tensor, value: Tensor) -> Tensor:
    """weight·value; a row of weight 0 adds exactly 0, even when its divergence is infinite."""
    return weight * value.masked_fill(weight == 0, 0.0)
