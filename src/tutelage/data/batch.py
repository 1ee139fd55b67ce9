"""From ragged rollouts to rows: the only place that knows about padding, packing and the shift.

Everything is decided by position and length, never by token id, so a pad token that equals the
end-of-sequence token, or an end-of-sequence token inside the prompt, cannot drop or add a row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tutelage.data.types import Rollout
from tutelage.errors import DataError

Side = Literal["left", "right"]

_TABLES = ("input_ids", "attention_mask", "position_ids")
_ROWS = ("row_index", "tokens", "completion", "position")


@dataclass(frozen=True)
class Packed:
    """B sequences that lie one after the other in one row."""

    lengths: tuple[int, ...]
    """Tokens of each sequence, known without asking a device."""
    starts: Tensor
    """Where each sequence begins in the row, and where the last one ends, int32 [B + 1]."""

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Packed:
        """Sequences of these lengths."""
        ends = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
        return Packed(tuple(lengths), ends.to(device, torch.int32))

    def halves(self, middle: int) -> tuple[Packed, Packed]:
        """The first `middle` sequences, and the others."""
        device = self.starts.device
        return Packed.of(self.lengths[:middle], device), Packed.of(self.lengths[middle:], device)


@dataclass(frozen=True)
class Batch:
    """Sequences for a backbone, and the N generated tokens (rows) to be supervised.

    Sequences are the rows of a padded rectangle, or lie one after the other in a single row.
    """

    input_ids: Tensor
    """Prompt and completion ids, [B, T]."""
    attention_mask: Tensor
    """1 where input_ids holds a real token, 0 where it is padding, [B, T]."""
    position_ids: Tensor
    """Position of each token within its own sequence, from 0, [B, T]; 0 on padding."""
    row_index: Tensor
    """Flat index b*T + t of the position whose logits predict each generated token, [N]."""
    tokens: Tensor
    """The generated token of each row, [N]."""
    completion: Tensor
    """Index, within the whole step, of the completion that each row belongs to, [N]."""
    position: Tensor
    """Index of each row among the rows of its completion, from 0, [N]."""
    is_padded_right: bool = False
    """Whether every sequence begins in the first column."""
    packed: Packed | None = None
    """Where sequences begin and end if all lie in one row; None in a rectangle."""
    teacher: str = ""
    """Name of the teacher of all sequences, as in `Prompt.teacher`."""

    @property
    def num_sequences(self) -> int:
        """Number of sequences, B."""
        return len(self.input_ids) if self.packed is None else len(self.packed.lengths)

    @property
    def num_rows(self) -> int:
        """Number of supervised tokens, N."""
        return self.tokens.numel()

    @property
    def names(self) -> list[int]:
        """The completions that have rows, in order; a completion's rows lie side by side."""
        names: list[int] = torch.unique_consecutive(self.completion).tolist()
        return names

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        moved: dict[str, Any] = {
            n: x.to(device) for n, x in vars(self).items() if isinstance(x, Tensor)
        }
        packed = self.packed
        if packed is not None:
            packed = replace(packed, starts=packed.starts.to(device))
        return replace(self, **moved, packed=packed)

    def halves(self) -> tuple[Batch, Batch]:
        """The first and the last sequences, at least one each, and their rows in the same order."""
        middle = (self.num_sequences + 1) // 2
        tables: tuple[Any, Any]
        parts: tuple[Packed | None, Packed | None]
        if self.packed is None:
            first_tokens = middle * self.input_ids.shape[1]
            tables = (slice(middle), slice(middle, None))
            parts = (None, None)
        else:
            first_tokens = sum(self.packed.lengths[:middle])
            tables = ((..., slice(first_tokens)), (..., slice(first_tokens, None)))
            parts = self.packed.halves(middle)
        num_first = int((self.row_index < first_tokens).sum())
        rows = (slice(num_first), slice(num_first, None))
        first, last = (
            replace(
                self,
                **{name: vars(self)[name][table] for name in _TABLES},
                **{name: vars(self)[name][row] for name in _ROWS},
                packed=packed,
            )
            for table, row, packed in zip(tables, rows, parts, strict=True)
        )
        return first, replace(last, row_index=last.row_index - first_tokens)

    def flatten(self, hidden: Tensor) -> Tensor:
        """Rows of a padded tensor, at the positions that predict completion tokens.

        Args:
            hidden: Hidden states or logits for every position, [B, T, D].

        Returns:
            The rows in the order of `tokens`, [N, D].
        """
        return hidden.flatten(0, 1).index_select(0, self.row_index)


