"""The likeliest ids of every row, and what only some rules and objectives need of a row."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tutelage.core.extras import HEAD_MASS, TOP_K, direction_from_sums
from tutelage.core.kernels import entropy_rows
from tutelage.core.kernels import more_rows as kernels
from tutelage.core.kernels.passes import (
    FORWARD_KL,
    SIDES,
    STATISTICS_BLOCK,
    STATISTICS_WARPS,
    Chunk,
    Passes,
    launch_block,
)
from tutelage.core.kernels.products import on_device
from tutelage.core.terms import Buckets, Support

SEGMENT = 64
"""Ids of a segment: the k largest logits lie in the k segments with the largest maxima."""

_SEGMENTS = 64
"""Segments that a program reads."""

MOST_TOP = 128
"""k up to which the likeliest ids are looked for by segments; beyond, plain torch does it all."""


def top(work: Passes, side: str, chunk: Chunk, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row of a side, `[n, k]` ids and logits, largest first."""
    logits, v = work.logits(side, chunk), work.num_columns
    count = math.ceil(v / SEGMENT)
    maxima = torch.empty(len(chunk), count, dtype=torch.float32, device=work.device)
    num_blocks = math.ceil(count / _SEGMENTS)
    with on_device(work.device):
        kernels.segments_kernel[(len(chunk) * num_blocks,)](
            logits,
            out=maxima,
            vocab_size=v,
            num_segments=count,
            num_blocks=num_blocks,
            stride=logits.stride(0),
            out_stride=count,
            SEGMENT=SEGMENT,
            BLOCK=_SEGMENTS,
            num_warps=8,
            **work.head_arguments(side),
        )
    k = min(k, v)
    segments = maxima.topk(min(k, count), -1, sorted=False).indices
    within = torch.arange(SEGMENT, device=work.device)
    ids = (segments[:, :, None] * SEGMENT + within).flatten(1)
    values = work.logits_at(side, chunk, ids.clamp(max=v - 1))
    found = values.masked_fill(ids >= v, -torch.inf).topk(k, -1)
    return ids.gather(-1, found.indices), found.values


