"""Blocks of rows of the student alone, for what needs no teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from tutelage.core._block import Merged, can_be_inf, distribution, new_buffer, plan
from tutelage.core.id_class import IdClass
from tutelage.core.lazy import LazyLogits


@dataclass(frozen=True)
class StudentBlock:
    """What a block of r rows says of the student alone."""

    p: Tensor
    """Student probabilities `[r, V]`."""
    logits: Tensor
    """Student logits `[r, V]`, shifted so that the largest of a row is 0."""
    entropy: Tensor
    """`[r]`, float64, nats."""
    log_normalizer: Tensor
    """log Σ exp of the shifted logits `[r]`, float64."""

    def log_p_at(self, ids: Tensor) -> Tensor:
        """log p of some ids of each row, `[r, k]`."""
        return self.logits.gather(-1, ids) - self.log_normalizer[:, None].to(self.logits.dtype)


@dataclass(frozen=True)
class StudentChunk:
    """A chunk of rows `[start, stop)` of the student alone."""

    start: int
    stop: int
    student: Tensor
    """Student logits `[stop − start, V]`; reading the blocks shifts them."""
    scratch: tuple[Tensor, Tensor]
    block: int
    has_inf: bool
    free: Tensor
    """A buffer `[stop − start, V]` where the student's logits have a bound, else empty."""
    merged: Merged | None = None
    """Where ids count as one."""

    def gradient(self) -> tuple[Tensor, Tensor]:
        """What the blocks left in `student`, for all ids, and the free buffer."""
        if self.merged is None:
            return self.student, self.free
        self.merged.one_class.spread(self.merged.student, self.merged.share)
        return self.merged.student, self.free

    def blocks(self) -> Iterator[tuple[slice, StudentBlock]]:
        """Each block with the rows (of the whole input) it covers."""
        for low in range(0, self.stop - self.start, self.block):
            logits = self.student[low : low + self.block]
            n = len(logits)
            scratch = (self.scratch[0][:n], self.scratch[1][:n])
            found = distribution(logits, scratch, None, self.has_inf)
            rows = slice(self.start + low, self.start + low + n)
            read = (found.probabilities, logits, found.entropy, found.log_normalizer)
            yield rows, StudentBlock(*read)


def student_chunks(student: LazyLogits, chunk_bytes: int | None) -> Iterator[StudentChunk]:
    """Projects the student alone, chunk by chunk into buffers that are reused."""
    n = len(student)
    if n == 0:
        return
    student = student.matched()
    size, block = plan(student, chunk_bytes, 1)
    v, one_class = student.vocab_size, IdClass.of(student)
    width = v if one_class is None else one_class.num_columns
    buffer = new_buffer(student, size, v)
    p, product = (new_buffer(student, block, width) for _ in range(2))
    free = new_buffer(student, 0 if student.softcap is None else size, v)
    has_inf = can_be_inf(student)
    for start in range(0, n, size):
        stop, merged = min(start + size, n), None
        whole = logits = student.block(start, stop, out=buffer[: stop - start])
        if one_class is not None:
            logits, share = one_class.merge(whole)
            merged = Merged(one_class, share, whole, whole)
        here = (p, product), block, has_inf, free[: stop - start], merged
        yield StudentChunk(start, stop, logits, *here)


def student_numbers(
    student: LazyLogits, tokens: Tensor, chunk_bytes: int | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, entropy and log-probability of the sampled token, without a teacher's projection.

    `tokens` are columns in use where ids count as one.
    """
    for chunk in student_chunks(student, chunk_bytes):
        for rows, block in chunk.blocks():
            chosen = block.logits.gather(-1, tokens[rows, None]).squeeze(-1)
            yield rows, block.entropy, chosen - block.log_normalizer