def collate(
    rollouts: Sequence[Rollout],
    pad_id: int,
    side: Side = "right",
    completions: Sequence[int] | None = None,
) -> Batch:
    """Pad rollouts to one rectangle and list the rows that predict their generated tokens.

    Tokens that were inserted between the turns of a conversation are context as the prompt is: they
    have no row, so nothing counts, selects or supervises them.

    Args:
        rollouts: B rollouts of any lengths; empty completions simply give no rows.
        pad_id: Token id written into padding; any id will do, it is masked by position.
        side: Where padding goes.
        completions: Index of each rollout within the whole step; None counts from 0.

    Returns:
        A batch on the CPU, T the longest sequence; an empty one of no rollouts.

    Raises:
        DataError: A prompt has no tokens, so nothing predicts the first completion token.
    """
    _refuse_empty_prompts(rollouts)
    names = range(len(rollouts)) if completions is None else completions
    prompt_lengths = torch.tensor([len(r.prompt_ids) for r in rollouts], dtype=torch.long)
    lengths = torch.tensor([len(r.completion_ids) for r in rollouts], dtype=torch.long)
    total = prompt_lengths + lengths
    width = int(total.max()) if rollouts else 0
    offset = width - total if side == "left" else torch.zeros_like(total)

    place = torch.arange(width) - offset[:, None]
    is_real = (place >= 0) & (place < total[:, None])
    input_ids = torch.full((len(rollouts), width), pad_id, dtype=torch.long)
    input_ids[is_real] = _concatenate([(*r.prompt_ids, *r.completion_ids) for r in rollouts])

    sequence = torch.repeat_interleave(torch.arange(len(rollouts)), lengths)
    position = torch.arange(len(sequence)) - (lengths.cumsum(0) - lengths)[sequence]
    predictor = offset[sequence] + prompt_lengths[sequence] + position - 1
    batch = Batch(
        input_ids=input_ids,
        attention_mask=is_real.long(),
        position_ids=place * is_real,
        row_index=sequence * width + predictor,
        tokens=_concatenate([r.completion_ids for r in rollouts]),
        completion=torch.tensor(names, dtype=torch.long)[sequence],
        position=position,
        is_padded_right=not bool(offset.any()),
        teacher=rollouts[0].prompt.teacher if rollouts else "",
    )
    return _only_generated(batch, rollouts) if any(r.is_generated for r in rollouts) else batch


def _only_generated(batch: Batch, rollouts: Sequence[Rollout]) -> Batch:
    """The rows of generated tokens, of those that stand for every completion token."""
    masks = [r.is_generated or (True,) * len(r.completion_ids) for r in rollouts]
    for rollout, mask in zip(rollouts, masks, strict=True):
        if len(mask) != len(rollout.completion_ids):
            raise DataError(
                f"prompt {rollout.prompt.id!r} has {len(rollout.completion_ids)} completion ids "
                f"and {len(mask)} entries of is_generated. Give one for each id."
            )
    keep = torch.tensor([is_generated for mask in masks for is_generated in mask])
    rows = {name: vars(batch)[name][keep] for name in _ROWS}
    position = [torch.arange(sum(mask)) for mask in masks]
    return replace(batch, **{**rows, "position": torch.cat(position)})


def pack(rollouts: Sequence[Rollout], completions: Sequence[int] | None = None) -> Batch:
    """Rollouts one after the other in one row, and the rows that predict their generated tokens.

    Args:
        rollouts: B rollouts of any lengths, at least one.
        completions: Index of each rollout within the whole step; None counts from 0.

    Returns:
        A batch on the CPU of shape [1, T], T being the number of all tokens; positions begin at 0
        in every sequence.

    Raises:
        DataError: A prompt has no tokens, so nothing predicts the first completion token.
    """
    flat = collate(rollouts, 0, completions=completions)
    width = flat.input_ids.shape[1]
    is_real = flat.attention_mask.bool()
    lengths = [_length(r) for r in rollouts]
    packed = Packed.of(lengths)
    sequence = flat.row_index // width
    return replace(
        flat,
        input_ids=flat.input_ids[is_real][None],
        attention_mask=flat.attention_mask[is_real][None],
        position_ids=flat.position_ids[is_real][None],
        row_index=packed.starts[sequence] + flat.row_index % width,
        is_padded_right=False,
        packed=packed,
    )


def micro_batches(
    rollouts: Sequence[Rollout],
    size: int,
    pad_id: int,
    side: Side = "right",
    max_tokens: int = 0,
) -> list[Batch]:
    """Batches of rollouts in their order, which completion indices number.

    Each holds at most `size` rollouts of one teacher and `max_tokens` tokens, padding included; 0
    sets no limit, and a longer rollout has a batch of its own.
    """
    if size < 1:
        raise DataError(f"micro-batch size must be at least 1, got {size}. Use 1 or more.")
    batches, start = [], 0
    while start < len(rollouts):
        stop, width = start, 0
        while stop < min(start + size, len(rollouts)):
            width = max(width, _length(rollouts[stop]))
            is_same = rollouts[stop].prompt.teacher == rollouts[start].prompt.teacher
            if stop > start and (not is_same or 0 < max_tokens < width * (stop + 1 - start)):
                break
            stop += 1
        batches.append(collate(rollouts[start:stop], pad_id, side, range(start, stop)))
        start = stop
    return batches


def without_rows(pad_id: int) -> Batch:
    """One token and nothing to supervise: a forward pass of a process that has no work left.

    Models whose weights lie in several processes are read by all of them equally often.
    """
    one = torch.ones(1, 1, dtype=torch.long)
    none = torch.zeros(0, dtype=torch.long)
    return Batch(one * pad_id, one, one * 0, none, none, none, none, is_padded_right=True)


