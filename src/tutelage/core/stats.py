"""Statistics of every supervised token, the single input of every selection rule."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tutelage.core._block import CHUNK_BYTES, check_pair, chunks
from tutelage.core.lazy import LazyLogits


@dataclass(frozen=True)
class TokenStats:
    """One number a row for each statistic, float32 or wider, in nats where it has a unit."""

    entropy: Tensor
    """Student entropy H(p) `[N]`, nats."""
    teacher_entropy: Tensor
    """Teacher entropy H(q) `[N]`, nats."""
    reverse_kl: Tensor
    """KL(p‖q) `[N]`, nats."""
    forward_kl: Tensor
    """KL(q‖p) `[N]`, nats."""
    log_p: Tensor
    """Student log-probability of the sampled token `[N]`, nats."""
    log_q: Tensor
    """Teacher log-probability of the sampled token `[N]`, nats."""

    def __len__(self) -> int:
        return self.entropy.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> TokenStats:
        return TokenStats(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @staticmethod
    def cat(parts: list[TokenStats]) -> TokenStats:
        """Statistics of several batches, one after the other."""
        return TokenStats(
            **{
                f.name: torch.cat([getattr(part, f.name) for part in parts])
                for f in fields(TokenStats)
            }
        )

    def stack(self) -> Tensor:
        """All statistics as one float64 tensor `[6, N]`, in the order of the fields."""
        return torch.stack([getattr(self, f.name).double() for f in fields(self)])

    @staticmethod
    def unstack(table: Tensor) -> TokenStats:
        """Inverse of `stack`."""
        return TokenStats(*table.unbind(0))


def token_stats(
    student: LazyLogits, teacher: LazyLogits, tokens: Tensor, chunk_bytes: int = CHUNK_BYTES
) -> TokenStats:
    """Exact full-vocabulary statistics of every row, without gradient and without `[N, V]`.

    Replaces ``log_p = student_logits.log_softmax(-1); …`` over `[N, V]` tensors.

    Args:
        student: student logits, N rows over V ids.
        teacher: teacher logits, the same rows and ids.
        tokens: sampled token ids `[N]`.
        chunk_bytes: size of the two logit buffers.

    Returns:
        `TokenStats` of N rows.

    Raises:
        ValueError: the two sides differ in rows or vocabulary, or `tokens` in rows.

    Source: TIP (arXiv 2604.14084), section 3; EOPD (arXiv 2603.07079), section 4.
    """
    check_pair(student, teacher)
    if tokens.shape != (len(student),):
        raise ValueError(f"tokens must be [N] with N = {len(student)}, got {tuple(tokens.shape)}.")
    table = torch.empty(6, len(student), dtype=student.dtype, device=student.hidden.device)
    with torch.no_grad():
        for chunk in chunks(student, teacher, chunk_bytes):
            for rows, block in chunk.blocks(tokens):
                table[:, rows] = torch.stack(block.statistics())
    return TokenStats.unstack(table)
