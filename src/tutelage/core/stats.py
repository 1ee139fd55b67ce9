"""Statistics of every supervised token, the single input of every selection rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tutelage.core import kernels
from tutelage.core._block import TeacherLogits, check_pair, chunks
from tutelage.core._student import student_numbers
from tutelage.core.extras import EXTRAS
from tutelage.core.id_class import IdClass
from tutelage.core.lazy import LazyLogits
from tutelage.core.partial import PartialLogits


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
    has_teacher: bool = True
    """False if only the student was read; then what needs a teacher is NaN."""

    def __len__(self) -> int:
        return self.entropy.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> TokenStats:
        return TokenStats.unstack(self.stack()[:, rows], tuple(self.extras), self.has_teacher)

    @staticmethod
    def cat(parts: Sequence[TokenStats]) -> TokenStats:
        """Statistics of several batches, one after the other; all have the same extras."""
        table = torch.cat([part.stack() for part in parts], 1)
        has_teacher = all(part.has_teacher for part in parts)
        return TokenStats.unstack(table, tuple(parts[0].extras), has_teacher)

    def stack(self) -> Tensor:
        """All statistics as one float64 tensor `[6 + E, N]`: the fields, then the E extras."""
        divergences = (self.reverse_kl, self.forward_kl)
        main = (self.entropy, self.teacher_entropy, *divergences, self.log_p, self.log_q)
        return torch.stack([x.double() for x in (*main, *self.extras.values())])

    @staticmethod
    def unstack(table: Tensor, extras: Sequence[str] = (), has_teacher: bool = True) -> TokenStats:
        """Inverse of `stack`; `extras` names the rows after the sixth."""
        a, b, c, d, e, f, *rest = table.unbind(0)
        return TokenStats(a, b, c, d, e, f, dict(zip(extras, rest, strict=True)), has_teacher)

    def is_finite(self) -> Tensor:
        """`[N]`, True where all of the six statistics that were computed are numbers."""
        main = self.stack()[:6]
        if not self.has_teacher:
            main = torch.stack([self.entropy, self.log_p])
        return torch.isfinite(main).all(0)


def token_stats(
    student: LazyLogits,
    teacher: TeacherLogits | None,
    tokens: Tensor,
    chunk_bytes: int | None = None,
    extras: Sequence[str] = (),
) -> TokenStats:
    """Exact full-vocabulary statistics of every row, without gradient and without `[N, V]`.

    Replaces ``log_p = student_logits.log_softmax(-1); …`` over `[N, V]` tensors.

    Args:
        student: student logits, N rows over V ids.
        teacher: teacher logits, the same rows and ids. None halves the work: entropy and log_p
            are computed, all that rules with `needs_teacher` False need, and the rest is NaN. Of
            `PartialLogits` its entropy and the divergences are lower bounds.
        tokens: sampled token ids `[N]`; where ids count as one, such a token's log-probability is
            that of all of them.
        chunk_bytes: size of the logit buffers; None for what suits the device.
        extras: names of further statistics to compute, keys of `EXTRAS`.

    Returns:
        `TokenStats` of N rows.

    Raises:
        ValueError: the two sides differ in rows or vocabulary, `tokens` in rows, an extra is
            unknown, or extras are asked for without a teacher.

    Source: TIP (arXiv 2604.14084), section 3; EOPD (arXiv 2603.07079), section 4.
    """
    if teacher is not None:
        check_pair(student, teacher)
    if tokens.shape != (len(student),):
        raise ValueError(f"tokens must be [N] with N = {len(student)}, got {tuple(tokens.shape)}.")
    unknown = [name for name in extras if name not in EXTRAS]
    if unknown:
        raise ValueError(f"extras must be among {tuple(EXTRAS)}, got {unknown[0]!r}.")
    if teacher is None and extras:
        raise ValueError(f"extras need a teacher, got {tuple(extras)} and none.")
    one_class = IdClass.of(student)
    if one_class is not None:
        tokens = one_class.columns(tokens)
    if student.shared is not None and teacher is not None:
        tokens = student.shared.columns(tokens)
    if not isinstance(teacher, PartialLogits) and _is_fused(student, teacher, extras):
        with torch.no_grad():
            return _by_kernels(student, teacher, tokens, chunk_bytes, extras)
    shape = (6 + len(extras), len(student))
    table = torch.full(shape, torch.nan, dtype=student.dtype, device=student.hidden.device)
    with torch.no_grad():
        if teacher is None:
            for rows, entropy, log_p in student_numbers(student, tokens, chunk_bytes):
                table[0, rows], table[4, rows] = entropy, log_p
            return TokenStats.unstack(table, has_teacher=False)
        for chunk in chunks(student, teacher, chunk_bytes):
            for rows, block in chunk.blocks(tokens):
                more = (EXTRAS[name](block) for name in extras)
                table[:, rows] = torch.stack([x.to(table) for x in (*block.statistics(), *more)])
    return TokenStats.unstack(table, extras)


def _is_fused(student: LazyLogits, teacher: LazyLogits | None, extras: Sequence[str]) -> bool:
    if not kernels.suits(*([student] if teacher is None else [student, teacher])):
        return False
    from tutelage.core.kernels import tops  # needs Triton

    return tops.FOUND.keys() >= set(extras)


def _by_kernels(
    student: LazyLogits,
    teacher: LazyLogits | None,
    tokens: Tensor,
    chunk_bytes: int | None,
    extras: Sequence[str],
) -> TokenStats:
    from tutelage.core.kernels import passes, tops  # needs Triton

    more = torch.empty(len(extras), len(student), dtype=torch.float64, device=student.hidden.device)
    work = passes.Passes(student, teacher, chunk_bytes, wants_gradient=False)
    tokens = tokens.contiguous()
    for chunk in work.chunks(tokens):
        found = tops.More(work, chunk, tokens)
        for i, name in enumerate(extras):
            more[i, chunk.rows] = found.get(name)
    table = torch.cat([work.table, more]).to(student.dtype)
    return TokenStats.unstack(table, extras, has_teacher=teacher is not None)
