"""Rows of open completions: the hidden state that predicts each row's next token.

`PlainRows` runs any causal language model through its own forward pass. `FastRows` writes the
one-token step of the Llama family out by hand over preallocated caches: the same products in the
same order, without the bookkeeping around them, and a place that has become free can be taken by
another prompt at any time. `open_rows` tries a step against the model's own before trusting it.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.models.layers import Layer, is_fast_family, parts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ids = tuple[int, ...]

_TRIAL = 8
"""Tokens that a fast step is tried on."""
_READ_AHEAD = 1024
"""Most tokens, padding included, up to which coming prompts are read with those due."""


class Rows(Protocol):
    """Completions that are decoded together, one row each."""

    refills: bool
    """Whether `admit` can put prompts beside rows that are still open."""

    @property
    def hidden(self) -> Tensor:
        """Hidden states after the final norm that predict the next tokens `[B, D]`."""

    def admit(
        self, places: Sequence[int], prompts: Sequence[Ids], following: Sequence[Ids] = ()
    ) -> None:
        """Start the prompts in these rows; equal prompts share one prefill.

        Args:
            places: Rows to fill.
            prompts: One for each of them.
            following: Prompts to be started next, which may be read in the same go.
        """

    def advance(self, tokens: Tensor) -> None:
        """Feed one token to every row."""

    def keep(self, index: Tensor) -> None:
        """Drop all rows but these."""


def open_rows(
    model: PreTrainedModel,
    prompt: Ids,
    pad: int,
    num_rows: int,
    max_length: int,
    is_fast: bool = True,
) -> Rows:
    """Rows without prompts, in the fastest form that computes what the model computes.

    Args:
        model: Causal language model.
        prompt: Ids to try the fast form on.
        pad: Padding id.
        num_rows: Number of rows.
        max_length: Most tokens of a prompt with its completion.
        is_fast: False forces the model's own forward pass.
    """
    if is_fast and is_fast_family(model) and FastRows(model, pad, 2, _TRIAL).agrees(prompt):
        return FastRows(model, pad, num_rows, max_length)
    return PlainRows(model, pad)


class PlainRows:
    """Any causal language model; a batch is padded on the left and starts as a whole."""

    refills = False

    def __init__(self, model: PreTrainedModel, pad: int) -> None:
        self.model = model
        self.pad = pad

    def admit(
        self, places: Sequence[int], prompts: Sequence[Ids], following: Sequence[Ids] = ()
    ) -> None:
        """Start the prompts in all rows; those of before are gone."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        distinct = list(dict.fromkeys(prompts))
        width = max(len(ids) for ids in distinct)
        padded = [[self.pad] * (width - len(ids)) + list(ids) for ids in distinct]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in distinct]
        device = self.model.device
        self.mask = torch.tensor(mask, device=device)
        self.position = self.mask.sum(1)
        position = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.hidden = self._forward(torch.tensor(padded, device=device), position)
        if len(distinct) < len(prompts):
            row = {ids: i for i, ids in enumerate(distinct)}
            self.keep(torch.tensor([row[ids] for ids in prompts], device=device))

    def advance(self, tokens: Tensor) -> None:
        """Feed one token to every row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.hidden = self._forward(tokens[:, None], self.position[:, None])
        self.position = self.position + 1

    def keep(self, index: Tensor) -> None:
        """Drop all rows but these."""
        self.cache.batch_select_indices(index)
        self.mask, self.position = self.mask[index], self.position[index]
        self.hidden = self.hidden[index]

    def _forward(self, ids: Tensor, position: Tensor) -> Tensor:
        output = self.model.base_model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=position,
            past_key_values=self.cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state[:, -1]
        return hidden


class _Prefill(NamedTuple):
    """Prompts that have been read, one row each, padded on the right."""

    prompts: list[Ids]
    hidden: Tensor
    """Last hidden state of each prompt `[P, D]`."""
    layers: list[tuple[Tensor, Tensor]]
    """Keys and values of each layer `[P, groups, width, head width]`."""

    def only(self, wanted: AbstractSet[Ids]) -> _Prefill:
        """Some of the prompts, without the memory of the others."""
        rows = [i for i, ids in enumerate(self.prompts) if ids in wanted]
        if len(rows) == len(self.prompts):
            return self
        layers = [(k[rows], v[rows]) for k, v in self.layers]
        return _Prefill([self.prompts[i] for i in rows], self.hidden[rows], layers)


class FastRows:
    """The Llama family. Row r keeps token i of its sequence in column i of every cache."""

    refills = True

    def __init__(self, model: PreTrainedModel, pad: int, num_rows: int, max_length: int) -> None:
        self.base: Any = model.base_model
        self.pad = pad
        self.max_length = max_length
        config, attention = self.base.config, self.base.layers[0].self_attn
        self.num_heads: int = config.num_attention_heads
        self.num_groups: int = config.num_key_value_heads
        heads = (self.num_heads, self.num_groups)
        self.layers = [parts_of(layer, *heads) for layer in self.base.layers]
        self.eps: float = self.base.norm.variance_epsilon
        self.head_dim: int = attention.head_dim
        self.scale: float = attention.scaling
        self.columns = torch.arange(max_length, device=model.device)
        self.hidden = self.base.norm.weight.new_zeros(num_rows, config.hidden_size)
        cos, sin = self.base.rotary_emb(self.hidden, self.columns[None])
        self.cos, self.sin = cos[0, :, None], sin[0, :, None].clone()
        # rotate_half negates the first half of what it turns; here the table holds the sign.
        self.sin[..., : self.head_dim // 2].neg_()
        empty = self.hidden.new_zeros(num_rows, self.num_groups, 0, self.head_dim)
        self.caches = [(empty, empty) for _ in self.layers]
        self.position = self.columns.new_zeros(num_rows)
        """Column of the next token of each row."""
        self.end = 0
        """The furthest of these columns."""
        self.reads: list[_Prefill] = []
        """Prompts that have been read and are still to be started."""

    @torch.no_grad()
    def agrees(self, prompt: Ids) -> bool:
        """Whether a step by hand gives the model's own hidden states, in two rows at once."""
        ids, device = (prompt * _TRIAL)[:_TRIAL], self.columns.device
        own, layers = self._read([ids])
        lengths = [_TRIAL - 1, _TRIAL // 2]
        self._place([0, 1], _Prefill([ids], own[:, -1], layers), [0, 0])
        self.position = torch.tensor(lengths, device=device)
        self.end = max(lengths)
        self.advance(torch.tensor([ids[n] for n in lengths], device=device))
        expected = own[0, lengths].double()
        error = (self.hidden.double() - expected).norm() / expected.norm()
        return bool(error <= torch.finfo(self.hidden.dtype).eps ** 0.5)

    def admit(
        self, places: Sequence[int], prompts: Sequence[Ids], following: Sequence[Ids] = ()
    ) -> None:
        """Start the prompts in these rows; equal prompts share one prefill."""
        known = {ids for read in self.reads for ids in read.prompts}
        unread = [ids for ids in dict.fromkeys(prompts) if ids not in known]
        if unread:
            self.reads.append(self._prefill(self._with_following(unread, known, following)))
        for read in self.reads:
            row = {ids: i for i, ids in enumerate(read.prompts)}
            pairs = zip(places, prompts, strict=True)
            found = [(place, row[ids]) for place, ids in pairs if ids in row]
            self._place([place for place, _ in found], read, [start for _, start in found])
        self.end = int(self.position.max())
        wanted = set(following)
        self.reads = [
            read.only(wanted) for read in self.reads if not wanted.isdisjoint(read.prompts)
        ]

    def _with_following(
        self, unread: list[Ids], known: set[Ids], following: Sequence[Ids]
    ) -> list[Ids]:
        """Prompts to read now: those due, and of the next ones what is cheap to read with them."""
        chosen = dict.fromkeys(unread)
        width = max(map(len, unread))
        for ids in following:
            width = max(width, len(ids))
            if (len(chosen) + 1) * width > _READ_AHEAD:
                break
            if ids not in known:
                chosen[ids] = None
        return list(chosen)

    def advance(self, tokens: Tensor) -> None:
        """Feed one token to every row."""
        self._grow(self.end + 1)
        position, room = self.position, self.caches[0][0].shape[2]
        first = torch.arange(len(tokens) * self.num_groups, device=tokens.device) * room
        slots = (first.view(-1, self.num_groups) + position[:, None]).flatten()
        seen = self.columns[: self.end + 1] <= position[:, None]
        bias = self.hidden.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        cos, sin = self.cos[position], self.sin[position]
        x = self.base.embed_tokens(tokens)
        for layer, (keys, values) in zip(self.layers, self.caches, strict=True):
            q, k, v = self._project(layer, self._norm(x, layer.norm.weight), cos, sin)
            for cache, new in ((keys, k), (values, v)):
                cache.view(-1, self.head_dim).index_copy_(0, slots, new.reshape(-1, self.head_dim))
            y = self._attend(q, keys[:, :, : self.end + 1], values[:, :, : self.end + 1], bias)
            x = x + layer.o(y.view(len(x), -1))
            gate, up = layer.gate_up(self._norm(x, layer.mlp_norm.weight)).chunk(2, dim=-1)
            x = x + layer.down(layer.act(gate) * up)
        self.hidden = self._norm(x, self.base.norm.weight)
        # A row that has ended waits for its successor without running out of its cache.
        self.position = (position + 1).clamp_(max=self.max_length - 1)
        self.end = min(self.end + 1, self.max_length - 1)

    def keep(self, index: Tensor) -> None:
        """Drop all rows but these."""
        self.caches = [(k[index], v[index]) for k, v in self.caches]
        self.hidden, self.position = self.hidden[index], self.position[index]
        self.end = int(self.position.max())

    def _project(
        self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, heads, head width]`, keys and values `[B, groups, head width]`."""
        every = layer.qkv(x).view(len(x), -1, self.head_dim)
        both, v = every[:, : -self.num_groups], every[:, -self.num_groups :]
        if layer.qk_scale is not None:
            both = self._norm(both, layer.qk_scale)
        both = both * cos + both.roll(self.head_dim // 2, dims=-1) * sin
        return both[:, : self.num_heads], both[:, self.num_heads :], v

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Attention of one query a head; heads that share a key are its queries."""
        q = q.view(len(q), self.num_groups, -1, self.head_dim)
        bias = bias[:, None, None]
        if q.is_cuda or q.dtype != torch.float32:
            return F.scaled_dot_product_attention(q, keys, values, bias, scale=self.scale)
        # On a CPU two batched products take two thirds of the time of the fused kernel.
        shape = (*q.shape[:3], keys.shape[2])
        scores = torch.baddbmm(
            bias.expand(shape).flatten(0, 1),
            q.flatten(0, 1),
            keys.flatten(0, 1).transpose(1, 2),
            alpha=self.scale,
        )
        return torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view_as(q)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the model's RMS norm computes, rounding included, without the cost of calling it."""
        if x.dtype == torch.float32 and weight.dim() == 1:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return weight * wide.to(x.dtype)

    def _prefill(self, prompts: list[Ids]) -> _Prefill:
        states, layers = self._read(prompts)
        last = torch.tensor([len(ids) - 1 for ids in prompts], device=states.device)
        rows = torch.arange(len(prompts), device=states.device)
        return _Prefill(prompts, states[rows, last], layers)

    def _read(self, prompts: list[Ids]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Hidden states `[P, width, D]`, and keys and values of each layer, by the model itself."""
        width = max(len(ids) for ids in prompts)
        # Padded on the right nothing needs a mask: a token never sees what comes after it.
        padded = [list(ids) + [self.pad] * (width - len(ids)) for ids in prompts]
        ids = torch.tensor(padded, device=self.columns.device)
        output = self.base(input_ids=ids, use_cache=True)
        layers = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        return output.last_hidden_state, layers

    def _place(self, places: list[int], source: _Prefill, starts: list[int]) -> None:
        """Copy prompts that have been read into rows."""
        to, start = (torch.tensor(i, device=self.columns.device).long() for i in (places, starts))
        lengths = [len(source.prompts[i]) for i in starts]
        width = max(lengths, default=0)
        self._grow(width)
        self.hidden[to] = source.hidden[start]
        self.position[to] = torch.tensor(lengths, device=self.columns.device).long()
        for cache, read in zip(self.caches, source.layers, strict=True):
            for old, new in zip(cache, read, strict=True):
                old[to, :, :width] = new[start, :, :width]

    def _grow(self, columns: int) -> None:
        """Room for so many columns; new ones are 0, since a masked NaN would still be a NaN."""
        room = self.caches[0][0].shape[2]
        if columns > room:
            added = min(self.max_length, max(columns, room + room // 2) + 32) - room
            self.caches = [
                (F.pad(k, (0, 0, 0, added)), F.pad(v, (0, 0, 0, added))) for k, v in self.caches
            ]
