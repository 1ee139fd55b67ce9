"""Loss weights of tokens and completions, and EOPD's gate on the teacher's entropy."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from tutelage.core.rules import quantile
from tutelage.core.stats import TokenStats

GATES = ("hard", "soft", "percentile")
"""How the teacher's entropy opens the forward KL."""


def entropy_gate(
    teacher_entropy: Tensor, threshold: float = 0.8, kind: str = "hard", width: float = 0.1
) -> Tensor:
    """How far the forward KL of each row is switched on, in [0, 1].

    `hard` 1[H ≥ τ]; `soft` σ((H − τ)/width); `percentile` 1[H ≥ quantile of the given rows at τ].

    Args:
        teacher_entropy: H(q) of the global batch `[N]`, nats.
        threshold: τ, nats; for `percentile` a share in [0, 1].
        kind: one of `GATES`.
        width: softness of `soft`, nats, above 0.

    Returns:
        `[N]`, in the dtype of the entropy.

    Raises:
        ValueError: τ is negative (or above 1 for `percentile`), the width is not positive, or
            the kind is unknown.

    Source: EOPD (arXiv 2603.07079), section 4: hard, τ = 0.8.
    """
    if threshold < 0 or (kind == "percentile" and threshold > 1):
        limit = "in [0, 1]" if kind == "percentile" else "at least 0 nats"
        raise ValueError(f"the gate's threshold must be {limit}, got {threshold}.")
    match kind:
        case "hard":
            return (teacher_entropy >= threshold).to(teacher_entropy.dtype)
        case "soft" if width > 0:
            return torch.sigmoid((teacher_entropy - threshold) / width)
        case "soft":
            raise ValueError(f"the gate's width must be above 0 nats, got {width}.")
        case "percentile":
            limit_nats = quantile(teacher_entropy, threshold)
            return (teacher_entropy >= limit_nats).to(teacher_entropy.dtype)
    raise ValueError(f"gate must be one of {GATES}, got {kind!r}.")


def outside_trust_region(stats: TokenStats, uniform: Tensor) -> Tensor:
    """1 − M of each row, M ~ Bernoulli(min(q/p, 1)) with p and q of the sampled token. `[N]`.

    M is 1 where u < q/p: always where the teacher finds the token at least as likely.

    Args:
        stats: of N rows.
        uniform: u, numbers in (0, 1), float64 `[N]`.

    Source: TrOPD (arXiv 2606.01249).
    """
    is_outside = uniform.log() >= stats.log_q.double() - stats.log_p.double()
    return is_outside.to(stats.log_q.dtype)


def selectkd_weights(stats: TokenStats, outside: float = 0.01) -> Tensor:
    """1 where the student's likeliest id is among the teacher's five, else `outside`. `[N]`.

    Args:
        stats: with the extra `is_in_teacher_top5`.
        outside: weight of the other rows, at least 0.

    Source: SelectKD's acceptance rule.
    """
    is_in = stats.extras["is_in_teacher_top5"] > 0
    return torch.full_like(stats.entropy, outside).masked_fill(is_in, 1.0)


def ida_weights(stats: TokenStats) -> Tensor:
    """|q − p|/(q + p) of the sampled token where its advantage lowers the entropy, else 1. `[N]`.

    The advantage is A = log q − log p, so that the weight is tanh(|A|/2); raising or lowering the
    token by it lowers the student's entropy, to first order, where A·D < 0.

    Args:
        stats: with the extra `entropy_direction`, D.

    Source: IDA-OPD (arXiv 2608.29846), which multiplies A of the sampled loss.
    """
    advantage = stats.log_q.double() - stats.log_p.double()
    falls = advantage.sign() * stats.extras["entropy_direction"].sign() < 0
    return torch.where(falls, torch.tanh(advantage.abs() / 2), 1.0).to(stats.entropy)


def fire_weights(stats: TokenStats, completion: Tensor, drop: float = 0.2) -> Tensor:
    """(1 − H_T/max)·(H_S/max) with mean one over the completions that are not dropped. `[N]`.

    The share `drop` of completions with the lowest mean teacher log-probability weighs 0, and so do
    rows with a non-finite statistic, which change no other row's weight.

    Args:
        stats: statistics of the global batch.
        completion: completion index of each row `[N]`.
        drop: share of completions to drop, in [0, 1).

    Raises:
        ValueError: `drop` outside [0, 1).

    Source: FIRE's filter and weights.
    """
    if not 0.0 <= drop < 1.0:
        raise ValueError(f"drop must be in [0, 1), got {drop}.")
    columns = (stats.entropy, stats.teacher_entropy, stats.log_q)
    is_usable = torch.isfinite(torch.stack(columns)).all(0)
    h, teacher_h, log_q = (x.masked_fill(~is_usable, 0.0) for x in columns)
    raw = (1 - _share_of_largest(teacher_h)) * _share_of_largest(h)
    is_used = is_usable & ~_poorest(log_q, is_usable, completion, drop)
    raw = raw.masked_fill(~is_used, 0.0)
    mean = raw.sum() / is_used.sum().clamp(min=1)
    return raw / mean if bool(mean > 0) else raw


def _poorest(log_q: Tensor, is_usable: Tensor, completion: Tensor, drop: float) -> Tensor:
    """Rows `[N]` of the share `drop` of completions with the lowest mean `log_q`."""
    _, place = torch.unique(completion, return_inverse=True)
    count = torch.bincount(place, is_usable.double())
    mean = torch.bincount(place, log_q.double()) / count.clamp(min=1)
    is_poor = torch.zeros_like(count, dtype=torch.bool)
    # The decimal that was written: 0.29 of 100 completions are 29, not 28.999…
    is_poor[mean.argsort(stable=True)[: int(Fraction(str(drop)) * len(count))]] = True
    return is_poor[place]


def paced_weights(is_correct: Tensor, num_samples: int) -> Tensor:
    """s(1 − s) of each completion's prompt, s being the share of its samples that are correct.

    Args:
        is_correct: verdicts `[C]`, the `num_samples` completions of a prompt side by side.
        num_samples: completions per prompt.

    Returns:
        `[C]`, between 0 and ¼.

    Source: PACED.
    """
    rate = is_correct.double().view(-1, num_samples).mean(1)
    return (rate * (1 - rate)).repeat_interleave(num_samples)


def reward_weights(reward: Tensor, beta: float = 1.0) -> Tensor:
    """softmax(reward/β)·C over the C completions of the global batch; mean one. `[C]`.

    Args:
        reward: reward of each completion `[C]`.
        beta: temperature, above 0; large values weigh all alike.

    Raises:
        ValueError: β is not positive.

    Source: reward-weighted distillation of the TIP authors' training code.
    """
    if beta <= 0:
        raise ValueError(f"beta must be above 0, got {beta}.")
    return torch.softmax(reward.double() / beta, 0) * len(reward)


def _share_of_largest(x: Tensor) -> Tensor:
    largest = x.max() if len(x) else x.new_zeros(())
    return x / largest if bool(largest > 0) else torch.zeros_like(x)
