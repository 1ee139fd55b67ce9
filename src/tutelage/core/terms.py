"""Divergences with a closed-form logit gradient that the fused objective can add up.

A term turns one block of rows into its value `[r]` and the gradient of that value with respect to
the student's logits `[r, V]`. For a value whose derivative with respect to p(v) is g(v), the logit
gradient is ``p ⊙ (g − E_p[g])``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from tutelage.core._block import Block

Support: TypeAlias = Literal["teacher", "student"]
"""Whose k likeliest ids have a bucket of their own."""


class Term(Protocol):
    """One summand of an objective."""

    def __call__(self, block: Block, rows: slice) -> tuple[Tensor, Tensor]:
        """Value `[r]` in nats and its logit gradient `[r, V]`, for the rows of a block."""


@runtime_checkable
class HasStudentTop(Protocol):
    """A term that looks at the student's likeliest ids."""

    @property
    def num_student_top(self) -> int:
        """How many; 0 is none."""


def _through_softmax(p: Tensor, g: Tensor) -> Tensor:
    gradient: Tensor = p * (g - torch.linalg.vecdot(p, g)[:, None])
    return gradient


@dataclass(frozen=True)
class ReverseKL:
    """``KL(p‖q)``; g = log p − log q + 1."""

    def __call__(self, block: Block, rows: slice) -> tuple[Tensor, Tensor]:
        return block.reverse_kl, block.p * (block.gap - block.mean_gap)


@dataclass(frozen=True)
class ForwardKL:
    """``g(H(q)) KL(q‖p)``; the logit gradient is g·(p − q), g a gate or 1."""

    gate: Callable[[Tensor], Tensor] | None = None
    """From teacher entropies `[r]`, nats, to factors `[r]`, row by row: EOPD without a pass over
    all rows to find out where its gate is open. None for 1."""

    def __call__(self, block: Block, rows: slice) -> tuple[Tensor, Tensor]:
        if self.gate is None:
            return block.forward_kl, block.p - block.q
        factor = self.gate(block.teacher_entropy)
        gradient = (block.p - block.q).mul_(factor[:, None].to(block.p.dtype))
        return factor * block.forward_kl, gradient


@dataclass(frozen=True)
class JSD:
    """``w KL(q‖m) + (1 − w) KL(p‖m)``, ``m = w q + (1 − w) p``; g = (1 − w) log(p/m).

    Source: GKD (arXiv 2306.13649), equation 1.
    """

    teacher_weight: float = 0.5
    """w, strictly between 0 and 1."""

    def __post_init__(self) -> None:
        if not 0.0 < self.teacher_weight < 1.0:
            raise ValueError(
                f"teacher_weight must be strictly between 0 and 1, got {self.teacher_weight}. "
                "Use forward or reverse KL for the limits."
            )

    def __call__(self, block: Block, rows: slice) -> tuple[Tensor, Tensor]:
        w = self.teacher_weight
        log_ratio = block.log_ratio()
        # log(p/m) = −log((1 − w) + w q/p), without overflow where q/p is huge
        over_m = -torch.logaddexp(
            torch.full_like(log_ratio, math.log1p(-w)), math.log(w) - log_ratio
        )
        value = (1 - w) * torch.linalg.vecdot(block.p, over_m)
        value = value + w * torch.linalg.vecdot(block.q, over_m - log_ratio)
        return value, _through_softmax(block.p, (1 - w) * over_m)


