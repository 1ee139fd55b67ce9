"""Chunks of raw float32 logits on a device, and the launches of the kernels over them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tutelage.core.kernels import rows as kernels
from tutelage.core.lazy import LazyLogits

CHUNK_BYTES = 5 << 29
"""Bytes of the logits of a chunk; its gradient takes their place. 2,048 rows of 151,936 ids."""

STATISTICS_BLOCK = 2048
"""Ids that a program reads at a time."""
STATISTICS_WARPS = 8
GRADIENT_BLOCK = 4096
GRADIENT_WARPS = 8

ENTROPY, TEACHER_ENTROPY, REVERSE_KL, FORWARD_KL, LOG_P, LOG_Q = range(6)
"""Rows of the table of statistics, in the order of `TokenStats`."""

_ALIGNMENT = 64
"""Buffers' rows start at multiples of so many numbers, as products and wide loads want it."""

_TILE = 128
"""Rows of a chunk are a multiple of a product's tile where there are many."""

_SPARE = 8
"""An eighth of a chunk's gradient has a place of its own, see `Passes.gradient`."""

_NUM_AUX = 6


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
    jsd: Mixture | None = None
    skew: Mixture | None = None


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
        self.table = torch.full((6, size), torch.nan, dtype=torch.float64, device=self.device)
        """The statistics of all rows, filled chunk by chunk, nats."""
        self._stride = math.ceil(student.vocab_size / _ALIGNMENT) * _ALIGNMENT
        self._is_narrow = self.student.hidden.dtype != torch.float32
        budget = CHUNK_BYTES if chunk_bytes is None else chunk_bytes
        row_bytes = 4 * self._stride * (1 if teacher is None else 2)
        if wants_gradient and self._is_narrow:
            row_bytes += 2 * self._stride // _SPARE
        self.chunk_rows = _chunk_rows(size, budget // row_bytes)
        self._allocate(wants_gradient)
        self._head = _head_arguments(self.student, self.teacher, self._aux)

    def _allocate(self, wants_gradient: bool) -> None:
        n, stride, v = self.chunk_rows, self._stride, self.student.vocab_size
        self._aux = torch.empty(_NUM_AUX, n, dtype=torch.float32, device=self.device)
        self._spare = max(1, math.ceil(n / _SPARE)) if wants_gradient and self._is_narrow else 0
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

    def chunks(self, tokens: Tensor | None = None) -> Iterator[Chunk]:
        """Projects chunk after chunk and fills the table; `tokens` `[N]` for log-probabilities."""
        size = len(self.student)
        for start in range(0, size, max(1, self.chunk_rows)):
            chunk = Chunk(start, min(start + self.chunk_rows, size))
            project(self.student, chunk.rows, self._student[: len(chunk)])
            if self.teacher is not None:
                project(self.teacher, chunk.rows, self._teacher[: len(chunk)])
            self._statistics(chunk, tokens)
            yield chunk

    def _statistics(self, chunk: Chunk, tokens: Tensor | None) -> None:
        with _on(self.device):
            kernels.statistics_kernel[(len(chunk),)](
                self._student,
                self._teacher,
                tokens=self._aux if tokens is None else tokens,
                out=self.table,
                aux=self._aux,
                first=chunk.start,
                vocab_size=self.student.vocab_size,
                stride=self._stride,
                out_stride=self.table.stride(0),
                aux_stride=self.chunk_rows,
                TEACHER=self.teacher is not None,
                TOKENS=tokens is not None,
                BLOCK=_block(self.student.vocab_size, STATISTICS_BLOCK),
                num_warps=STATISTICS_WARPS,
                **self._head,
            )

    def mixture(self, chunk: Chunk, weight: Tensor, w: float, is_jsd: bool) -> Mixture:
        """The Jensen-Shannon divergence with the teacher's share w, or KL(p‖m)."""
        value = torch.empty(len(chunk), dtype=torch.float64, device=self.device)
        mean = torch.empty(len(chunk), dtype=torch.float32, device=self.device)
        with _on(self.device):
            kernels.mixture_kernel[(len(chunk),)](
                self._student,
                self._teacher,
                aux=self._aux,
                value=value,
                mean=mean,
                vocab_size=self.student.vocab_size,
                stride=self._stride,
                aux_stride=self.chunk_rows,
                w=float(w),
                JSD=is_jsd,
                BLOCK=_block(self.student.vocab_size, STATISTICS_BLOCK),
                num_warps=STATISTICS_WARPS,
                **self._head,
            )
        return Mixture(weight, w, value, mean)

    def gradient(self, chunk: Chunk, slopes: Slopes) -> Tensor:
        """Gradient of the raw student logits `[n, V]` in the hidden states' dtype.

        It takes the place of the student's logits, which are gone afterwards. Where it is half
        as wide, its rows end before the logits that have not been read yet: rows `[i, j)` are
        written while logits from row i on are kept, and j ≤ spare + 2 i.
        """
        with _on(self.device):
            for first, last in self._spans(len(chunk)):
                self._launch_gradient(chunk, slopes, first, last)
        return self._gradient[: len(chunk)]

    def _spans(self, size: int) -> Iterator[tuple[int, int]]:
        first = 0
        while first < size:
            last = min(size, self._spare + 2 * first) if self._spare else size
            yield first, last
            first = last

    def _launch_gradient(self, chunk: Chunk, slopes: Slopes, first: int, last: int) -> None:
        block = _block(self.student.vocab_size, GRADIENT_BLOCK)
        num_blocks = math.ceil(self.student.vocab_size / block)
        none = self._aux
        jsd, skew = slopes.jsd, slopes.skew
        kernels.gradient_kernel[((last - first) * num_blocks,)](
            self._student,
            self._teacher,
            aux=self._aux,
            reverse_weight=none if slopes.reverse is None else slopes.reverse,
            forward_weight=none if slopes.forward is None else slopes.forward,
            share_weight=none if slopes.share is None else slopes.share,
            jsd_weight=none if jsd is None else jsd.weight,
            jsd_mean=none if jsd is None else jsd.mean,
            skew_weight=none if skew is None else skew.weight,
            skew_mean=none if skew is None else skew.mean,
            jsd_w=0.5 if jsd is None else float(jsd.w),
            skew_w=0.5 if skew is None else float(skew.w),
            out=self._gradient,
            first=first,
            chunk_start=chunk.start,
            vocab_size=self.student.vocab_size,
            num_blocks=num_blocks,
            stride=self._stride,
            aux_stride=self.chunk_rows,
            REVERSE=slopes.reverse is not None,
            FORWARD=slopes.forward is not None,
            SHARE=slopes.share is not None,
            JSD=jsd is not None,
            SKEW=skew is not None,
            BLOCK=block,
            num_warps=GRADIENT_WARPS,
            **self._head,
        )


def project(side: LazyLogits, rows: slice, out: Tensor) -> None:
    """Raw logits of some rows, accumulated and kept in float32; swapped ids trade places."""
    multiply(side.hidden[rows], side.weight.t(), out)
    if side.swap is not None:
        first, second = side.swap
        kept = out[:, first].clone()
        out[:, first] = out[:, second]
        out[:, second] = kept


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out ← a b in float32 from operands of any one dtype, without gradient."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:  # the interpreter's device knows no product of mixed dtypes
        torch.mm(a.float(), b.float(), out=out)


def multiply_add(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out ← out + a b in float32 from operands of any one dtype, without gradient."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, out=out)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.addmm(out, a.float(), b.float(), out=out)


def _chunk_rows(size: int, most: int) -> int:
    """Rows of chunks of nearly equal size, whole tiles of a product where they fit."""
    most = max(1, most)
    rows = math.ceil(size / max(1, math.ceil(size / most)))
    tiles = math.ceil(rows / _TILE) * _TILE
    return tiles if tiles <= min(most, size) else rows


def _block(vocab_size: int, most: int) -> int:
    return min(most, 1 << max(4, (vocab_size - 1).bit_length()))


def _head_arguments(
    student: LazyLogits, teacher: LazyLogits | None, none: Tensor
) -> dict[str, Any]:
    """What kernels have to do to raw logits of either side; `none` stands for no tensor."""
    arguments: dict[str, Any] = {}
    sides = {"student": student, "teacher": student if teacher is None else teacher}
    for name, side in sides.items():
        bias = _swapped_bias(side)
        arguments |= {
            f"{name}_bias": none if bias is None else bias,
            f"{name}_scale": float(side.scale),
            f"{name}_cap": 1.0 if side.softcap is None else float(side.softcap),
            f"{name.upper()}_BIAS": bias is not None,
            f"{name.upper()}_SCALED": side.scale != 1.0,
            f"{name.upper()}_CAP": side.softcap is not None,
        }
    return arguments


def _swapped_bias(side: LazyLogits) -> Tensor | None:
    if side.bias is None:
        return None
    bias = side.bias.detach().contiguous()
    if side.swap is None:
        return bias
    first, second = side.swap
    bias = bias.clone()
    bias[first], bias[second] = side.bias[second], side.bias[first]
    return bias


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
