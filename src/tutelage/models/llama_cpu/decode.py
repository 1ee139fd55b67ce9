"""KV slots of open completions for the Llama family on a CPU.

`FastSlots` writes the one-token step out by hand over preallocated caches: the same arithmetic as
the model's own forward pass in as few calls as possible, and a free slot can be filled with another
prompt at any time. `rollout.slots.open_slots` compares a step with the model's own before it uses
this form; other models run their own forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.models.forward import Ids
from tutelage.models.llama_cpu.layers import Layer, Norm, interleaved, parts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRIAL_TOKENS = 8
"""Tokens that a fast step is tried on."""
_PREFILL_AHEAD = 1024
"""Most tokens, padding included, up to which later prompts are prefilled with those due."""


class _Prefill(NamedTuple):
    """Prompts with their keys and values, one row each, padded on the right."""

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


class _Index(NamedTuple):
    """Where the rows of a cache begin, as if it had two dimensions, and what they have filled."""

    rows: Tensor
    """First column of the keys of each row and group `[B, groups]`."""
    first: Tensor
    """The same, followed by that of the values `[B, 2 · groups]`."""
    bias: Tensor
    """0 where a column is filled, -inf elsewhere `[B · groups, 1, columns]`."""
    caches: list[tuple[Tensor, Tensor, Tensor]]
    """Of each layer everything `[2 · B · groups · columns, width]`, its keys `[B · groups, width,
    columns]` and its values `[B · groups, columns, width]`."""


class FastSlots:
    """The Llama family. Slot r keeps token i of its sequence in column i of every cache."""

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
        self.norm = Norm(self.base.norm.weight, self.base.norm.variance_epsilon)
        self.head_dim: int = attention.head_dim
        self.scale: float = attention.scaling
        self.columns = torch.arange(max_length, device=model.device)
        self.hidden = self.base.norm.weight.new_zeros(num_rows, config.hidden_size)
        cos, sin = (x[0, :, None, : self.head_dim // 2] for x in self._angles())
        self.turn = torch.complex(cos, sin)
        """What turns the pairs of a query or key at each position `[max_length, 1, width / 2]`."""
        empty = self.hidden.new_zeros(2, num_rows, self.num_groups, 0, self.head_dim)
        self.caches = [empty for _ in self.layers]
        """Keys (interleaved) and values of each layer `[2, B, groups, columns, width]`."""
        self.position = self.columns.new_zeros(num_rows)
        """Column of the next token of each row."""
        self.end = 0
        """The furthest of these columns."""
        self.index: _Index | None = None
        """Where the rows are; None after they have changed."""
        self.prefills: list[_Prefill] = []
        """Prompts whose keys and values are computed and that are still to be started."""

    @torch.no_grad()
    def matches_model(self, prompt: Ids) -> bool:
        """Whether a step by hand gives the model's own hidden states, in two rows at once."""
        # Different ones: among equal tokens, wrong positions and scales cancel out.
        others = range(min(TRIAL_TOKENS, self.base.embed_tokens.num_embeddings))
        ids = (tuple(dict.fromkeys((*prompt, *others))) * TRIAL_TOKENS)[:TRIAL_TOKENS]
        device = self.columns.device
        own, layers = self._forward([ids])
        lengths = [TRIAL_TOKENS - 1, TRIAL_TOKENS // 2]
        self._copy_prompts([0, 1], _Prefill([ids], own[:, -1], layers), [0, 0])
        self.position = torch.tensor(lengths, device=device)
        self.end = max(lengths)
        self.decode_step(torch.tensor([ids[n] for n in lengths], device=device))
        expected = own[0, lengths].double()
        error = (self.hidden.double() - expected).norm() / expected.norm()
        # Transformers computes norms in float32 at most.
        eps = max(torch.finfo(dtype).eps for dtype in (self.hidden.dtype, torch.float32))
        return bool(error <= eps**0.5)

    def prefill(
        self, slots: Sequence[int], prompts: Sequence[Ids], following: Sequence[Ids] = ()
    ) -> None:
        """Start the prompts in these slots; equal prompts share one prefill."""
        known = {ids for done in self.prefills for ids in done.prompts}
        missing = [ids for ids in dict.fromkeys(prompts) if ids not in known]
        if missing:
            self.prefills.append(
                self._prefill_batch(self._with_following(missing, known, following))
            )
        for done in self.prefills:
            row = {ids: i for i, ids in enumerate(done.prompts)}
            pairs = zip(slots, prompts, strict=True)
            found = [(slot, row[ids]) for slot, ids in pairs if ids in row]
            if found:  # what was prefilled ahead may be for later
                self._copy_prompts([slot for slot, _ in found], done, [start for _, start in found])
        self.end = int(self.position.max())
        wanted = set(following)
        self.prefills = [
            done.only(wanted) for done in self.prefills if not wanted.isdisjoint(done.prompts)
        ]

    def _with_following(
        self, missing: list[Ids], known: set[Ids], following: Sequence[Ids]
    ) -> list[Ids]:
        """Prompts to prefill now: those due, and of the next ones what is cheap to add."""
        chosen = dict.fromkeys(missing)
        width = max(map(len, missing))
        for ids in following:
            width = max(width, len(ids))
            if (len(chosen) + 1) * width > _PREFILL_AHEAD:
                break
            if ids not in known:
                chosen[ids] = None
        return list(chosen)

    def decode_step(self, tokens: Tensor) -> None:
        """Feed one token to every row."""
        self._grow(self.end + 1)
        index = self.index = self.index or self._locate()
        columns = (index.first + self.position[:, None]).view(-1)
        index.bias.view(-1).index_fill_(0, (index.rows + self.position[:, None]).view(-1), 0.0)
        width = self.end + 1
        bias = index.bias[:, :, :width].expand(-1, self.num_heads // self.num_groups, -1)
        turn = self.turn.index_select(0, self.position)
        x = self.base.embed_tokens(tokens)
        for layer, (every, keys, values) in zip(self.layers, index.caches, strict=True):
            q, kv = self._project(layer, x, turn)
            every.index_copy_(0, columns, kv)
            y = self._attend(q, keys[:, :, :width], values[:, :width], bias)
            x = layer.o(x, y.view(len(x), -1))
            gate, up = layer.gate_up(x).chunk(2, dim=-1)
            x = layer.down(x, layer.act(gate) * up)
        self.hidden = self.norm(x)
        # A slot whose row has ended stays within its cache until it is filled again.
        self.position = (self.position + 1).clamp_(max=self.max_length - 1)
        self.end = min(self.end + 1, self.max_length - 1)

    def extend(self, following: Sequence[tuple[int, int, Ids]]) -> None:
        """Read ids behind what slots hold, all at once; the other slots stay as they are.

        Args:
            following: For each slot that goes on: the slot, how many of its ids are kept (columns
                behind them are overwritten), and the ids that it reads next, at least one.
        """
        slots = [slot for slot, _, _ in following]
        device = self.columns.device
        rows, positions, ids = (
            torch.tensor(values, device=device)
            for values in zip(
                *(
                    (row, kept + n, token)
                    for row, (_, kept, new) in enumerate(following)
                    for n, token in enumerate(new)
                ),
                strict=True,
            )
        )
        ends = torch.tensor([kept + len(new) for _, kept, new in following], device=device)
        width = int(ends.max())
        self._grow(width)
        self.index = None
        slot = torch.tensor(slots, device=device)
        # Attention wants a rectangle: token n of a row is its query n.
        first = torch.tensor([kept for _, kept, _ in following], device=device)
        query = positions - first[rows]
        turn = self.turn[positions]
        is_hidden = self.columns[:width] > positions[:, None]
        bias = self.hidden.new_zeros(is_hidden.shape).masked_fill_(is_hidden, -torch.inf)
        shape = (len(slots), int(query.max()) + 1)
        x = self.base.embed_tokens(ids)
        for layer, cache in zip(self.layers, self.caches, strict=True):
            q, kv = self._project(layer, x, turn)
            keys_values = kv.view(len(x), 2, self.num_groups, self.head_dim)
            cache[:, slot[rows], :, positions] = keys_values
            keys, values = cache[:, slot, :, :width]
            y = self._attend_block(q, keys, values, bias, (rows, query), shape)
            x = layer.o(x, y)
            gate, up = layer.gate_up(x).chunk(2, dim=-1)
            x = layer.down(x, layer.act(gate) * up)
        last = torch.tensor([len(new) for _, _, new in following], device=device).cumsum(0) - 1
        self.hidden = self.hidden.index_copy(0, slot, self.norm(x)[last])
        self.position = self.position.index_copy(0, slot, ends)
        self.end = int(self.position.max())

    def _attend_block(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor,
        place: tuple[Tensor, Tensor],
        shape: tuple[int, int],
    ) -> Tensor:
        """Attention of several queries a row.

        Args:
            q: Queries of N tokens `[N, heads, width]`.
            keys: Keys of R rows `[R, groups, columns, width]`.
            values: Their values, alike.
            bias: 0 where a token sees a column, -inf elsewhere `[N, columns]`.
            place: Row and index among the row's tokens of each token, `[N]` both.
            shape: R, and the most tokens of a row.

        Returns:
            `[N, heads · width]`.
        """
        padded = q.new_zeros(*shape, *q.shape[1:])
        padded[place] = q
        mask = bias.new_zeros(*shape, bias.shape[-1])
        mask[place] = bias
        found = F.scaled_dot_product_attention(
            padded.transpose(1, 2),
            keys,
            values,
            mask[:, None],
            scale=self.scale,
            enable_gqa=self.num_heads != self.num_groups,
        )
        return found.transpose(1, 2)[place].flatten(1)

    def keep(self, index: Tensor) -> None:
        """Drop all rows but these."""
        self.caches = [cache[:, index] for cache in self.caches]
        self.hidden, self.position = self.hidden[index], self.position[index]
        self.end = int(self.position.max())
        self.index = None

    def _angles(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the model's own rotary embedding, as exact as it gives them."""
        wide = torch.promote_types(self.hidden.dtype, torch.float32)
        cos, sin = self.base.rotary_emb(self.hidden, self.columns[None])
        return cos.to(wide), sin.to(wide)

    def _locate(self) -> _Index:
        """Where every row's columns begin, and which of them it has filled."""
        room, num_rows = self.caches[0].shape[3], len(self.position)
        rows = torch.arange(num_rows * self.num_groups, device=self.position.device) * room
        rows = rows.view(num_rows, self.num_groups)
        seen = self.columns[:room] < self.position[:, None]
        bias = self.hidden.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        bias = bias.repeat_interleave(self.num_groups, 0)[:, None]
        caches = []
        for cache in self.caches:
            keys, values = cache.flatten(1, 2)
            caches.append((cache.view(-1, self.head_dim), keys.transpose(1, 2), values))
        return _Index(rows, torch.cat((rows, rows + rows.numel() * room), dim=1), bias, caches)

    def _project(self, layer: Layer, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """Queries `[B, heads, width]`, then keys and values of each row `[B·2·groups, width]`."""
        every = layer.qkv(x).view(len(x), -1, self.head_dim)
        both = every[:, : -self.num_groups]
        if layer.qk_norm is not None:
            layer.qk_norm(both, out=both)
        wide = turn.dtype.to_real()
        if wide == x.dtype:
            both.view(turn.dtype).mul_(turn)
        else:
            both.copy_((both.to(wide).view(turn.dtype) * turn).view(wide))
        return every[:, : self.num_heads], every[:, self.num_heads :].reshape(-1, self.head_dim)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Attention of one query a head; heads that share a key are its queries."""
        q = q.reshape(len(keys), -1, self.head_dim)
        if q.is_cuda or q.dtype != torch.float32:
            # Fused kernels want a batch; here it is one of many heads.
            q, keys, values, bias = q[None], keys.mT[None], values[None], bias[None]
            return F.scaled_dot_product_attention(q, keys, values, bias, scale=self.scale)[0]
        # On a CPU two batched products take two thirds of the time of the fused kernel.
        scores = torch.baddbmm(bias, q, keys, alpha=self.scale)
        return torch.bmm(scores.softmax(-1), values)

    def _prefill_batch(self, prompts: list[Ids]) -> _Prefill:
        states, layers = self._forward(prompts)
        last = torch.tensor([len(ids) - 1 for ids in prompts], device=states.device)
        rows = torch.arange(len(prompts), device=states.device)
        return _Prefill(prompts, states[rows, last], layers)

    def _forward(self, prompts: list[Ids]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Hidden states `[P, width, D]`, and keys and values of each layer, by the model itself."""
        width = max(len(ids) for ids in prompts)
        # Padded on the right nothing needs a mask: a token never sees what comes after it.
        padded = [list(ids) + [self.pad] * (width - len(ids)) for ids in prompts]
        ids = torch.tensor(padded, device=self.columns.device)
        output = self.base(input_ids=ids, use_cache=True)
        layers = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        return output.last_hidden_state, layers

    def _copy_prompts(self, slots: list[int], source: _Prefill, starts: list[int]) -> None:
        """Copy prefilled prompts into slots."""
        to, start = (torch.tensor(i, device=self.columns.device) for i in (slots, starts))
        lengths = [len(source.prompts[i]) for i in starts]
        width = max(lengths)
        self._grow(width)
        self.hidden[to] = source.hidden[start]
        self.position[to] = torch.tensor(lengths, device=self.columns.device)
        self.index = None
        for cache, (keys, values) in zip(self.caches, source.layers, strict=True):
            cache[:, to] = 0  # a masked NaN of the row before would still be a NaN
            cache[0][to, :, :width] = interleaved(keys[start, :, :width])
            cache[1][to, :, :width] = values[start, :, :width]

    def _grow(self, columns: int) -> None:
        """Room for so many columns; new ones are 0, since a masked NaN would still be a NaN."""
        room = self.caches[0].shape[3]
        if columns > room:
            added = min(self.max_length, max(columns, room + room // 2) + 32) - room
            self.caches = [F.pad(cache, (0, 0, 0, added)) for cache in self.caches]
            self.index = None
