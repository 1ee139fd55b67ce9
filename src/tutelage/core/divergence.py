"""Divergences between student and teacher, row by row, from log-probabilities.

`log_p` is the student's and `log_q` the teacher's log-distribution, both `[N, V]`, in nats.
These are the readable forms; the terms of `tutelage.core.terms`, where a new divergence is added,
compute the same numbers from hidden states without an `[N, V]` tensor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a‖b) `[N]`; `0·log 0 = 0` is masked before the arithmetic, so gradients stay finite."""
    is_zero = log_a == -torch.inf
    log_a = log_a.masked_fill(is_zero, 0.0)
    difference = log_a - log_b.masked_fill(is_zero, 0.0)
    return (log_a.exp().masked_fill(is_zero, 0.0) * difference).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Reverse KL in nats per row, the divergence on-policy distillation minimises.

    ``reverse_kl = KL(p‖q) = Σ_v p(v) (log p(v) − log q(v))``

    Args:
        log_p: student log-probabilities `[N, V]`.
        log_q: teacher log-probabilities `[N, V]`.

    Returns:
        `[N]`, ≥ 0; `inf` where the teacher gives 0 to something the student can say.

    Example:
        >>> p = torch.tensor([[0.5, 0.5]]); q = torch.tensor([[0.25, 0.75]])
        >>> round(reverse_kl(p.log(), q.log()).item(), 4)
        0.1438

    Source: TIP (arXiv 2604.14084), section 2.
    """
    return _kl(log_p, log_q)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Forward KL in nats per row; it punishes a student that misses a mode of the teacher.

    ``forward_kl = KL(q‖p) = Σ_v q(v) (log q(v) − log p(v))``

    Args:
        log_p: student log-probabilities `[N, V]`.
        log_q: teacher log-probabilities `[N, V]`.

    Returns:
        `[N]`, ≥ 0.

    Example:
        >>> p = torch.tensor([[0.5, 0.5]]); q = torch.tensor([[0.25, 0.75]])
        >>> round(forward_kl(p.log(), q.log()).item(), 4)
        0.1308

    Source: EOPD (arXiv 2603.07079), section 3.
    """
    return _kl(log_q, log_p)


def jsd(log_p: Tensor, log_q: Tensor, teacher_weight: float = 0.5) -> Tensor:
    """Generalised Jensen–Shannon divergence in nats per row.

    ``jsd = w KL(q‖m) + (1 − w) KL(p‖m)`` with ``m = w q + (1 − w) p`` and ``w = teacher_weight``

    Args:
        log_p: student log-probabilities `[N, V]`.
        log_q: teacher log-probabilities `[N, V]`.
        teacher_weight: the teacher's share of the mixture, strictly between 0 and 1.

    Returns:
        `[N]`, between 0 and the entropy of the weights (ln 2 at 0.5).

    Raises:
        ValueError: `teacher_weight` outside (0, 1), where the divergence would be 0 everywhere.

    Example:
        >>> p = torch.tensor([[1.0, 0.0]]); q = torch.tensor([[0.0, 1.0]])
        >>> round(jsd(p.log(), q.log()).item(), 4)
        0.6931

    Source: GKD (arXiv 2306.13649), equation 1.
    """
    if not 0.0 < teacher_weight < 1.0:
        raise ValueError(
            f"teacher_weight must be strictly between 0 and 1, got {teacher_weight}. "
            "Use forward_kl or reverse_kl for the limits."
        )
    log_m = _log_mixture(log_p, log_q, teacher_weight)
    return teacher_weight * _kl(log_q, log_m) + (1 - teacher_weight) * _kl(log_p, log_m)


def _log_mixture(log_p: Tensor, log_q: Tensor, teacher_weight: float) -> Tensor:
    """log(w q + (1 − w) p); where both are 0 the result is −inf with a zero gradient."""
    neither = (log_p == -torch.inf) & (log_q == -torch.inf)
    log_p = log_p.masked_fill(neither, 0.0) + math.log1p(-teacher_weight)
    log_q = log_q.masked_fill(neither, 0.0) + math.log(teacher_weight)
    return torch.logaddexp(log_p, log_q).masked_fill(neither, -torch.inf)