def _length(rollout: Rollout) -> int:
    return len(rollout.prompt_ids) + len(rollout.completion_ids)


def length_groups(
    lengths: Sequence[int], max_tokens: int, max_size: int, at_least: int = 1
) -> list[list[int]]:
    """Which sequences to pad to one rectangle: neighbours in length, so that little is padding.

    Of all ways to cut the sequences, sorted by length, the one with the least padding is taken, a
    further rectangle counting as much as a sixteenth of `max_tokens` of padding. Longest first, so
    that the largest need of memory is met at once.

    Args:
        lengths: Tokens of each sequence.
        max_tokens: Tokens of a rectangle, padding included; 0 sets no limit. A longer sequence
            has one of its own.
        max_size: Sequences in a rectangle, at least 1.
        at_least: Groups to make, if there are that many sequences: the largest are halved.

    Returns:
        Indices into `lengths`, each in exactly one group.
    """
    order = _descending(lengths)
    groups = [order[i:j] for i, j in _cuts([lengths[i] for i in order], max_tokens, max_size)]
    return _at_least(groups, min(at_least, len(lengths)))


def packed_groups(
    lengths: Sequence[int], max_tokens: int, max_size: int, at_least: int = 1
) -> list[list[int]]:
    """Which sequences to pack into one row, so that rows are few: longest first, each into the
    first row with room for it.

    Args:
        lengths: Tokens of each sequence.
        max_tokens: Tokens of a row; 0 sets no limit. A longer sequence has a row of its own.
        max_size: Sequences in a row, at least 1.
        at_least: Rows to make, if there are that many sequences: the largest are halved.

    Returns:
        Indices into `lengths`, each in exactly one group.
    """
    groups: list[list[int]] = []
    left: list[int] = []  # tokens that each row still has room for
    for i in _descending(lengths):
        rows = (g for g, group in enumerate(groups) if len(group) < max_size)
        found = next((g for g in rows if not max_tokens or lengths[i] <= left[g]), None)
        if found is None:
            found = len(groups)
            groups.append([])
            left.append(max_tokens)
        groups[found].append(i)
        left[found] -= lengths[i]
    return _at_least(groups, min(at_least, len(lengths)))


def _descending(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def _at_least(groups: list[list[int]], count: int) -> list[list[int]]:
    """So many groups, as the largest are halved."""
    while len(groups) < count:
        largest = max(range(len(groups)), key=lambda g: len(groups[g]))
        group, middle = groups[largest], (len(groups[largest]) + 1) // 2
        groups[largest : largest + 1] = [group[:middle], group[middle:]]
    return groups


def _cuts(widths: Sequence[int], max_tokens: int, max_size: int) -> list[tuple[int, int]]:
    """Bounds of the groups of descending widths that cost least (shortest path over cuts).

    The best grouping that ends at j with a group from i to j costs lines[i] + widths[i] · j. Later
    lines are flatter and later groups reach further, so one that is ahead stays ahead: each start
    is best for one range of ends, and all ranges are found in one pass.
    """
    each = (max_tokens or 4096) // 16
    lines: list[int] = []
    starts: list[int] = []  # where the last group starts, if the first 1, 2, ... sequences are all
    ranges: deque[tuple[int, int]] = deque()  # starts, each with the first end it is best for
    cost = 0
    for end in range(1, len(widths) + 1):
        new = end - 1
        lines.append(cost + each - widths[new] * new)
        taken = end
        while ranges:
            old, first = ranges[-1]
            taken = _first_end_ahead(old, new, widths, lines)
            reach = min(max_size, max_tokens // max(widths[old], 1) if max_tokens else max_size)
            taken = min(taken, old + max(reach, 1) + 1)
            if taken > max(first, end):
                break
            ranges.pop()
        ranges.append((new, taken if ranges else end))
        while len(ranges) > 1 and ranges[1][1] <= end:
            ranges.popleft()
        starts.append(ranges[0][0])
        cost = lines[starts[-1]] + widths[starts[-1]] * end
    cuts, end = [], len(widths)
    while end:
        cuts.append((starts[end - 1], end))
        end = starts[end - 1]
    return cuts[::-1]


def _first_end_ahead(old: int, new: int, widths: Sequence[int], lines: Sequence[int]) -> int:
    """The first end for which the later start costs less, whatever the limits of a group."""
    flatter, above = widths[old] - widths[new], lines[new] - lines[old]
    if flatter:
        return above // flatter + 1
    return 0 if above < 0 else len(widths) + 1


def _concatenate(sequences: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([token for ids in sequences for token in ids], dtype=torch.long)


def _refuse_empty_prompts(rollouts: Sequence[Rollout]) -> None:
    for rollout in rollouts:
        if not rollout.prompt_ids:
            raise DataError(
                f"prompt {rollout.prompt.id!r} has no tokens, got an empty prompt. "
                "Give it at least one token: text, or a tokenizer that adds a first token."
            )