@dataclass(frozen=True)
class SkewReverseKL:
    """``KL(p‖m)``, ``m = α p + (1 − α) q``; g = log(p/m) + 1 − α p/m.

    Source: DistiLLM (arXiv 2402.03898), skew reverse KL with α = 0.1.
    """

    alpha: float = 0.1
    """The student's share of the mixture, in [0, 1); 0 is reverse KL."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha < 1.0:
            raise ValueError(f"alpha must be in [0, 1), got {self.alpha}. 0.1 is usual.")

    def __call__(self, block: Block, rows: slice) -> tuple[Tensor, Tensor]:
        log_ratio = block.log_ratio()
        log_alpha = math.log(self.alpha) if self.alpha else -math.inf
        over_m = -torch.logaddexp(
            torch.full_like(log_ratio, log_alpha), math.log1p(-self.alpha) - log_ratio
        )
        # p/m is at most 1/α; without a bound, at α = 0, it would overflow to 0·inf.
        g = over_m - self.alpha * over_m.exp() if self.alpha else over_m
        return torch.linalg.vecdot(block.p, over_m), _through_softmax(block.p, g)


@dataclass(frozen=True)
class TopKForwardKL:
    """Forward KL over one side's k likeliest ids, with a tail bucket or renormalised.

    With S the `support`'s top k, teacher mass m and student mass P on S:

    * `tail`: ``Σ_S q log(q/p) + (1 − m) log((1 − m)/(1 − P))``, a KL between coarser
      distributions and so at most the full one;
    * `renorm`: ``Σ_S q̃ log(q̃/p) = KL(q̃‖p̃) − log P``, q̃ = q/m renormalised and p not, as in EOPD's
      code. It is biased wherever m < 1: it pulls mass onto S that the teacher does not have.

    Source: EOPD (arXiv 2603.07079), section 4.
    """

    k: int = 16
    tail: bool = True
    """True adds the tail bucket; False renormalises the teacher on its top k."""
    support: Support = "teacher"

    def __post_init__(self) -> None:
        _require_k(self.k)
        if not self.tail and self.support != "teacher":
            raise ValueError(
                f"tail = False renormalises the teacher on its own top k, got support = "
                f"{self.support!r}. Use a tail."
            )

    def __call__(self, block: Block, rows: slice) -> tuple[Tensor, Tensor]:
        top = Buckets.of(block, self.k, self.support)
        if not self.tail:
            return self.value(top), block.p.scatter_add(-1, top.ids, -top.share())
        gradient = block.p - top.rest_of_q_shaped_as_p()
        return self.value(top), gradient.scatter_(-1, top.ids, top.p - top.q)

    @property
    def num_student_top(self) -> int:
        """How many of the student's likeliest ids it looks at."""
        return self.k if self.support == "student" else 0

    def value(self, top: Buckets) -> Tensor:
        """Value `[r]` in nats."""
        if not self.tail:
            share = top.share()
            log_share = share.log().masked_fill(share == 0, 0.0)  # 0·log 0 = 0
            return (share * (log_share - top.log_p)).sum(-1)
        value = (top.q * (top.log_q - top.log_p)).sum(-1)
        return value + weighted_gap(top.log_q_rest, top.log_p_rest)


@dataclass(frozen=True)
class TopKReverseKL:
    """``Σ_S p log(p/q) + (1 − P) log((1 − P)/(1 − m))``: reverse KL with a tail bucket.

    S is the `support`'s top k, m and P the teacher's and the student's mass on it; g is the
    log-ratio of each bucket. With the tail it is a KL between coarser distributions: at least 0,
    and 0 only where all k + 1 buckets agree, at most the full reverse KL, and equal to it when S is
    the whole vocabulary. Without (verl's sum, since removed) it falls below 0 as the student moves
    mass out of S. S is held fixed in the gradient.
    """

    k: int = 16
    support: Support = "teacher"

    def __post_init__(self) -> None:
        _require_k(self.k)

    def __call__(self, block: Block, rows: slice) -> tuple[Tensor, Tensor]:
        top = Buckets.of(block, self.k, self.support)
        tail = bucket_gap(top.log_p_rest, top.log_q_rest)[:, None]
        g = tail.expand_as(block.p).scatter(-1, top.ids, top.log_p - top.log_q)
        return self.value(top), _through_softmax(block.p, g)

    @property
    def num_student_top(self) -> int:
        """How many of the student's likeliest ids it looks at."""
        return self.k if self.support == "student" else 0

    def value(self, top: Buckets) -> Tensor:
        """Value `[r]` in nats."""
        value = (top.p * (top.log_p - top.log_q)).sum(-1)
        return value + weighted_gap(top.log_p_rest, top.log_q_rest)


