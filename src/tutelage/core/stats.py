"""Statistics of every supervised token, the single input of every selection rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from tutelage.core._block import CHUNK_BYTES, check_pair, chunks
from tutelage.core.extras import EXTRAS
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
    extras: dict[str, Tensor] = field(default_factory=dict)
    """Statistics that only some rules and objectives need, `[N]` each; see `EXTRAS`."""

    def __len__(self) -> int:
        return self.entropy.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> TokenStats:
        return TokenStats.unstack(self.stack()[:, rows], tuple(self.extras))

    @staticmethod
    def cat(parts: Sequence[TokenStats]) -> TokenStats:
        """Statistics of several batches, one after the other; all have the same extras."""
        return TokenStats.unstack(
            torch.cat([part.stack() for part in parts], 1), tuple(parts[0].extras)
        )

    def stack(self) -> Tensor:
        """All statistics as one float64 tensor `[6 + E, N]`: the fields, then the E extras."""
        main = [getattr(self, f.name) for f in fields(self) if f.name != "extras"]
        return torch.stack([x.double() for x in (*main, *self.extras.values())])

    @staticmethod
    def unstack(table: Tensor, extras: Sequence[str] = ()) -> TokenStats:
        """Inverse of `stack`; `extras` names the rows after the sixth."""
        a, b, c, d, e, f, *rest = table.unbind(0)
        return TokenStats(a, b, c, d, e, f, dict(zip(extras, rest, strict=True)))


def token_stats(
    student: LazyLogits,
    teacher: LazyLogits,
    tokens: Tensor,
    chunk_bytes: int = CHUNK_BYTES,
    extras: Sequence[str] = (),
) -> TokenStats:
    """Exact full-vocabulary statistics of every row, without gradient and without `[N, V]`.

    Replaces ``log_p = student_logits.log_softmax(-1); …`` over `[N, V]` tensors.

    Args:
        student: student logits, N rows over V ids.
        teacher: teacher logits, the same rows and ids.
        tokens: sampled token ids `[N]`.
        chunk_bytes: size of the two logit buffers.
        extras: names of further statistics to compute, keys of `EXTRAS`.

    Returns:
        `TokenStats` of N rows.

    Raises:
        ValueError: the two sides differ in rows or vocabulary, `tokens` in rows, or an extra is
            unknown.

    Source: TIP (arXiv 2604.14084), section 3; EOPD (arXiv 2603.07079), section 4.
    """
    check_pair(student, teacher)
    if tokens.shape != (len(student),):
        raise ValueError(f"tokens must be [N] with N = {len(student)}, got {tuple(tokens.shape)}.")
    unknown = [name for name in extras if name not in EXTRAS]
    if unknown:
        raise ValueError(f"extras must be among {tuple(EXTRAS)}, got {unknown[0]!r}.")
    shape = (6 + len(extras), len(student))
    table = torch.empty(shape, dtype=student.dtype, device=student.hidden.device)
    with torch.no_grad():
        for chunk in chunks(student, teacher, chunk_bytes):
            for rows, block in chunk.blocks(tokens):
                more = (EXTRAS[name](block) for name in extras)
                table[:, rows] = torch.stack([x.to(table) for x in (*block.statistics(), *more)])
    return TokenStats.unstack(table, extras)
