"""A sum of terms by kernels: which sums they know, and what each term adds, chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tutelage.core.kernels.passes import (
    FORWARD_KL,
    REVERSE_KL,
    TEACHER_ENTROPY,
    Chunk,
    Passes,
    Slopes,
)
from tutelage.core.terms import JSD, ForwardKL, ReverseKL, SkewReverseKL, Term

Weighted = tuple[Term, Tensor]

KINDS = (ReverseKL, ForwardKL, JSD, SkewReverseKL)
"""Terms that the kernels know."""

AT_MOST_ONCE = (JSD, SkewReverseKL)


def is_known(terms: Sequence[Weighted]) -> bool:
    """Whether the kernels can add these terms up."""
    once = [type(term) for term, _ in terms if isinstance(term, AT_MOST_ONCE)]
    return len(once) == len(set(once)) and all(isinstance(term, KINDS) for term, _ in terms)


class Total:
    """What each row adds, and the slopes of every chunk."""

    def __init__(self, work: Passes, terms: Sequence[Weighted]) -> None:
        self.work = work
        self.terms = terms
        size = len(work.student)
        self.value = torch.zeros(size, dtype=torch.float64, device=work.device)
        """`[N]`, float64, nats."""
        self._reverse, self._forward = (
            torch.zeros(size, dtype=torch.float32, device=work.device)
            if any(is_part(term) for term, _ in terms)
            else None
            for is_part in (_is_reverse, _is_forward)
        )

    def add(self, chunk: Chunk) -> Slopes:
        """Adds the terms of a chunk and says what its gradient is made of."""
        slopes = Slopes(self._reverse, self._forward)
        for term, weights in self.terms:
            slopes = self._add(chunk, term, weights, slopes)
        return slopes

    def _add(self, chunk: Chunk, term: Term, weights: Tensor, slopes: Slopes) -> Slopes:
        rows, table = chunk.rows, self.work.table
        weight = weights[rows]
        match term:
            case ForwardKL(gate=gate):
                if gate is not None:
                    weight = weight * gate(table[TEACHER_ENTROPY, rows]).to(weight.dtype)
                self._mix(self._forward, rows, weight)
                value = table[FORWARD_KL, rows]
            case JSD(teacher_weight=w):
                jsd = self.work.mixture(chunk, weights, w, is_jsd=True)
                value, slopes = jsd.value, replace(slopes, jsd=jsd)
            case SkewReverseKL(alpha=alpha) if alpha > 0:
                skew = self.work.mixture(chunk, weights, 1.0 - alpha, is_jsd=False)
                value, slopes = skew.value, replace(slopes, skew=skew)
            case _:  # reverse KL
                self._mix(self._reverse, rows, weight)
                value = table[REVERSE_KL, rows]
        # A row of weight 0 adds exactly 0, even when its divergence is infinite.
        self.value[rows] += weight * value.masked_fill(weight == 0, 0.0)
        return slopes

    @staticmethod
    def _mix(weights: Tensor | None, rows: slice, weight: Tensor) -> None:
        if weights is not None:
            weights[rows] += weight


def _is_reverse(term: Term) -> bool:
    return isinstance(term, ReverseKL) or (isinstance(term, SkewReverseKL) and term.alpha == 0)


def _is_forward(term: Term) -> bool:
    return isinstance(term, ForwardKL)
