"""Ids that slots read behind what they hold, by the model's own forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tutelage.models.forward import Ids
from tutelage.rollout.cuda.decode_step import windows_of
from tutelage.rollout.cuda.transfer import send

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXTEND_TOKENS = 16384
"""Most tokens, those that are held and padding included, whose keys one pass reads."""
EXTEND_CHUNK = 1024
"""Most new ids of a row in one pass."""


class Following(NamedTuple):
    """Ids that a slot reads next."""

    slot: int
    num_kept: int
    """Ids that it holds; its columns from there on are overwritten."""
    ids: Ids
    """At least one."""

    @property
    def end(self) -> int:
        """Ids that it holds afterwards."""
        return self.num_kept + len(self.ids)


def passes(following: Sequence[Following]) -> Iterator[list[tuple[int, Following]]]:
    """What each pass reads, with the number of its row; long rows are read in several passes."""
    start = 0
    while True:
        parts = [
            (i, Following(row.slot, row.num_kept + start, row.ids[start : start + EXTEND_CHUNK]))
            for i, row in enumerate(following)
            if len(row.ids) > start
        ]
        if not parts:
            return
        batch: list[tuple[int, Following]] = []
        for part in sorted(parts, key=lambda part: part[1].end):
            if batch and (len(batch) + 1) * part[1].end > EXTEND_TOKENS:
                yield batch
                batch = []
            batch.append(part)
        yield batch
        start += EXTEND_CHUNK


def read_behind(
    model: PreTrainedModel, cache: Tensor, following: Sequence[Following], pad: int
) -> Tensor:
    """Read ids behind what slots hold, in one pass.

    Args:
        model: causal language model of the Llama family.
        cache: keys and values `[layers, 2, slots, groups, capacity, head_dim]`, which are extended.
        following: R rows.
        pad: padding id.

    Returns:
        The hidden states after each row's last id `[R, D]`.
    """
    width = max(len(row.ids) for row in following)
    padded = [[*row.ids, *[pad] * (width - len(row.ids))] for row in following]
    like = torch.empty(0, dtype=torch.int64, device=cache.device)
    ids = send(padded, like)
    held = _SlotCache(cache, following, width)
    base: Any = model.base_model
    output = base(
        input_ids=ids,
        position_ids=held.position,
        attention_mask=_masks(base.config, held),
        past_key_values=held,
        use_cache=True,
    )
    states: Tensor = output.last_hidden_state
    last = send([len(row.ids) - 1 for row in following], like)
    return states[torch.arange(len(following), device=cache.device), last]


class _SlotCache:
    """What a pass asks of a cache, over the columns of some slots."""

    def __init__(self, cache: Tensor, following: Sequence[Following], width: int) -> None:
        self.cache = cache
        self.num_kept = max(row.num_kept for row in following)
        like = torch.empty(0, dtype=torch.int64, device=cache.device)
        facts = [[row.slot, row.num_kept, row.end] for row in following]
        self.slot, kept, end = send(facts, like).t()[:, :, None]
        every = torch.arange(max(row.end for row in following), device=cache.device)
        # Not the columns behind a row's end: they may hold NaN, and a masked NaN is still one.
        self.columns = every.minimum(end - 1)
        """Columns that each row reads `[R, columns]`."""
        self.position = (kept + every[:width]).minimum(end - 1)
        """Positions of the new ids `[R, width]`; padding repeats the last."""
        new = [(i, n) for i, row in enumerate(following) for n in range(len(row.ids))]
        row, index = send(new, like).t()
        self.new = (row, slice(None), index)
        """Where the new ids are among those of the pass, without padding."""
        self.place = (self.slot[row, 0], slice(None), self.position[row, index])
        """Where their keys and values go."""

    def seen(self, window: int) -> Tensor:
        """Whether each new id sees a column `[R, 1, width, columns]`; a window of 0 is none."""
        columns = torch.arange(self.columns.shape[1], device=self.cache.device)
        seen: Tensor = columns <= self.position[:, :, None]
        if window:
            seen &= columns > self.position[:, :, None] - window
        return seen[:, None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Most ids that a row holds."""
        return self.num_kept

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Copy new keys and values `[R, groups, width, head_dim]` into the slots' columns.

        Returns:
            All that the rows hold then `[R, groups, columns, head_dim]`, keys and values.
        """
        for here, new in zip(self.cache[layer_idx], (keys, values), strict=True):
            here[self.place] = new[self.new]
        held = self.cache[layer_idx][:, self.slot, :, self.columns]
        found = held.permute(2, 0, 3, 1, 4)
        return found[0], found[1]


def _masks(config: Any, held: _SlotCache) -> Any:
    """What the new ids see: one mask, or one for each kind of layer where kinds differ."""
    windows = windows_of(config)
    if len(set(windows)) == 1:
        return held.seen(windows[0])
    kinds = zip(config.layer_types, windows, strict=True)
    return {kind: held.seen(window) for kind, window in dict(kinds).items()}
