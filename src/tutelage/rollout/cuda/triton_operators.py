"""The operations of a decoding step as Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from tutelage.rollout.cuda import blocks, kernels, sample_kernels
from tutelage.rollout.cuda.operators import Heads, TokenSampling
from tutelage.rollout.cuda.state import Pair, Rows, Work

ATTEND = {"num_warps": 4, "num_stages": 3}
"""Warps of an attention program, and blocks of columns that it has in flight."""
_PRECISION = {torch.float32: "ieee"}


class TritonOperators:
    """`Operators` by the kernels of `kernels.py`, for heads of a power of two."""

    def __init__(self) -> None:
        self.launches = 0

    def _start(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        self.launches += 1
        kernel[grid](*args, **options)

    def embed_norm(self, rows: Rows, work: Work, table: Tensor, weight: Tensor, eps: float) -> None:
        """x ← table[token], normed ← rms_norm(x); notes `hidden` in each row's column."""
        size, width = work.x.shape
        self._start(
            kernels.embed_norm,
            (size,),
            *(rows.token, table, weight, work.x, work.normed, rows.hidden),
            *(rows.column, rows.states, eps, width, table.stride(0), rows.num_columns),
            BLOCK=triton.next_power_of_2(width),
            num_warps=_warps(width),
        )

    def add_norm(self, rows: Rows, work: Work, weight: Tensor, eps: float) -> None:
        """x ← x + y, normed ← rms_norm(x)."""
        self._norm(rows, work, weight, eps, work.normed, 0, False)

    def end_step(self, rows: Rows, work: Work, weight: Tensor, eps: float, last: int) -> None:
        """hidden ← rms_norm(x + y); the next column, and of open rows the next position."""
        self._norm(rows, work, weight, eps, rows.hidden, last, True)

    def _norm(
        self,
        rows: Rows,
        work: Work,
        weight: Tensor,
        eps: float,
        out: Tensor,
        last: int,
        ends_step: bool,
    ) -> None:
        size, width = work.x.shape
        self._start(
            kernels.add_norm,
            (size,),
            *(work.x, work.y, weight, out, rows.position, rows.done, rows.column),
            *(last, eps, width),
            BLOCK=triton.next_power_of_2(width),
            ENDS_STEP=ends_step,
            num_warps=_warps(width),
        )

    def attend(self, rows: Rows, work: Work, heads: Heads, cache: Pair, turn: Pair) -> None:
        """mixed ← attention of the new tokens in qkv, whose keys and values enter the cache."""
        size, splits = len(rows.slot), work.part_out.shape[2]
        keys, values = cache
        share = heads.num_heads // heads.num_groups
        is_direct = splits == 1
        weights = (heads.q_norm, heads.k_norm)
        q_norm, k_norm = (turn[0] if weight is None else weight for weight in weights)
        self._start(
            kernels.attend,
            (size, heads.num_groups, splits),
            *(work.qkv, keys, values, work.mixed, work.part_out, work.part_max, work.part_sum),
            *(*turn, q_norm, k_norm, rows.slot, rows.position, rows.done),
            *(heads.scale, heads.eps, keys.stride(0), keys.shape[2], heads.window, splits),
            HEADS=heads.num_heads,
            GROUPS=heads.num_groups,
            SHARE=share,
            ROWS=max(16, triton.next_power_of_2(share)),
            DIM=heads.head_dim,
            BLOCK=blocks.COLUMN_BLOCK,
            NORM=heads.q_norm is not None,
            WINDOW=heads.window > 0,
            DIRECT=is_direct,
            PRECISION=_PRECISION.get(work.qkv.dtype, "tf32"),
            **ATTEND,
        )
        if not is_direct:
            self._start(
                kernels.join_splits,
                (size * heads.num_heads,),
                *(work.part_out, work.part_max, work.part_sum, work.mixed, splits),
                SPLITS=triton.next_power_of_2(splits),
                DIM=heads.head_dim,
                num_warps=4,
            )

    def swiglu(self, work: Work) -> None:
        """opened ← silu(gate) · up."""
        size, width = work.opened.shape
        block = min(1024, triton.next_power_of_2(width))
        self._start(
            kernels.swiglu,
            (size, triton.cdiv(width, block)),
            *(work.gate_up, work.opened, width),
            BLOCK=block,
            num_warps=4,
        )

    def sample(self, rows: Rows, work: Work, sampling: TokenSampling) -> None:
        """Sample each row's token from logits and its uniform number of this column."""
        config, num_ids = sampling.config, sampling.num_ids
        size, stride = work.logits.shape
        num_blocks = blocks.num_vocab_blocks(num_ids)
        # As `sample_token` has it: greedy tokens are scored at temperature 1.
        temperature = config.temperature or 1.0
        by_block = (work.block_max, work.block_sum, work.block_best)
        self._start(
            sample_kernels.block_sums,
            (size, num_blocks),
            *(work.logits, *by_block, temperature, stride, num_ids, num_blocks),
            BLOCK=blocks.VOCAB_BLOCK,
            num_warps=4,
        )
        written = (rows.token, rows.tokens, rows.logprobs, rows.column, rows.done)
        numbers = (temperature, stride, num_ids, num_blocks, rows.num_columns)
        common = {"BLOCKS": triton.next_power_of_2(num_blocks), "STOPS": len(sampling.stops)}
        keeps_k, keeps_p = 0 < config.top_k < num_ids, config.top_p < 1.0
        if config.temperature == 0.0 or not (keeps_k or keeps_p):
            self._start(
                sample_kernels.sample,
                (size,),
                *(work.logits, *by_block, rows.uniform, sampling.stops, *written, *numbers),
                BLOCK=blocks.VOCAB_BLOCK,
                GREEDY=config.temperature == 0.0,
                num_warps=8,
                **common,
            )
            return
        self._start(
            sample_kernels.sample_filtered,
            (size,),
            *(work.logits, *by_block[:2], rows.uniform, sampling.stops, *written, *numbers),
            *(config.top_k, sampling.top_p),
            BLOCK=4 * blocks.VOCAB_BLOCK,
            KEEPS_K=keeps_k,
            KEEPS_P=keeps_p,
            num_warps=16,
            **common,
        )


def _warps(width: int) -> int:
    """Warps for one row of a norm."""
    return 8 if width >= 2048 else 4