class More:
    """The statistics of `EXTRAS` of one chunk, each `[n]` float64, from what the passes left."""

    def __init__(self, work: Passes, chunk: Chunk, tokens: Tensor | None = None) -> None:
        self.work, self.chunk, self.tokens = work, chunk, tokens

    def get(self, name: str) -> Tensor:
        """One statistic by its name, a key of `EXTRAS`."""
        found: Tensor = FOUND[name](self).double()
        return found

    @cached_property
    def _moments(self) -> Tensor:
        return self._sums(kernels.moments_kernel, 3)

    def _sums(self, kernel: Any, count: int) -> Tensor:
        """What a kernel that reads both sides' logits sums up of every row `[count, n]`."""
        work, chunk = self.work, self.chunk
        out = torch.empty(count, len(chunk), dtype=torch.float64, device=work.device)
        with on_device(work.device):
            kernel[(len(chunk),)](
                work.logits("student", chunk),
                work.logits("teacher", chunk),
                aux=work.aux,
                out=out,
                vocab_size=work.num_columns,
                stride=work.stride,
                aux_stride=work.chunk_rows,
                out_stride=len(chunk),
                BLOCK=launch_block(work.num_columns, STATISTICS_BLOCK),
                num_warps=STATISTICS_WARPS,
                **work.pair_arguments(),
            )
        return out

    @cached_property
    def _student_top(self) -> tuple[Tensor, Tensor]:
        return top(self.work, "student", self.chunk, TOP_K)

    @cached_property
    def _teacher_top(self) -> tuple[Tensor, Tensor]:
        return top(self.work, "teacher", self.chunk, TOP_K)

    def head_share(self) -> Tensor:
        work, chunk = self.work, self.chunk
        out = torch.empty(len(chunk), dtype=torch.float64, device=work.device)
        with on_device(work.device):
            kernels.head_kernel[(len(chunk),)](
                work.logits("student", chunk),
                work.logits("teacher", chunk),
                aux=work.aux,
                out=out,
                vocab_size=work.num_columns,
                stride=work.stride,
                aux_stride=work.chunk_rows,
                share=HEAD_MASS,
                WAYS=8,
                TURNS=11,  # 8¹⁰ ≥ 2³⁰ numbers, and one for rounding up
                BLOCK=launch_block(work.num_columns, 1024),
                num_warps=8,
                **work.pair_arguments(),
            )
        return out

    def gradient_norm(self) -> Tensor:
        return self._moments[0]

    def local_oracle(self) -> Tensor:
        _, norm, curvature = self._moments
        return torch.where(norm == 0, 0.0, norm / curvature)

    def local_gain(self) -> Tensor:
        _, norm, curvature = self._moments
        forward_kl = self.work.table[FORWARD_KL, self.chunk.rows]
        quadratic = norm.square() / (2 * curvature)
        return torch.where(norm == 0, 0.0, torch.minimum(quadratic, forward_kl))

    def signal_share(self) -> Tensor:
        signal, size = self._sums(kernels.signal_kernel, 2)
        return torch.where(signal == 0, 0.0, signal / size)

    def entropy_direction(self) -> Tensor:
        work, chunk = self.work, self.chunk
        if self.tokens is None:
            raise ValueError("entropy_direction needs the sampled tokens.")
        out = torch.empty(6, len(chunk), dtype=torch.float64, device=work.device)
        with on_device(work.device):
            entropy_rows.entropy_kernel[(len(chunk),)](
                work.logits("student", chunk),
                tokens=self.tokens,
                aux=work.aux,
                out=out,
                first=chunk.start,
                vocab_size=work.num_columns,
                stride=work.stride,
                aux_stride=work.chunk_rows,
                out_stride=len(chunk),
                BLOCK=launch_block(work.num_columns, STATISTICS_BLOCK),
                num_warps=STATISTICS_WARPS,
                **work.head_arguments("student"),
            )
        return direction_from_sums(out[0], out[1], out[2:])

    def top_divergence(self) -> Tensor:
        (ours, _), (theirs, _) = self._student_top, self._teacher_top
        is_twice = (theirs[:, :, None] == ours[:, None, :]).any(-1)
        ids = torch.cat([ours, theirs], -1)
        log_p, log_q = (self.work.log_probabilities(s, self.chunk, ids) for s in SIDES)
        counted = torch.cat([torch.ones_like(ours, dtype=torch.bool), ~is_twice], -1)
        q = log_q.exp()
        terms = q * (log_q - log_p)
        return terms.masked_fill(~counted | (q == 0), 0.0).sum(-1)

    def compatibility(self) -> Tensor:
        ids = self._student_top[0]
        return self.work.log_probabilities("teacher", self.chunk, ids).exp().sum(-1)

    def teacher_top_mass(self) -> Tensor:
        values = self._teacher_top[1]
        return self.work.normalized("teacher", self.chunk, values).exp().sum(-1)

    def is_in_teacher_top5(self) -> Tensor:
        return (self._teacher_top[0][:, :5] == self._student_top[0][:, :1]).any(-1)


FOUND: dict[str, Callable[[More], Tensor]] = {
    "gradient_norm": More.gradient_norm,
    "local_oracle": More.local_oracle,
    "local_gain": More.local_gain,
    "signal_share": More.signal_share,
    "entropy_direction": More.entropy_direction,
    "top_divergence": More.top_divergence,
    "compatibility": More.compatibility,
    "teacher_top_mass": More.teacher_top_mass,
    "is_in_teacher_top5": More.is_in_teacher_top5,
    "head_share": More.head_share,
}
"""What the kernels know of `EXTRAS`."""


def buckets(work: Passes, chunk: Chunk, k: int, support: Support) -> Buckets:
    """One side's k likeliest ids and the rest, float64; both sides' logits there become −inf.

    The rest is summed by the statistics' kernel over what is left of each row.
    """
    ids, values = top(work, support, chunk, k)
    log_p, log_q = (
        work.normalized(side, chunk, values)
        if side == support
        else work.log_probabilities(side, chunk, ids)
        for side in SIDES
    )
    for side in SIDES:
        work.logits(side, chunk).scatter_(-1, ids, -torch.inf)
    log_p_rest, log_q_rest = work.log_mass_left(chunk)
    nothing: Any = log_p[:, :0]
    return Buckets(ids, log_q.exp(), log_p.exp(), log_q, log_p, log_q_rest, log_p_rest, nothing)
