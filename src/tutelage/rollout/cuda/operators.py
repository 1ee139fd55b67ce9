"""The operations of a decoding step in torch: the reference, and what runs without Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.config.sampling import SamplingConfig
from tutelage.rollout.cuda.state import Pair, Rows, Work
from tutelage.rollout.sample_token import sample_token


@dataclass(frozen=True)
class Heads:
    """How a layer's attention reads; queries and keys are normed where weights are given."""

    num_heads: int
    num_groups: int
    head_dim: int
    scale: float
    window: int
    """Columns that a token sees, itself included; 0 for all."""
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float


@dataclass(frozen=True)
class TokenSampling:
    """How tokens are sampled, and which of them end a completion."""

    config: SamplingConfig
    num_ids: int
    """Ids from here on are never sampled."""
    stops: Tensor
    """Stop tokens, filled with -1 to a power of two, int64."""
    top_p: Tensor
    """`config.top_p`, float64 `[1]`."""


class Operators(Protocol):
    """Everything of a step but its products; all of it works in place on rows and work."""

    launches: int
    """Kernels started so far."""

    def embed_norm(self, rows: Rows, work: Work, table: Tensor, weight: Tensor, eps: float) -> None:
        """x ← table[token], normed ← rms_norm(x); notes `hidden` in each row's column."""

    def add_norm(self, rows: Rows, work: Work, weight: Tensor, eps: float) -> None:
        """x ← x + y, normed ← rms_norm(x)."""

    def end_step(self, rows: Rows, work: Work, weight: Tensor, eps: float, last: int) -> None:
        """hidden ← rms_norm(x + y); the next column, and of open rows the next position.

        Positions stop at `last`.
        """

    def attend(self, rows: Rows, work: Work, heads: Heads, cache: Pair, turn: Pair) -> None:
        """mixed ← attention of the new tokens in qkv, whose keys and values enter the cache.

        Args:
            rows: their slots and positions.
            work: holds qkv and mixed.
            heads: how the layer reads.
            cache: its keys and values, `[slots, groups, capacity, head_dim]` each.
            turn: cosines and sines of every position, `[capacity, head_dim / 2]` each.
        """

    def swiglu(self, work: Work) -> None:
        """opened ← silu(gate) · up."""

    def sample(self, rows: Rows, work: Work, sampling: TokenSampling) -> None:
        """Sample each row's token from logits and its uniform number of this column."""


class TorchOperators:
    """The operations as a textbook has them, for any device and dtype."""

    launches = 0

    def embed_norm(self, rows: Rows, work: Work, table: Tensor, weight: Tensor, eps: float) -> None:
        """x ← table[token], normed ← rms_norm(x); notes `hidden` in each row's column."""
        work.x.copy_(table[rows.token])
        work.normed.copy_(_rms_norm(work.x, weight, eps))
        rows.states[torch.arange(len(rows.token)), rows.column.long()] = rows.hidden

    def add_norm(self, rows: Rows, work: Work, weight: Tensor, eps: float) -> None:
        """x ← x + y, normed ← rms_norm(x)."""
        work.x.add_(work.y)
        work.normed.copy_(_rms_norm(work.x, weight, eps))

    def end_step(self, rows: Rows, work: Work, weight: Tensor, eps: float, last: int) -> None:
        """hidden ← rms_norm(x + y); the next column, and of open rows the next position."""
        rows.column.add_(1)
        rows.hidden.copy_(_rms_norm(work.x + work.y, weight, eps))
        rows.position.add_(1 - rows.done).clamp_(max=last)

    def attend(self, rows: Rows, work: Work, heads: Heads, cache: Pair, turn: Pair) -> None:
        """mixed ← attention of the new tokens in qkv, whose keys and values enter the cache."""
        size = len(rows.slot)
        slot, position = rows.slot.long(), rows.position.long()
        every = work.qkv.view(size, -1, heads.head_dim)
        num_keys = heads.num_heads + heads.num_groups
        q, k, v = every.tensor_split((heads.num_heads, num_keys), dim=1)
        if heads.q_norm is not None and heads.k_norm is not None:
            q, k = _rms_norm(q, heads.q_norm, heads.eps), _rms_norm(k, heads.k_norm, heads.eps)
        cos, sin = (table[position][:, None] for table in turn)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        open_rows = rows.done == 0
        for here, new in zip(cache, (k, v), strict=True):
            at = (slot[open_rows], slice(None), position[open_rows])
            here[at] = new[open_rows]
        columns = torch.arange(cache[0].shape[2], device=slot.device)
        seen = (columns <= position[:, None]) & open_rows[:, None]
        if heads.window:
            seen &= columns > position[:, None] - heads.window
        for row in range(size):  # a column that is not filled may hold anything
            keys, values = (here[slot[row]][:, seen[row]] for here in cache)
            if not bool(open_rows[row]):
                keys, values = k[row][:, None], v[row][:, None]
            share = heads.num_heads // heads.num_groups
            query = q[row].reshape(heads.num_groups, share, heads.head_dim)
            read = F.scaled_dot_product_attention(query, keys, values, scale=heads.scale)
            work.mixed[row] = read.flatten()

    def swiglu(self, work: Work) -> None:
        """opened ← silu(gate) · up."""
        gate, up = work.gate_up.chunk(2, dim=-1)
        work.opened.copy_(F.silu(gate) * up)

    def sample(self, rows: Rows, work: Work, sampling: TokenSampling) -> None:
        """Sample each row's token from logits and its uniform number of this column."""
        every, column = torch.arange(len(rows.token)), rows.column.long()
        logits = work.logits[:, : sampling.num_ids]
        uniform = rows.uniform[every, column]
        token, logprob = sample_token(logits.contiguous(), uniform, sampling.config)
        rows.token.copy_(token)
        rows.tokens[every, column] = token
        rows.logprobs[every, column] = logprob
        rows.done.copy_(rows.done | torch.isin(token, sampling.stops).int())


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + head_dim / 2) of each head by their angle."""
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
