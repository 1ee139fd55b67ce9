"""Chunks of raw float32 logits on a device, and the launches of the kernels over them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tutelage.core.id_class import IdClass
from tutelage.core.kernels import more_rows
from tutelage.core.kernels import rows as kernels
from tutelage.core.kernels.buffers import NUM_AUX, NUM_STATISTICS, Buffers
from tutelage.core.kernels.products import on_device, project, swapped_bias
from tutelage.core.lazy import LazyLogits

STATISTICS_BLOCK = 2048
"""Ids that a program reads at a time."""
STATISTICS_WARPS = 8
GRADIENT_BLOCK = 4096
GRADIENT_WARPS = 8

ENTROPY, TEACHER_ENTROPY, REVERSE_KL, FORWARD_KL, LOG_P, LOG_Q = range(6)
"""Rows of the table of statistics, in the order of `TokenStats`."""

SIDES = ("student", "teacher")


@dataclass(frozen=True)
class Chunk:
    """Rows `[start, stop)`, projected and with their statistics in the table."""

    start: int
    stop: int

    @property
    def rows(self) -> slice:
        """Of the whole input."""
        return slice(self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Slopes:
    """What the gradient of a chunk is made of; weights are `[N]`, float32, None where absent."""

    reverse: Tensor | None = None
    """a of ``a p⊙(gap − E_p[gap])``."""
    forward: Tensor | None = None
    """b of ``b (p − q)``."""
    share: Tensor | None = None
    """c of ``c p``, `[n]` for the rows of the chunk."""
    spread: tuple[Tensor, Tensor] | None = None
    """d and shift of ``d exp(z + shift)``, z shifted so that the largest is 0, `[n]` each."""
    jsd: Mixture | None = None
    skew: Mixture | None = None
    replaced: tuple[Tensor, Tensor] | None = None
    """Ids and the gradient at them, `[n, k]`, whatever the rest says there."""
    added: tuple[Tensor, Tensor] | None = None
    """Ids and what is added to the gradient at them, `[n, k]`."""

    def times(self, factor: Tensor) -> Slopes:
        """The same of an objective that is multiplied by `factor`."""

        def scaled(x: Tensor | None) -> Tensor | None:
            return None if x is None else x * factor

        def of(x: Mixture | None) -> Mixture | None:
            return None if x is None else replace(x, weight=x.weight * factor)

        def at(x: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
            return None if x is None else (x[0], x[1] * factor)

        spread = None if self.spread is None else (self.spread[0] * factor, self.spread[1])
        return Slopes(
            scaled(self.reverse),
            scaled(self.forward),
            scaled(self.share),
            spread,
            of(self.jsd),
            of(self.skew),
            at(self.replaced),
            at(self.added),
        )


@dataclass(frozen=True)
class Mixture:
    """A divergence to ``m = (1 − w) p + w q``: its weights and what a first pass found."""

    weight: Tensor
    """`[N]`, float32."""
    w: float
    value: Tensor
    """`[n]` for the rows of the chunk, float64, nats."""
    mean: Tensor
    """E_p of the slope, `[n]`, float32."""


class Passes:
    """Buffers for chunks of logits, reused; nothing here waits for the device.

    Logits are accumulated in float32 from operands of the hidden states' dtype and stay raw: the
    kernels apply bias, scale and soft cap as they read.
    """

    def __init__(
        self,
        student: LazyLogits,
        teacher: LazyLogits | None,
        chunk_bytes: int | None,
        wants_gradient: bool,
    ) -> None:
        self.student = student.matched()
        self.teacher = None if teacher is None else teacher.matched()
        self.device = student.hidden.device
        size = len(student)
        shape = (NUM_STATISTICS, size)
        self.table = torch.full(shape, torch.nan, dtype=torch.float64, device=self.device)
        """The statistics of all rows, filled chunk by chunk, nats."""
        self._is_narrow = self.student.hidden.dtype != torch.float32
        self._buffers = Buffers.of(
            size,
            student.vocab_size,
            teacher is not None,
            wants_gradient and self._is_narrow,
            chunk_bytes,
        )
        self._class = IdClass.of(student)
        self.num_columns = student.vocab_size if self._class is None else self._class.num_columns
        """Columns of logits in use: V, less where ids count as one."""
        self._share = self.table[:0]
        self.chunk_rows, self.stride = self._buffers.chunk_rows, self._buffers.stride
        self._spare = self._buffers.spare
        self._allocate()
        self._biases = {side: self._bias(side) for side in SIDES}

    def _allocate(self) -> None:
        n, stride, v = self.chunk_rows, self.stride, self.student.vocab_size
        self.aux = torch.empty(NUM_AUX, n, dtype=torch.float32, device=self.device)
        # In units of two bytes, so that one piece of memory is read as either dtype.
        memory = torch.empty(
            (self._spare + 2 * n) * stride, dtype=torch.bfloat16, device=self.device
        )
        logits = memory[self._spare * stride :].view(torch.float32)
        self._student = logits.view(n, stride)[:, :v]
        self._gradient = self._student
        if self._spare:
            self._gradient = memory[: n * stride].view(n, stride)[:, :v]
        self._teacher = self._student
        if self.teacher is not None:
            self._teacher = torch.empty(n, stride, dtype=torch.float32, device=self.device)[:, :v]

    def _side(self, side: str) -> LazyLogits:
        return self.student if side == "student" or self.teacher is None else self.teacher

    def _bias(self, side: str) -> Tensor | None:
        """Of the columns in use."""
        bias = swapped_bias(self._side(side))
        return bias if bias is None or self._class is None else self._class.bias(bias)

    def _merge(self, one_class: IdClass, chunk: Chunk) -> None:
        """Makes one column of the ids that count as one; keeps what each has of the student's."""
        buffers = [self._student] if self.teacher is None else [self._teacher, self._student]
        for side, logits in zip(SIDES[::-1][-len(buffers) :], buffers, strict=True):
            head, bias = self._side(side), swapped_bias(self._side(side))
            _, self._share = one_class.merge(logits[: len(chunk)], bias, head.scale)

    def head_arguments(self, side: str) -> dict[str, Any]:
        """What a kernel has to do to the raw logits of one side."""
        head, bias = self._side(side), self._biases[side]
        return {
            "bias": self.aux if bias is None else bias,  # not read without BIAS
            "scale": float(head.scale),
            "cap": 1.0 if head.softcap is None else float(head.softcap),
            "BIAS": bias is not None,
            "SCALED": head.scale != 1.0,
            "CAP": head.softcap is not None,
        }

    def pair_arguments(self) -> dict[str, Any]:
        """The same of both sides for a kernel that reads both."""
        return {
            f"{side.upper() if key.isupper() else side}_{key}": value
            for side in SIDES
            for key, value in self.head_arguments(side).items()
        }

    def chunks(self, tokens: Tensor | None = None) -> Iterator[Chunk]:
        """Projects chunk after chunk and fills the table; `tokens` `[N]` for log-probabilities."""
        size = len(self.student)
        for start in range(0, size, max(1, self.chunk_rows)):
            chunk = Chunk(start, min(start + self.chunk_rows, size))
            project(self.student, chunk.rows, self._student[: len(chunk)])
            if self.teacher is not None:
                project(self.teacher, chunk.rows, self._teacher[: len(chunk)])
            if self._class is not None:
                self._merge(self._class, chunk)
            self._statistics(chunk, tokens)
            yield chunk

    def _statistics(self, chunk: Chunk, tokens: Tensor | None) -> None:
        self._launch_statistics(chunk, tokens, self.table, self.aux, chunk.start)

    def _launch_statistics(
        self, chunk: Chunk, tokens: Tensor | None, table: Tensor, aux: Tensor, first: int
    ) -> None:
        block = launch_block(self.num_columns, STATISTICS_BLOCK)
        with on_device(self.device):
            kernels.statistics_kernel[(len(chunk),)](
                self._student,
                self._teacher,
                tokens=aux if tokens is None else tokens,
                out=table,
                aux=aux,
                first=first,
                vocab_size=self.num_columns,
                stride=self.stride,
                out_stride=table.stride(0),
                aux_stride=aux.stride(0),
                TEACHER=self.teacher is not None,
                TOKENS=tokens is not None,
                LANES=num_lanes(block),
                BLOCK=block,
                num_warps=STATISTICS_WARPS,
                **self.pair_arguments(),
            )

    def mixture(self, chunk: Chunk, weight: Tensor, w: float, is_jsd: bool) -> Mixture:
        """The Jensen-Shannon divergence with the teacher's share w, or KL(p‖m)."""
        value = torch.empty(len(chunk), dtype=torch.float64, device=self.device)
        mean = torch.empty(len(chunk), dtype=torch.float32, device=self.device)
        with on_device(self.device):
            more_rows.mixture_kernel[(len(chunk),)](
                self._student,
                self._teacher,
                aux=self.aux,
                value=value,
                mean=mean,
                vocab_size=self.num_columns,
                stride=self.stride,
                aux_stride=self.chunk_rows,
                w=float(w),
                JSD=is_jsd,
                BLOCK=launch_block(self.num_columns, STATISTICS_BLOCK),
                num_warps=STATISTICS_WARPS,
                **self.pair_arguments(),
            )
        return Mixture(weight, w, value, mean)

    def logits(self, side: str, chunk: Chunk) -> Tensor:
        """Raw logits of the columns in use `[n, V]` of "student" or "teacher"."""
        logits = self._student if side == "student" else self._teacher
        return logits[: len(chunk), : self.num_columns]

    def logits_at(self, side: str, chunk: Chunk, ids: Tensor) -> Tensor:
        """Logits `[n, k]` at some ids of each row."""
        head = self._side(side)
        x = self.logits(side, chunk).gather(-1, ids)
        bias = self._biases[side]
        if bias is not None:
            x += bias[ids]
        if head.scale != 1.0:
            x *= head.scale
        return x if head.softcap is None else torch.tanh(x / head.softcap) * head.softcap

    def normalized(self, side: str, chunk: Chunk, logits: Tensor) -> Tensor:
        """Log-probabilities `[n, k]` of some logits of each row, float64."""
        return logits.double() - self.log_sums(side, chunk)[:, None]

    def log_sums(self, side: str, chunk: Chunk) -> Tensor:
        """log Σ exp of the logits of each row, `[n]`, float64."""
        return _log_sums(self.aux, side, chunk)

    def log_probabilities(self, side: str, chunk: Chunk, ids: Tensor) -> Tensor:
        """Log-probabilities `[n, k]` of some ids of each row, float64."""
        return self.normalized(side, chunk, self.logits_at(side, chunk, ids))

    def log_mass_left(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Log-probability `[n]` of the ids whose raw logits are not −inf, of both sides."""
        table = torch.empty(6, len(chunk), dtype=torch.float64, device=self.device)
        aux = torch.empty_like(self.aux)
        self._launch_statistics(chunk, None, table, aux, 0)
        left, all_ = ([_log_sums(x, s, chunk) for s in SIDES] for x in (aux, self.aux))
        return left[0] - all_[0], left[1] - all_[1]

    def slope_at(self, chunk: Chunk, logits: Tensor) -> Tensor:
        """Derivative `[n, k]` of the student's logits `[n, k]` with respect to the raw ones."""
        slope = torch.full_like(logits, float(self.student.scale))
        if self.student.softcap is not None:
            slope *= 1.0 - (logits / self.student.softcap).square()
        return slope

    def gradient(self, chunk: Chunk, slopes: Slopes) -> Tensor:
        """Gradient of the raw student logits `[n, V]` in the hidden states' dtype; see `_columns`.

        Of ids that count as one, each has its share of their column's.
        """
        found = self._columns(chunk, slopes)
        if self._class is not None:
            self._class.spread(found, self._share)
        return found

    def _columns(self, chunk: Chunk, slopes: Slopes) -> Tensor:
        """The same, of the columns in use; the others are not filled.

        It takes the place of the student's logits, which are gone afterwards. Where it is half
        as wide, its rows end before the logits that have not been read yet: rows `[i, j)` are
        written while logits from row i on are kept, and j ≤ spare + 2 i.
        """
        found = self._gradient[: len(chunk)]
        if slopes.added is None:
            with on_device(self.device):
                for first, last in self._spans(len(chunk)):
                    self._launch_gradient(chunk, slopes, first, last, self._gradient)
            if slopes.replaced is not None:
                ids, here = slopes.replaced
                found.scatter_(-1, ids, here.float().to(found.dtype))
            return found
        # What is added at a few ids is added in float32, where differences keep their digits.
        wide = self._student[: len(chunk)]
        with on_device(self.device):
            self._launch_gradient(chunk, slopes, 0, len(chunk), wide)
        if slopes.replaced is not None:
            wide.scatter_(-1, slopes.replaced[0], slopes.replaced[1].float())
        wide.scatter_add_(-1, slopes.added[0], slopes.added[1].float())
        if self._is_narrow:
            used = slice(self.num_columns)
            for first, last in self._spans(len(chunk)):
                found[first:last, used].copy_(wide[first:last, used])
        return found

    def _spans(self, size: int) -> Iterator[tuple[int, int]]:
        first = 0
        while first < size:
            last = min(size, self._spare + 2 * first) if self._spare else size
            yield first, last
            first = last

    def _launch_gradient(
        self, chunk: Chunk, slopes: Slopes, first: int, last: int, out: Tensor
    ) -> None:
        block = launch_block(self.num_columns, GRADIENT_BLOCK)
        num_blocks = math.ceil(self.num_columns / block)
        none = self.aux
        jsd, skew = slopes.jsd, slopes.skew
        kernels.gradient_kernel[((last - first) * num_blocks,)](
            self._student,
            self._teacher,
            aux=self.aux,
            reverse_weight=none if slopes.reverse is None else slopes.reverse,
            forward_weight=none if slopes.forward is None else slopes.forward,
            share_weight=none if slopes.share is None else slopes.share,
            spread_weight=none if slopes.spread is None else slopes.spread[0],
            spread_shift=none if slopes.spread is None else slopes.spread[1],
            jsd_weight=none if jsd is None else jsd.weight,
            jsd_mean=none if jsd is None else jsd.mean,
            skew_weight=none if skew is None else skew.weight,
            skew_mean=none if skew is None else skew.mean,
            jsd_w=0.5 if jsd is None else float(jsd.w),
            skew_w=0.5 if skew is None else float(skew.w),
            out=out,
            first=first,
            chunk_start=chunk.start,
            vocab_size=self.num_columns,
            num_blocks=num_blocks,
            stride=self.stride,
            aux_stride=self.chunk_rows,
            REVERSE=slopes.reverse is not None,
            FORWARD=slopes.forward is not None,
            SHARE=slopes.share is not None,
            SPREAD=slopes.spread is not None,
            JSD=jsd is not None,
            SKEW=skew is not None,
            BLOCK=block,
            num_warps=GRADIENT_WARPS,
            **self.pair_arguments(),
        )


def launch_block(vocab_size: int, most: int) -> int:
    return min(most, 1 << max(4, (vocab_size - 1).bit_length()))


def num_lanes(block: int) -> int:
    """A lane for every thread, unless a block has less than four ids for each."""
    return min(32 * STATISTICS_WARPS, max(1, block // 4))


def _log_sums(aux: Tensor, side: str, chunk: Chunk) -> Tensor:
    """log Σ exp of the logits of each row, `[n]`, float64."""
    row = SIDES.index(side)
    top, inverse = aux[row, : len(chunk)].double(), aux[2 + row, : len(chunk)].double()
    return top - inverse.log()
