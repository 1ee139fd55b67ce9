"""Memory of a decoding step: it is allocated once, so that a captured graph can be replayed."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

Pair: TypeAlias = tuple[Tensor, Tensor]
"""Keys and values of a layer, or cosines and sines."""


@dataclass(frozen=True)
class Sizes:
    """What determines the memory of a step."""

    num_layers: int
    num_heads: int
    num_groups: int
    """Heads of keys and values."""
    head_dim: int
    width: int
    """Width of the residual stream."""
    inner: int
    """Width of the MLP."""
    num_rows_of_head: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Rows:
    """What a step knows of each completion, and what it writes down; B rows, `columns` steps."""

    token: Tensor
    """The last token `[B]`, int64."""
    slot: Tensor
    """Where its keys and values are `[B]`, int32."""
    position: Tensor
    """Place in the sequence of the token drawn next `[B]`, int32."""
    done: Tensor
    """1 where nothing is open, or a stop token has been drawn `[B]`, int32."""
    column: Tensor
    """Steps since the host last looked `[B]`, int32."""
    uniform: Tensor
    """Numbers for these steps `[B, columns]`, float64."""
    tokens: Tensor
    """Tokens of these steps `[B, columns]`, int64."""
    logprobs: Tensor
    """Their log-probabilities `[B, columns]`."""
    hidden: Tensor
    """The state that predicts the next token, after the final norm `[B, D]`."""
    states: Tensor
    """The states that these steps' tokens were drawn from `[B, columns, D]`."""

    def first(self, count: int) -> Rows:
        """A view of the first rows."""
        return replace(self, **_first(self, count))

    @property
    def num_columns(self) -> int:
        """Most steps between two looks."""
        return self.tokens.shape[1]


@dataclass(frozen=True)
class Work:
    """Intermediate results of a step."""

    x: Tensor
    """Residual stream `[B, D]`."""
    y: Tensor
    """What a layer adds to it `[B, D]`."""
    normed: Tensor
    qkv: Tensor
    """Queries, keys and values `[B, (heads + 2 groups) · head_dim]`."""
    mixed: Tensor
    """What attention read `[B, heads · head_dim]`."""
    gate_up: Tensor
    """`[B, 2 · inner]`."""
    opened: Tensor
    """silu(gate) · up `[B, inner]`."""
    logits: Tensor
    """`[B, rows of the head]`, float32 or wider."""
    block_max: Tensor
    block_sum: Tensor
    block_best: Tensor
    """Of each block of ids the largest logit, the sum of exponentials, the likeliest id."""
    part_out: Tensor
    part_max: Tensor
    part_sum: Tensor
    """Attention of each split of a row's columns."""

    def first(self, count: int) -> Work:
        """A view of the first rows."""
        return replace(self, **_first(self, count))


def _first(part: Any, count: int) -> dict[str, Any]:
    return {field.name: part.__dict__[field.name][:count] for field in fields(part)}


def make_rows(sizes: Sizes, num_rows: int, num_columns: int) -> Rows:
    """Rows without completions."""
    wide = torch.promote_types(sizes.dtype, torch.float32)

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=sizes.device)

    small = (num_rows, num_columns)
    return Rows(
        token=zeros(num_rows, dtype=torch.int64),
        slot=torch.arange(num_rows, dtype=torch.int32, device=sizes.device),
        position=zeros(num_rows, dtype=torch.int32),
        done=torch.ones(num_rows, dtype=torch.int32, device=sizes.device),
        column=zeros(num_rows, dtype=torch.int32),
        uniform=zeros(*small, dtype=torch.float64),
        tokens=zeros(*small, dtype=torch.int64),
        logprobs=zeros(*small, dtype=wide),
        hidden=zeros(num_rows, sizes.width, dtype=sizes.dtype),
        states=zeros(*small, sizes.width, dtype=sizes.dtype),
    )


def make_work(sizes: Sizes, num_rows: int, num_blocks: int, num_splits: int) -> Work:
    """Memory for intermediate results; nothing in it is read before it is written."""
    wide = torch.promote_types(sizes.dtype, torch.float32)

    def empty(*shape: int, dtype: torch.dtype = sizes.dtype) -> Tensor:
        return torch.empty(num_rows, *shape, dtype=dtype, device=sizes.device)

    heads = (sizes.num_heads, num_splits)
    return Work(
        x=empty(sizes.width),
        y=empty(sizes.width),
        normed=empty(sizes.width),
        qkv=empty((sizes.num_heads + 2 * sizes.num_groups) * sizes.head_dim),
        mixed=empty(sizes.num_heads * sizes.head_dim),
        gate_up=empty(2 * sizes.inner),
        opened=empty(sizes.inner),
        logits=empty(sizes.num_rows_of_head, dtype=wide),
        block_max=empty(num_blocks, dtype=wide),
        block_sum=empty(num_blocks, dtype=wide),
        block_best=empty(num_blocks, dtype=torch.int32),
        part_out=empty(*heads, sizes.head_dim, dtype=wide),
        part_max=empty(*heads, dtype=wide),
        part_sum=empty(*heads, dtype=wide),
    )
