"""Two vocabularies of which some ids mean the same: rows over these ids and one for all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SharedIds:
    """The outcomes that both sides can be compared over, in columns.

    The first M columns are ids of both sides that mean the same, then comes one for the ids that
    end a text, if they are given, and one for everything else of either side, if there is any:
    ``z(C) = log Σ_{v∈C} exp z(v)`` of the ids of a column, and ``∂L/∂z(v) = ∂L/∂z(C) · p(v)/P(C)``.
    """

    pairs: tuple[Tensor, Tensor]
    """Ids of student and teacher that mean the same `[M]` each, every one at most once."""
    sizes: tuple[int, int]
    """Ids of student and teacher in all."""
    stops: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    """Ids that end a text, of student and teacher; none of them is in `pairs`."""

    @staticmethod
    def of(
        pairs: Sequence[tuple[int, int]],
        sizes: tuple[int, int],
        stops: tuple[Sequence[int], Sequence[int]] = ((), ()),
    ) -> SharedIds:
        """From pairs of ids; those of a stop belong to the stops of both sides.

        Where one side has nothing but shared ids and the other has more, the last pair goes to
        everything else, which would have probability 0 on that side.

        Raises:
            ValueError: an id is beyond its side's size or in two pairs, one side alone has stops,
                or nothing is shared.
        """
        ends = tuple(set(ids) for ids in stops)
        for ours, theirs in pairs:
            if ours in ends[0] or theirs in ends[1]:
                ends[0].add(ours)
                ends[1].add(theirs)
        kept = [pair for pair in pairs if pair[0] not in ends[0] and pair[1] not in ends[1]]
        others = [size - len(kept) - len(end) for size, end in zip(sizes, ends, strict=True)]
        if kept and min(others) == 0 < max(others):
            kept = kept[:-1]
        for side, size in enumerate(sizes):
            ids = [pair[side] for pair in kept] + sorted(ends[side])
            if len(set(ids)) != len(ids) or not all(0 <= v < size for v in ids):
                raise ValueError(f"shared ids must be distinct and below {size}, got {ids[:9]}.")
        if not kept or bool(ends[0]) != bool(ends[1]):
            raise ValueError(
                f"both sides need shared ids and, if one has them, ids that end a text, got "
                f"{len(kept)} shared ones and {[len(end) for end in ends]}."
            )
        table = torch.tensor(kept)
        return SharedIds(
            (table[:, 0], table[:, 1]), sizes, (tuple(sorted(ends[0])), tuple(sorted(ends[1])))
        )

    @property
    def num_ids(self) -> int:
        """Columns that have a meaning: all but everything else."""
        return len(self.pairs[0]) + bool(self.stops[0])

    @property
    def num_columns(self) -> int:
        """All of them."""
        return self.num_ids + bool(len(self._others(0)))

    def _others(self, side: int) -> Tensor:
        is_other = torch.ones(self.sizes[side], dtype=torch.bool)
        is_other[self.pairs[side]] = False
        is_other[list(self.stops[side])] = False
        return is_other.nonzero().squeeze(1)

    def _groups(self, side: int, device: torch.device) -> list[Tensor]:
        """Ids of the columns that stand for several."""
        groups = [torch.tensor(self.stops[side], dtype=torch.long), self._others(side)]
        return [ids.to(device) for ids in groups if len(ids)]

    def merge(self, logits: Tensor, side: int) -> Tensor:
        """Logits of the columns `[n, C]` from those of one side's ids, 0 for the student."""
        shared = logits[:, self.pairs[side].to(logits.device)]
        groups = self._groups(side, logits.device)
        return torch.cat(
            [shared, *(logits[:, ids].logsumexp(-1, keepdim=True) for ids in groups)], 1
        )

    def spread(self, gradient: Tensor, logits: Tensor) -> None:
        """Turns the student's logits `[n, V]` in place into their gradient.

        Args:
            gradient: of the columns `[n, C]`.
            logits: from which the columns were merged; overwritten.
        """
        own = self.pairs[0].to(logits.device)
        for place, ids in enumerate(self._groups(0, logits.device), start=len(own)):
            share = logits[:, ids].softmax(-1)
            logits[:, ids] = share * gradient[:, place, None]
        logits[:, own] = gradient[:, : len(own)]

    def columns(self, tokens: Tensor) -> Tensor:
        """The columns of the student's ids, same shape."""
        table = torch.full((self.sizes[0],), self.num_columns - 1, dtype=torch.long)
        table[self.pairs[0]] = torch.arange(len(self.pairs[0]))
        table[list(self.stops[0])] = len(self.pairs[0])
        return table.to(tokens.device)[tokens]
