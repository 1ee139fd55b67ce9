"""Policy gradients: advantages among the completions of a prompt, and the clipped term they enter.

The term needs the student alone, so an objective of nothing else needs no teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from tutelage.core._block import Block
from tutelage.core._gradients import Gradients
from tutelage.core._student import StudentBlock, student_chunks
from tutelage.core._sums import added
from tutelage.core.lazy import LazyLogits
from tutelage.core.terms import SampledReverseKL, clipped_surrogate

SCALES = ("std", "none")
"""What the advantages of a prompt are divided by."""

STD_OFFSET = 1e-4
"""Added to the standard deviation, as TRL does: rewards that differ by rounding stay small."""


@dataclass(frozen=True)
class ClippedPolicy:
    """PPO's clipped surrogate of the sampled token, with an advantage from outside.

    ``r = p(y)/p_old(y)``, ``L = −min(r A, clip(r, 1 − ε_low, 1 + ε_high) A)``; the logit gradient
    is ``−r A (e_y − p)`` where the clip does not bind, else 0.

    Source: GRPO (arXiv 2402.03300), equation 3 without its KL; two bounds as in DAPO (2503.14476).
    """

    tokens: Tensor
    """Sampled ids y `[K]`."""
    old_logprobs: Tensor
    """log p_old(y) `[K]`, nats, of the student that sampled the completion."""
    advantages: Tensor
    """A `[K]`: GRPO's is that of the row's completion, OPSA's of the row itself."""
    clip_low: float = 0.2
    """ε_low, in (0, 1]."""
    clip_high: float = 0.2
    """ε_high, above 0."""
    is_clipped: Tensor = field(init=False)
    """Whether the clip took effect `[K]`, so that the row has no gradient; known once read."""

    def __post_init__(self) -> None:
        unread = torch.zeros_like(self.tokens, dtype=torch.bool)
        object.__setattr__(self, "is_clipped", unread)

    def at(self, tokens: Tensor) -> ClippedPolicy:
        """The same term of other columns `[K]`, with one record of where the clip took effect."""
        other = replace(self, tokens=tokens)
        object.__setattr__(other, "is_clipped", self.is_clipped)
        return other

    def __call__(self, block: Block | StudentBlock, rows: slice) -> tuple[Tensor, Tensor]:
        """Value `[r]` in nats and its logit gradient `[r, V]`, for the rows of a block."""
        tokens = self.tokens[rows, None]
        log_p = block.log_p_at(tokens).squeeze(-1)
        value, slope = self.value_and_slope(log_p, log_p, rows)
        gradient = block.p * slope[:, None]
        return value, gradient.scatter_add_(-1, tokens, -slope[:, None])

    def value_and_slope(self, log_p: Tensor, _log_q: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Value in nats and r A where the clip does not bind, `[r]` each; notes where it does."""
        old, advantage = (x[rows].to(log_p.dtype) for x in (self.old_logprobs, self.advantages))
        bounds = (1 - self.clip_low, 1 + self.clip_high)
        value, slope, is_clipped = clipped_surrogate((log_p - old).exp(), advantage, bounds)
        self.is_clipped[rows] = is_clipped
        return value, slope


Sampled: TypeAlias = SampledReverseKL | ClippedPolicy
"""Terms of the sampled token alone, which clip."""


def policy_rows(
    student: LazyLogits,
    terms: Sequence[tuple[object, Tensor]],
    chunk_bytes: int | None,
    gradients: Gradients,
) -> Tensor:
    """The fields of `Objective` a row `[5, K]` without a teacher, whose numbers are NaN.

    Args:
        student: logits of K rows.
        terms: `ClippedPolicy`s with their weights `[K]`.
        chunk_bytes: size of the logit buffer; None for what suits the device.
        gradients: receive those of the sum.
    """
    shape = (5, len(student))
    rows = torch.full(shape, torch.nan, dtype=torch.float64, device=student.hidden.device)
    for chunk in student_chunks(student, chunk_bytes):
        for here, block in chunk.blocks():
            rows[2, here] = block.entropy
            found = (
                (term(block, here), weights[here])
                for term, weights in terms
                if isinstance(term, ClippedPolicy)
            )
            rows[4, here], gradient = added(found, block.p)
            block.logits.copy_(gradient)
        if gradients.needed:
            gradients.add(student, chunk)
    return rows


def group_advantages(rewards: Tensor, num_samples: int, scale: str = "std") -> Tensor:
    """Advantage of every completion over the others of its prompt `[C]`, float64.

    ``A = reward − mean``, with `scale` "std" divided by ``std + 1e-4`` (n − 1 in the variance),
    mean and std being those of the prompt's completions. A prompt whose rewards are all equal has
    advantages of exactly 0.

    Args:
        rewards: `[C]`, the `num_samples` completions of a prompt side by side.
        num_samples: completions of a prompt, at least 2.
        scale: one of `SCALES`.

    Raises:
        ValueError: fewer than 2 completions a prompt, a part of a prompt, or an unknown scale.

    Source: GRPO (arXiv 2402.03300), outcome supervision; `scale` "none" is Dr. GRPO (2503.20783).
    """
    if num_samples < 2 or len(rewards) % num_samples:
        raise ValueError(
            "advantages need 2 or more completions of every prompt, got "
            f"{len(rewards)} completions for num_samples = {num_samples}."
        )
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {SCALES}, got {scale!r}.")
    groups = rewards.double().view(-1, num_samples)
    advantages = groups - groups.mean(1, keepdim=True)
    if scale == "std":
        advantages = advantages / (groups.std(1, keepdim=True) + STD_OFFSET)
    # the mean of equal numbers can differ from them by rounding
    return advantages.masked_fill(is_uniform(rewards, num_samples)[:, None], 0.0).flatten()


def sharpening_advantages(entropy: Tensor) -> Tensor:
    """``−½ − (H − min H)/(2 (max H − min H))`` of every row `[K]`, float64, in [−1, −½].

    A token that is made less likely by it sharpens the student without any teacher. All rows have
    −½ where their entropies are equal.

    Args:
        entropy: H of the rows to train on, of the global batch `[K]`, nats.

    Source: OPSA (arXiv 2608.31046), for the tokens of the lowest log-probability.
    """
    h = entropy.double()
    low, high = (h.min(), h.max()) if len(h) else (h.new_zeros(()), h.new_zeros(()))
    return -0.5 - (h - low) / (2 * torch.where(high > low, high - low, 1.0))


def is_uniform(rewards: Tensor, num_samples: int) -> Tensor:
    """Whether a prompt's completions all have one reward, so that every advantage is 0 `[P]`."""
    groups = rewards.view(-1, num_samples)
    return (groups == groups[:, :1]).all(1)
