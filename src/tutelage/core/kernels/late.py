"""The gradients of an objective whose rows are one chunk, computed once their factor is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tutelage.core.kernels.passes import Chunk, Passes, Slopes
from tutelage.core.kernels.products import multiply


@dataclass(frozen=True)
class Late:
    """Keeps the chunk's logits until backward instead of float32 sums of gradients.

    The factor scales the weights of the rows, so that no sum has to be read again to be scaled.
    """

    work: Passes
    chunk: Chunk
    slopes: Slopes
    wants: tuple[bool, bool, bool]
    dtypes: tuple[torch.dtype, torch.dtype]
    """Of the gradients of hidden states, and of head and bias."""
    sources: tuple[Tensor, ...]
    """What the gradients are computed from."""
    versions: tuple[int, ...]
    """Of `sources`, when the logits were computed."""

    @staticmethod
    def of(
        work: Passes,
        chunk: Chunk,
        slopes: Slopes,
        wants: tuple[bool, bool, bool],
        sources: tuple[Tensor, Tensor],
    ) -> Late:
        """With what `sources`, hidden states and head, are now."""
        dtypes, versions = tuple(x.dtype for x in sources), tuple(x._version for x in sources)
        return Late(work, chunk, slopes, wants, (dtypes[0], dtypes[1]), sources, versions)

    def __call__(self, factor: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden states, head and bias, times `factor`; None where not wanted."""
        if tuple(x._version for x in self.sources) != self.versions:
            raise RuntimeError(
                "hidden states or head were changed in place before the objective was "
                "back-propagated. Call backward before the optimizer's step."
            )
        student = self.work.student
        gradient = self.work.gradient(self.chunk, self.slopes.times(factor))
        hidden = weight = bias = None
        if self.wants[0]:
            hidden = _product(gradient, student.weight).to(self.dtypes[0])
        if self.wants[1] and self.dtypes[1] == gradient.dtype:
            # Sums over few rows are not split among blocks: only the result is rounded.
            weight = torch.mm(gradient.t(), student.hidden)
        elif self.wants[1]:
            weight = _product(gradient.t(), student.hidden).to(self.dtypes[1])
        if self.wants[2]:
            bias = gradient.sum(0, dtype=student.dtype).to(self.dtypes[1])
        return hidden, weight, bias


def _product(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty(len(a), b.shape[1], dtype=torch.float32, device=a.device)
    multiply(a, b, out)
    return out
