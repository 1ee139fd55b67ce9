"""How many rows a chunk of logits has, and what its buffers take; needs no Triton."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tutelage.core.kernels import CHUNK_BYTES

NUM_STATISTICS = 6
NUM_AUX = 6

_ALIGNMENT = 64
"""Buffers' rows start at multiples of so many numbers, as products and wide loads want it."""

_TILE = 128
"""Rows of a chunk are a multiple of a product's tile where there are many."""

SPARE = 8
"""An eighth of a chunk's gradient has a place of its own, see `Passes.gradient`."""


@dataclass(frozen=True)
class Buffers:
    """Shapes of the buffers of one pass over N rows of V logits."""

    num_rows: int
    """N."""
    chunk_rows: int
    """Rows of a chunk; all of them where they are one chunk."""
    stride: int
    """Numbers from one row of logits to the next."""
    spare: int
    """Rows of gradient that do not lie where logits are."""
    has_teacher: bool

    @staticmethod
    def of(
        num_rows: int,
        vocab_size: int,
        has_teacher: bool,
        has_narrow_gradient: bool,
        chunk_bytes: int | None = None,
    ) -> Buffers:
        """For logits of one side or both, and perhaps a gradient of 16 bits a number."""
        stride = math.ceil(vocab_size / _ALIGNMENT) * _ALIGNMENT
        budget = CHUNK_BYTES if chunk_bytes is None else chunk_bytes
        row_bytes = 4 * stride * (2 if has_teacher else 1)
        if has_narrow_gradient:
            row_bytes += 2 * stride // SPARE
        rows = _chunk_rows(num_rows, budget // row_bytes)
        spare = max(1, math.ceil(rows / SPARE)) if has_narrow_gradient else 0
        return Buffers(num_rows, rows, stride, spare, has_teacher)

    @property
    def is_one_chunk(self) -> bool:
        """Whether the logits of all rows wait for the backward pass."""
        return self.chunk_rows >= self.num_rows

    @property
    def num_bytes(self) -> int:
        """Of the logits of both sides, the gradient's own place, statistics and what they need."""
        student = 2 * (self.spare + 2 * self.chunk_rows) * self.stride
        teacher = 4 * self.chunk_rows * self.stride * self.has_teacher
        small = 4 * NUM_AUX * self.chunk_rows + 8 * NUM_STATISTICS * self.num_rows
        return student + teacher + small


def _chunk_rows(size: int, most: int) -> int:
    """Rows of chunks of nearly equal size, whole tiles of a product where they fit."""
    most = max(1, most)
    rows = math.ceil(size / max(1, math.ceil(size / most)))
    tiles = math.ceil(rows / _TILE) * _TILE
    return tiles if tiles <= min(most, size) else rows
