"""Gradients of hidden states and head, summed chunk by chunk while the objective is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tutelage.core import kernels
from tutelage.core._block import Chunk
from tutelage.core._student import StudentChunk
from tutelage.core.lazy import LazyLogits
from tutelage.core.products import add_product_, product

Found = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass
class Gradients:
    """Accumulated gradients of hidden states, head weight and bias; None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    dtypes: tuple[torch.dtype, torch.dtype]
    wants: tuple[bool, bool, bool]
    """Which of the three are needed."""
    late: Callable[[Tensor], Found] | None = None
    """Computes them from their factor instead, where one chunk holds all rows."""
    is_spent: bool = False

    @staticmethod
    def like(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: tuple[bool, ...],
        dtype: torch.dtype,
        is_fused: bool,
    ) -> Gradients:
        wants = (needs[0], needs[1], needs[2] and bias is not None)
        dtypes = (hidden.dtype, weight.dtype)
        if is_fused and len(hidden):
            return Gradients(None, None, None, dtypes, wants)  # the first chunk makes them
        return Gradients(
            torch.empty_like(hidden) if wants[0] else None,
            torch.zeros_like(weight, dtype=dtype) if wants[1] else None,
            torch.zeros_like(bias, dtype=dtype) if wants[2] and bias is not None else None,
            dtypes,
            wants,
        )

    @property
    def needed(self) -> bool:
        return any(self.wants)

    def add(self, student: LazyLogits, chunk: Chunk | StudentChunk) -> None:
        """Carries one chunk's logit gradient (in `chunk.student`) to hidden states and head."""
        (z, free), rows = chunk.gradient(), slice(chunk.start, chunk.stop)
        if student.softcap is not None:
            capped = student.block(chunk.start, chunk.stop, out=free)
            z.mul_(capped.div_(student.softcap).square_().neg_().add_(1.0))
        if student.scale != 1.0:
            z.mul_(student.scale)
        hidden, weight = student.hidden[rows], student.weight
        if self.hidden is not None:
            self.hidden[rows] = product(z.to(weight.dtype), weight.t())
        if self.weight is not None:
            add_product_(self.weight, z.t(), hidden.to(z.dtype).t())
        if self.bias is not None:
            self.bias.add_(z.sum(0))

    def add_products(self, student: LazyLogits, rows: slice, gradient: Tensor) -> None:
        """Carries the gradient `[n, V]` of raw logits of `rows` to hidden states and head.

        Sums stay in float32, so that scaling rounds once; the first chunk fills empty memory.
        """
        from tutelage.core.kernels.products import multiply, multiply_add  # needs Triton

        is_first = rows.start == 0
        new = partial(torch.empty, dtype=student.dtype, device=gradient.device)
        if self.wants[0]:
            self.hidden = new(student.hidden.shape) if self.hidden is None else self.hidden
            multiply(gradient, student.weight, self.hidden[rows])
        if self.wants[1]:
            self.weight = new(student.weight.shape) if self.weight is None else self.weight
            add = multiply if is_first else multiply_add
            add(gradient.t(), student.hidden[rows], self.weight)
        if self.wants[2]:
            found = gradient.sum(0, dtype=student.dtype)
            self.bias = found if self.bias is None else self.bias.add_(found)

    def scaled(self, factor: Tensor) -> Found:
        """The gradients times `factor`, in the dtypes of their inputs; gives them away."""
        if self.is_spent:
            raise RuntimeError(
                "the objective was back-propagated twice; its gradients live for one backward. "
                "Compute the objective again instead of using retain_graph."
            )
        self.is_spent = True
        if self.late is not None:
            late, self.late = self.late, None
            return late(factor)
        found = (self.hidden, self.weight, self.bias)
        self.hidden = self.weight = self.bias = None
        dtypes = (self.dtypes[0], self.dtypes[1], self.dtypes[1])
        if factor.device.type != "cpu":  # asking what the factor is would wait for the device
            h, w, b = (_times(g, factor, d) for g, d in zip(found, dtypes, strict=True))
            return h, w, b
        if factor.item() != 1.0:
            found = tuple(None if g is None else g.mul_(factor) for g in found)  # type: ignore[assignment]
        h, w, b = (None if g is None else g.to(d) for g, d in zip(found, dtypes, strict=True))
        return h, w, b


def _times(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The product in `dtype`, rounded once; in place where that is what `gradient` has."""
    if gradient is None:
        return None
    if kernels.is_supported(gradient.device):
        from tutelage.core.kernels.products import scaled  # needs Triton

        return scaled(gradient, factor, dtype)
    if gradient.dtype == dtype:
        return gradient.mul_(factor)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
