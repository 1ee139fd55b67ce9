"""The one place where `[rows, V]` numbers exist: a small block of them, read once, in cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from tutelage.core import kernels
from tutelage.core.id_class import IdClass
from tutelage.core.lazy import LazyLogits
from tutelage.core.partial import PartialLogits
from tutelage.core.shared_ids import SharedIds

TeacherLogits: TypeAlias = LazyLogits | PartialLogits
"""A teacher of which everything is known, or the likeliest ids of each row."""

CHUNK_BYTES = 96 << 20
"""Bytes of the `[chunk, V]` logit buffers together; more rows use the matrix units better."""

ACCELERATOR_CHUNK_BYTES = 1 << 30
"""The same on a device with many more multipliers to feed, probabilities included."""

_BLOCK_BYTES = 2 << 20
"""Bytes of one `[block, V]` slice: small enough that its element-wise passes stay in cache."""

_SEGMENT = 512
"""Ids among which the place of a maximum is looked for element by element."""


@dataclass(frozen=True)
class Block:
    """What one block of r rows says: `[r, V]` in float32 or float64, `[r]` in float64."""

    p: Tensor
    """Student probabilities `[r, V]`."""
    q: Tensor
    """Teacher probabilities `[r, V]`."""
    gap: Tensor
    """Student minus teacher logits `[r, V]`, up to a constant per row that cancels."""
    mean_gap: Tensor
    """`E_p[gap]`, `[r, 1]`, in the dtype of `gap`."""
    log_p: Tensor | None
    """Log-probability `[r]` the student gives the sampled token; None when no token was given."""
    log_q: Tensor | None
    """The same for the teacher."""
    entropy: Tensor
    teacher_entropy: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor
    teacher_logits: Tensor
    """Teacher logits `[r, V]`, shifted so that the largest of a row is 0."""
    log_normalizers: tuple[Tensor, Tensor]
    """log Σ exp of the shifted logits `[r]`, of student and teacher."""
    student_top: Tensor | None = None
    """Ids of the student's largest logits `[r, k]`, largest first; None where none were asked
    for. (`gap` takes the logits' place, and from it they come back rounded.)"""
    tokens: Tensor | None = None
    """Sampled ids `[r]`; None when none were given."""

    def log_ratio(self) -> Tensor:
        """log p − log q, `[r, V]`."""
        student, teacher = self.log_normalizers
        return self.gap - (student - teacher)[:, None].to(self.gap.dtype)

    def log_probabilities(self) -> tuple[Tensor, Tensor]:
        """log p and log q, `[r, V]` each."""
        log_q = self.teacher_logits - self.log_normalizers[1][:, None].to(self.gap.dtype)
        return self.log_ratio() + log_q, log_q

    def log_p_at(self, ids: Tensor) -> Tensor:
        """log p of some ids of each row, `[r, k]`."""
        logits = self.gap.gather(-1, ids) + self.teacher_logits.gather(-1, ids)
        return logits - self.log_normalizers[0][:, None].to(self.gap.dtype)

    def statistics(self) -> tuple[Tensor, ...]:
        """The six numbers of `TokenStats`, in its order; needs the sampled tokens."""
        if self.log_p is None or self.log_q is None:
            raise ValueError("a block read without tokens has no token log-probabilities.")
        divergences = (self.reverse_kl, self.forward_kl)
        return (self.entropy, self.teacher_entropy, *divergences, self.log_p, self.log_q)


@dataclass(frozen=True)
class Distribution:
    probabilities: Tensor
    total: Tensor
    """Sum of `probabilities`, float64 `[r]`: 1 up to the rounding that a long row piles up."""
    log_normalizer: Tensor
    entropy: Tensor
    token_logprob: Tensor | None


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Value and place of the largest logit of each row, `[r, 1]` each.

    Finding the place of a maximum reads one element after the other; finding its value reads
    whole vectors. So the segment is found by value, and only there the place: a fifth of the time.
    """
    size = logits.shape[-1]
    if size < 2 * _SEGMENT:
        return logits.max(-1, keepdim=True)
    whole = size // _SEGMENT * _SEGMENT
    tops = logits[:, :whole].view(len(logits), -1, _SEGMENT).amax(-1)
    if whole < size:
        tops = torch.cat([tops, logits[:, whole:].amax(-1, keepdim=True)], -1)
    top, segment = tops.max(-1, keepdim=True)
    start = (segment * _SEGMENT).clamp(max=size - _SEGMENT)
    ids = start + torch.arange(_SEGMENT, device=logits.device)
    place = logits.gather(-1, ids).argmax(-1, keepdim=True)
    return top, start + place


def _dot(x: Tensor, y: Tensor, scratch: Tensor) -> Tensor:
    """Σ_v x y, float64 `[r]`; vecdot would allocate the product, at several times the price."""
    return torch.mul(x, y, out=scratch).sum(-1).double()


def distribution(
    logits: Tensor, scratch: tuple[Tensor, Tensor], tokens: Tensor | None, has_inf: bool
) -> Distribution:
    """Softmax, entropy and token log-probability; `logits` are shifted in place to maximum 0.

    With the maximum at 0, H = log Z + Σ p·(−z) adds only non-negative terms, and log Z is
    log1p of what all other tokens hold against the largest, so that nearly deterministic rows
    keep their relative precision. Numbers per row are float64: they cost nothing, and a KL is a
    small difference of large normalizers.
    """
    top, index = _largest(logits)
    logits.sub_(top)
    p = torch.softmax(logits, -1, out=scratch[0])
    largest = p.gather(-1, index)
    others = p.scatter_(-1, index, 0.0).sum(-1).double()
    p.scatter_(-1, index, largest)
    largest = largest.squeeze(-1).double()
    total = largest + others
    log_z = torch.log1p(others / largest)
    finite = logits.masked_fill(p == 0, 0.0) if has_inf else logits
    entropy = log_z - _dot(p, finite, scratch[1]) / total
    token = None if tokens is None else logits.gather(-1, tokens[:, None]).squeeze(-1) - log_z
    return Distribution(p, total, log_z, entropy, token)


def read_block(
    student: Tensor,
    teacher: Tensor,
    scratch: tuple[Tensor, Tensor, Tensor],
    tokens: Tensor | None = None,
    has_inf: bool = False,
    num_top: int = 0,
    num_ids: int | None = None,
) -> Block:
    """Both distributions of a block of logits, which are overwritten (`student` becomes `gap`).

    Args:
        student: logits `[r, V]`, overwritten.
        teacher: logits `[r, V]`, overwritten.
        scratch: three `[r, V]` buffers; the first two receive p and q.
        tokens: sampled token ids `[r]`.
        has_inf: whether a logit can be −inf, which costs three more passes.
        num_top: how many of the student's likeliest ids to find.
        num_ids: columns among which they are; None for all.
    """
    s = distribution(student, (scratch[0], scratch[2]), tokens, has_inf)
    t = distribution(teacher, (scratch[1], scratch[2]), tokens, has_inf)
    p, q = s.probabilities, t.probabilities
    offset = s.log_normalizer - t.log_normalizer
    student_top = None
    if num_top:
        among = student[:, :num_ids]
        student_top = among.topk(min(num_top, among.shape[-1]), -1).indices
    gap = student.sub_(teacher)
    teacher_gap = gap.masked_fill(q == 0, 0.0) if has_inf else gap
    forward_kl = offset - _dot(q, teacher_gap, scratch[2]) / t.total
    if has_inf:
        gap.masked_fill_(p == 0, 0.0)
    mean_gap = _dot(p, gap, scratch[2]) / s.total
    return Block(
        p,
        q,
        gap,
        mean_gap[:, None].to(gap.dtype),
        s.token_logprob,
        t.token_logprob,
        s.entropy,
        t.entropy,
        mean_gap - offset,
        forward_kl,
        teacher,
        (s.log_normalizer, t.log_normalizer),
        student_top,
        tokens,
    )


def rows_per_chunk(
    num_rows: int, vocab_size: int, dtype: torch.dtype, chunk_bytes: int, num_buffers: int = 2
) -> int:
    """Rows whose logit buffers fit into `chunk_bytes`, at least 1.

    Chunks are of nearly equal size: a last one of few rows would read the whole head for little.
    """
    most = max(1, chunk_bytes // (num_buffers * vocab_size * dtype.itemsize))
    num_chunks = max(1, math.ceil(num_rows / most))
    return max(1, math.ceil(num_rows / num_chunks))


def chunk_budget(device: torch.device) -> int:
    """Bytes of a chunk's logits where nobody says how many."""
    if device.type == "cpu":
        return CHUNK_BYTES
    return kernels.CHUNK_BYTES if kernels.is_supported(device) else ACCELERATOR_CHUNK_BYTES


def plan(student: LazyLogits, chunk_bytes: int | None, num_sides: int) -> tuple[int, int]:
    """Rows of a chunk and of a block.

    Blocks exist for the caches of a CPU; elsewhere each would cost a launch for every pass, so a
    block is a chunk and its probabilities take their share of the budget.
    """
    n, v, dtype = len(student), student.vocab_size, student.dtype
    if student.hidden.device.type == "cpu":
        budget = CHUNK_BYTES if chunk_bytes is None else chunk_bytes
        rows = rows_per_chunk(n, v, dtype, budget, num_sides)
        return rows, min(rows, max(1, _BLOCK_BYTES // (v * dtype.itemsize)))
    budget = ACCELERATOR_CHUNK_BYTES if chunk_bytes is None else chunk_bytes
    rows = rows_per_chunk(n, v, dtype, budget, 2 * num_sides + 1)
    return rows, rows


def new_buffer(student: LazyLogits, rows: int, width: int) -> Tensor:
    return torch.empty(rows, width, dtype=student.dtype, device=student.hidden.device)


@dataclass(frozen=True)
class Merged:
    """What brings the gradient of a chunk in which ids count as one back to all ids."""

    one_class: IdClass
    share: Tensor
    """Of the student's class, which each id has `[n, |C|]`."""
    student: Tensor
    """The whole buffer `[n, V]`, of which `Chunk.student` is a part."""
    teacher: Tensor


@dataclass(frozen=True)
class MergedShared:
    """The same where two vocabularies are compared over what they share."""

    shared: SharedIds
    columns: Tensor
    """`Chunk.student`, of the columns `[n, C]`."""
    student: Tensor
    """The student's logits `[n, V]`."""


@dataclass(frozen=True)
class Chunk:
    """A chunk of rows `[start, stop)` whose blocks can be read one after the other."""

    start: int
    stop: int
    student: Tensor
    """Student logits `[stop − start, V]`; reading the blocks turns them into `gap`."""
    teacher: Tensor
    scratch: tuple[Tensor, Tensor, Tensor]
    block: int
    has_inf: bool
    known: PartialLogits | None = None
    """What is known of the teacher's rows where that is not everything."""
    merged: Merged | MergedShared | None = None
    """Where ids count as one."""

    def gradient(self) -> tuple[Tensor, Tensor]:
        """What the blocks left in `student`, for all ids, and a free buffer, `[n, V]` each."""
        if self.merged is None:
            return self.student, self.teacher
        if isinstance(self.merged, MergedShared):
            self.merged.shared.spread(self.merged.columns, self.merged.student)
            return self.merged.student, torch.empty_like(self.merged.student)
        self.merged.one_class.spread(self.merged.student, self.merged.share)
        return self.merged.student, self.merged.teacher

    def blocks(
        self, tokens: Tensor | None = None, num_top: int = 0
    ) -> Iterator[tuple[slice, Block]]:
        """Each block with the rows (of the whole input) it covers; see `read_block`."""
        for low in range(0, self.stop - self.start, self.block):
            here = slice(low, min(low + self.block, self.stop - self.start))
            rows = slice(self.start + here.start, self.start + here.stop)
            n = here.stop - here.start
            p, q, product = (x[:n] for x in self.scratch)
            found = read_block(
                self.student[here],
                self.teacher[here],
                (p, q, product),
                None if tokens is None else tokens[rows],
                self.has_inf,
                num_top,
                self.merged.shared.num_ids if isinstance(self.merged, MergedShared) else None,
            )
            yield rows, found if self.known is None else coarse(found, self.known[rows])


def coarse(block: Block, known: PartialLogits) -> Block:
    """The block with entropy and divergences over the known ids and one bucket for the rest."""
    log_p, log_q = block.log_probabilities()
    ids = torch.cat([known.ids, known.tokens[:, None]], 1)
    weight = torch.ones(ids.shape, dtype=torch.float64, device=ids.device)
    weight[:, -1] = known.is_token_extra  # one among the likeliest is counted there
    a, b = (x.gather(1, ids).double() for x in (log_p, log_q))
    rest = (x.scatter(1, ids, -torch.inf).double().logsumexp(1) for x in (log_p, log_q))
    a, b = (torch.cat([x, r[:, None]], 1) for x, r in zip((a, b), rest, strict=True))
    weight = torch.cat([weight, torch.ones_like(weight[:, :1])], 1)
    p, q = a.exp() * weight, b.exp() * weight
    gap = (a - b).masked_fill((a == -torch.inf) & (b == -torch.inf), 0.0)
    return replace(
        block,
        teacher_entropy=-torch.where(q > 0, q * b, 0.0).sum(1),
        reverse_kl=torch.where(p > 0, p * gap, 0.0).sum(1),
        forward_kl=-torch.where(q > 0, q * gap, 0.0).sum(1),
    )


def chunks(student: LazyLogits, teacher: TeacherLogits, chunk_bytes: int | None) -> Iterator[Chunk]:
    """Projects both sides chunk by chunk into two buffers that are reused."""
    n = len(student)
    if n == 0:
        return
    student = student.matched()
    known = teacher if isinstance(teacher, PartialLogits) else None
    if not isinstance(teacher, PartialLogits):
        teacher = teacher.matched()
    rows, block = plan(student, chunk_bytes, 2)
    v, one_class = student.vocab_size, IdClass.of(student)
    student_buffer, teacher_buffer = (
        new_buffer(student, rows, size) for size in (v, teacher.vocab_size)
    )
    width = v if one_class is None else one_class.num_columns
    width = width if student.shared is None else student.shared.num_columns
    scratch = tuple(new_buffer(student, block, width) for _ in range(3))
    has_inf = can_be_inf(student) or can_be_inf(teacher)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        merged: Merged | MergedShared | None = None
        ours = student.block(start, stop, out=student_buffer[: stop - start])
        theirs = teacher.block(start, stop, out=teacher_buffer[: stop - start])
        if one_class is not None:
            whole = (ours, theirs)
            (ours, share), (theirs, _) = (one_class.merge(logits) for logits in whole)
            merged = Merged(one_class, share, *whole)
        if student.shared is not None:
            columns = [student.shared.merge(x, side) for side, x in enumerate((ours, theirs))]
            merged = MergedShared(student.shared, columns[0], ours)
            ours, theirs = columns
        buffers = (scratch[0], scratch[1], scratch[2])
        yield Chunk(start, stop, ours, theirs, buffers, block, has_inf, known, merged)


def can_be_inf(logits: TeacherLogits) -> bool:
    """Whether a bias rules an id out."""
    if isinstance(logits, PartialLogits):
        return bool(torch.isinf(logits.log_q).any() | torch.isinf(logits.token_log_q).any())
    return logits.bias is not None and bool(torch.isinf(logits.bias).any())


def check_pair(student: LazyLogits, teacher: TeacherLogits) -> None:
    """Refuses two sides that do not describe the same rows over the same vocabulary."""
    if len(student) != len(teacher):
        raise ValueError(
            f"student and teacher must have the same rows, got {len(student)} and {len(teacher)}."
        )
    if student.shared is not None:
        sizes = (student.vocab_size, teacher.vocab_size)
        if student.shared.sizes != sizes or student.one_class or isinstance(teacher, PartialLogits):
            raise ValueError(
                f"shared ids are of vocabularies of {student.shared.sizes} ids, got {sizes}; stops "
                "are part of them, and of the teacher everything is known."
            )
        return
    if student.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"student and teacher must share a vocabulary, got {student.vocab_size} and "
            f"{teacher.vocab_size} ids. Cut the larger with LazyLogits.cut once the tokenizers "
            "are known to agree."
        )
    if isinstance(teacher, LazyLogits) and teacher.one_class not in ((), student.one_class):
        raise ValueError(
            f"the ids that count as one are those of the student's logits, {student.one_class}, "
            f"got {teacher.one_class} for the teacher."
        )
    if isinstance(teacher, PartialLogits) and student.one_class:
        raise ValueError(
            f"ids {student.one_class} cannot count as one: of the teacher only some ids are known."
        )
