"""Ids that count as one: their logits become one column before anything is computed of a row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tutelage.core.lazy import LazyLogits


@dataclass(frozen=True)
class IdClass:
    """Some ids of a vocabulary of V whose probabilities are added up, on both sides.

    With C the class, a row is the distribution over {C, every other id}: ``P(C) = Σ_{v∈C} p(v)``,
    so that ``z(C) = log Σ_{v∈C} exp z(v)`` and ``∂L/∂z(v) = ∂L/∂z(C) · p(v)/P(C)`` for v in C. The
    column of the smallest id stands for all; ids at the end of the vocabulary move into the places
    of the others, so that the columns in use are the first V − |C| + 1.
    """

    ids: tuple[int, ...]
    """At least 2, ascending."""
    vocab_size: int

    def __post_init__(self) -> None:
        is_set = list(self.ids) == sorted(set(self.ids)) and len(self.ids) > 1
        if not is_set or self.ids[0] < 0 or self.ids[-1] >= self.vocab_size:
            raise ValueError(
                f"a class needs two or more ids below {self.vocab_size}, ascending, got {self.ids}."
            )

    @staticmethod
    def of(student: LazyLogits) -> IdClass | None:
        """The class of a student's logits; None where each id is one of its own."""
        return IdClass(student.one_class, student.vocab_size) if student.one_class else None

    @property
    def num_columns(self) -> int:
        """V − |C| + 1."""
        return self.vocab_size - len(self.ids) + 1

    @cached_property
    def _moves(self) -> tuple[list[int], list[int]]:
        """Ids beyond the columns in use, and the places they move to."""
        members = set(self.ids[1:])
        sources = [v for v in range(self.num_columns, self.vocab_size) if v not in members]
        return sources, [v for v in self.ids[1:] if v < self.num_columns]

    def merge(
        self, logits: Tensor, bias: Tensor | None = None, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Turns logits `[n, V]` in place into those of the columns in use.

        Args:
            logits: overwritten.
            bias: of the head, if the logits are without it; the class's column needs none then.
            scale: what the logits are still to be multiplied by.

        Returns:
            A view of the columns in use `[n, V − |C| + 1]`, and p(v)/P(C) of the class's ids
            `[n, |C|]`.
        """
        ids = list(self.ids)
        own = logits[:, ids]
        own = (own if bias is None else own + bias[ids]) * scale
        total = own.logsumexp(-1, keepdim=True)
        share = (own - total).exp().masked_fill(total == -torch.inf, 0.0)
        logits[:, ids[0]] = total.squeeze(-1) / scale
        self._move(logits)
        return logits[:, : self.num_columns], share

    def _move(self, x: Tensor) -> None:
        sources, places = self._moves
        if sources:
            x[..., places] = x[..., sources]

    def spread(self, gradient: Tensor, share: Tensor) -> None:
        """Turns the gradient of the columns in use into that of all ids, in place.

        Args:
            gradient: `[n, V]`, of which the columns in use are filled.
            share: from `merge`.
        """
        sources, places = self._moves
        of_class = gradient[:, self.ids[0], None] * share
        if sources:
            gradient[:, sources] = gradient[:, places]
        gradient[:, list(self.ids)] = of_class.to(gradient.dtype)

    def columns(self, tokens: Tensor) -> Tensor:
        """Where sampled ids are among the columns in use, same shape."""
        found = tokens
        for source, place in zip(*self._moves, strict=True):
            found = torch.where(tokens == source, place, found)
        for v in self.ids[1:]:
            found = torch.where(tokens == v, self.ids[0], found)
        return found

    def bias(self, bias: Tensor) -> Tensor:
        """Of the columns in use, for logits that were merged with it."""
        moved = bias.clone()
        self._move(moved)
        moved[self.ids[0]] = 0.0
        return moved[: self.num_columns].contiguous()