@dataclass(frozen=True)
class SampledReverseKL:
    """PPO-clipped surrogate of the sampled token's reverse KL (the "k1" advantage).

    ``A = log q(y) − log p_old(y)``,  ``r = p(y)/p_old(y)``,
    ``L = −min(r A, clip(r, 1 − ε, 1 + ε) A)``; the logit gradient is ``−r A (e_y − p)`` where the
    clip does not bind, else 0. In expectation over y ~ p = p_old it is the gradient of KL(p‖q).

    Source: EOPD (arXiv 2603.07079), equation of L_OPD.
    """

    tokens: Tensor
    """Sampled ids y `[K]`."""
    old_logprobs: Tensor
    """log p_old(y) `[K]`, nats, of the student that wrote the completion."""
    clip: float = 0.2
    """ε, above 0."""
    is_clipped: Tensor = field(init=False)
    """Whether the clip took effect `[K]`, so that the row has no gradient; known once read."""

    def __post_init__(self) -> None:
        unread = torch.zeros_like(self.tokens, dtype=torch.bool)
        object.__setattr__(self, "is_clipped", unread)

    def at(self, tokens: Tensor) -> SampledReverseKL:
        """The same term of other columns `[K]`, with one record of where the clip took effect."""
        other = replace(self, tokens=tokens)
        object.__setattr__(other, "is_clipped", self.is_clipped)
        return other

    def __call__(self, block: Block, rows: slice) -> tuple[Tensor, Tensor]:
        tokens = self.tokens[rows, None]
        log_p, log_q = (x.gather(-1, tokens).squeeze(-1) for x in block.log_probabilities())
        value, slope = self.value_and_slope(log_p, log_q, rows)
        gradient = block.p * slope[:, None]
        return value, gradient.scatter_add_(-1, tokens, -slope[:, None])

    def value_and_slope(self, log_p: Tensor, log_q: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Value in nats and r A where the clip does not bind, `[r]` each; notes where it does."""
        old = self.old_logprobs[rows].to(log_p.dtype)
        bounds = (1 - self.clip, 1 + self.clip)
        value, slope, is_clipped = clipped_surrogate((log_p - old).exp(), log_q - old, bounds)
        self.is_clipped[rows] = is_clipped
        return value, slope


def clipped_surrogate(
    ratio: Tensor, advantage: Tensor, bounds: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's ``−min(r A, clip(r) A)``, its slope r A where no clip binds, and where one does.

    Args:
        ratio: r `[r]`.
        advantage: A `[r]`.
        bounds: of the clipped ratio.
    """
    plain, clipped = ratio * advantage, ratio.clamp(*bounds) * advantage
    is_active = plain <= clipped
    return -torch.minimum(plain, clipped), torch.where(is_active, plain, 0.0), ~is_active


@dataclass(frozen=True)
class Buckets:
    """One side's k likeliest ids as buckets of their own, everything else in one."""

    ids: Tensor
    """`[r, k]`."""
    q: Tensor
    p: Tensor
    log_q: Tensor
    log_p: Tensor
    log_q_rest: Tensor
    """Log-mass of everything else `[r]`; −inf when the k ids are the whole vocabulary."""
    log_p_rest: Tensor
    all_log_p: Tensor
    """Student log-probabilities `[r, V]`."""

    @staticmethod
    def of(block: Block, k: int, support: Support = "teacher") -> Buckets:
        log_p, log_q = block.log_probabilities()
        if support == "student":
            if block.student_top is None:
                raise ValueError("the block was read without the student's likeliest ids.")
            ids = block.student_top[:, :k]
        else:  # by logits: among probabilities that have underflowed to 0 any id would do
            ids = block.teacher_logits.topk(min(k, block.q.shape[-1]), -1).indices
        # The rest is summed, not 1 − mass: the difference would drown small tails in rounding.
        return Buckets(
            ids,
            block.q.gather(-1, ids),
            block.p.gather(-1, ids),
            log_q.gather(-1, ids),
            log_p.gather(-1, ids),
            log_q.scatter(-1, ids, -torch.inf).logsumexp(-1),
            log_p.scatter(-1, ids, -torch.inf).logsumexp(-1),
            log_p,
        )

    def share(self) -> Tensor:
        """The teacher renormalised on its k ids, `[r, k]`."""
        return self.q / self.q.sum(-1, keepdim=True)

    def rest_of_q_shaped_as_p(self) -> Tensor:
        """The teacher's tail mass, spread over the tail as the student spreads its own `[r, V]`."""
        return torch.exp(self.all_log_p + bucket_gap(self.log_q_rest, self.log_p_rest)[:, None])


def num_student_top(terms: Sequence[tuple[Term, Tensor]]) -> int:
    """How many of the student's likeliest ids the terms look at."""
    counts = [term.num_student_top for term, _ in terms if isinstance(term, HasStudentTop)]
    return max(counts, default=0)


def _require_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}. 16 is usual.")


def bucket_gap(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log_a − log_b, and 0 where both buckets are empty."""
    is_empty = log_a == -torch.inf
    return torch.where(is_empty, 0.0, log_a - log_b.masked_fill(is_empty, 0.0))


def weighted_gap(log_a: Tensor, log_b: Tensor) -> Tensor:
    """a log(a / b), and 0 where a is 0."""
    return log_a.exp() * bucket_gap(log_a, log_b)
