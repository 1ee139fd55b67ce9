"""A sum of terms by kernels: which sums they know, and what each term adds, chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tutelage.core.kernels.passes import (
    FORWARD_KL,
    LOG_P,
    LOG_Q,
    REVERSE_KL,
    TEACHER_ENTROPY,
    Chunk,
    Passes,
    Slopes,
)
from tutelage.core.kernels.tops import MOST_TOP, buckets
from tutelage.core.policy import ClippedPolicy, Sampled
from tutelage.core.terms import (
    JSD,
    Buckets,
    ForwardKL,
    ReverseKL,
    SampledReverseKL,
    SkewReverseKL,
    Term,
    TopKForwardKL,
    TopKReverseKL,
    bucket_gap,
)

Weighted = tuple[Term, Tensor]

TopK = TopKForwardKL | TopKReverseKL


def is_known(terms: Sequence[Weighted]) -> bool:
    """Whether the kernels can add these terms up: one of a kind, and no dense one beside top-k."""
    found = [term for term, _ in terms]
    dense = [x for x in found if isinstance(x, JSD | SkewReverseKL) and not _is_reverse(x)]
    top = [x for x in found if isinstance(x, TopK)]
    sampled = [x for x in found if isinstance(x, Sampled)]
    rest = [x for x in found if _is_reverse(x) or isinstance(x, ForwardKL)]
    return (
        len(dense) + len(top) + len(sampled) + len(rest) == len(found)
        and len({type(x) for x in dense}) == len(dense)
        and len(top) + len(dense) <= (1 if top else len(dense))
        and len(sampled) <= 1
        and all(x.k <= MOST_TOP for x in top)
    )


def tokens_of(terms: Sequence[Weighted]) -> Tensor | None:
    """Sampled ids `[N]` whose log-probabilities a term needs."""
    sampled = [term.tokens for term, _ in terms if isinstance(term, Sampled)]
    return sampled[0].contiguous() if sampled else None


class Total:
    """What each row adds, and the slopes of every chunk."""

    def __init__(self, work: Passes, terms: Sequence[Weighted]) -> None:
        self.work = work
        # What takes ids out of the buffers comes last.
        self.terms = sorted(terms, key=lambda pair: isinstance(pair[0], TopK))
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
            case SampledReverseKL() | ClippedPolicy():
                value, slopes = self._sampled(chunk, term, weight, slopes)
            case TopKForwardKL() | TopKReverseKL():
                top = buckets(self.work, chunk, term.k, term.support)
                value, slopes = term.value(top), self._top(chunk, term, top, weight, slopes)
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

    def _sampled(
        self, chunk: Chunk, term: Sampled, weight: Tensor, slopes: Slopes
    ) -> tuple[Tensor, Slopes]:
        rows, work = chunk.rows, self.work
        log_p, log_q = work.table[LOG_P, rows], work.table[LOG_Q, rows]
        value, slope = term.value_and_slope(log_p, log_q, rows)
        slope = _times(weight, slope)
        tokens = term.tokens[rows, None]
        logits = work.logits_at("student", chunk, tokens)
        added = -slope[:, None] * work.slope_at(chunk, logits)
        return value, replace(slopes, share=slope.float(), added=(tokens, added))

    def _top(
        self, chunk: Chunk, term: TopK, top: Buckets, weight: Tensor, slopes: Slopes
    ) -> Slopes:
        """Slopes with a term of the k likeliest ids; there, all of the gradient is replaced."""
        share, spread = torch.zeros_like(top.log_p_rest), None
        if isinstance(term, TopKReverseKL):
            log_ratio = top.log_p - top.log_q
            rest = bucket_gap(top.log_p_rest, top.log_q_rest)
            mean = (top.p * log_ratio).sum(-1) + top.log_p_rest.exp() * rest
            share = rest - mean
            here = top.p * (log_ratio - mean[:, None])
        elif term.tail:
            share = torch.ones_like(share)
            here = top.p - top.q
            shift = bucket_gap(top.log_q_rest, top.log_p_rest)
            inverse = self.work.aux[2, : len(chunk)]
            shift = shift.masked_fill(top.log_p_rest == -torch.inf, 0.0) + inverse.log()
            spread = (-weight, shift.float())
        else:
            share = torch.ones_like(share)
            here = top.p - top.share()
        here = _times(weight[:, None], here) + self._others(chunk, top, slopes)
        logits = top.log_p + self.work.log_sums("student", chunk)[:, None]
        here = here * self.work.slope_at(chunk, logits)
        share = _times(weight, share).float()
        if slopes.share is not None:
            share = share + slopes.share
        return replace(slopes, share=share, spread=spread, replaced=(top.ids, here))

    def _others(self, chunk: Chunk, top: Buckets, slopes: Slopes) -> Tensor | float:
        """The gradient that the other terms have at the top's ids, `[n, k]`."""
        here: Tensor | float = 0.0
        if slopes.reverse is not None:
            a, kl = slopes.reverse[chunk.rows], self.work.table[REVERSE_KL, chunk.rows]
            log_ratio = (top.log_p - top.log_q).masked_fill(top.p == 0, 0.0)
            here = here + _times(a[:, None], top.p * (log_ratio - kl[:, None]))
        if slopes.forward is not None:
            here = here + _times(slopes.forward[chunk.rows, None], top.p - top.q)
        if slopes.share is not None:
            here = here + slopes.share[:, None] * top.p
        return here


def _times(weight: Tensor, x: Tensor) -> Tensor:
    """weight·x, and exactly 0 where the weight is."""
    return (weight * x).masked_fill(weight == 0, 0.0)


def _is_reverse(term: Term) -> bool:
    return isinstance(term, ReverseKL) or (isinstance(term, SkewReverseKL) and term.alpha == 0)


def _is_forward(term: Term) -> bool:
    return isinstance(term, ForwardKL)
