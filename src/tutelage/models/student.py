"""The trained side: rows of the student, scored without or learned with a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tutelage.core import (
    LazyLogits,
    Objective,
    TeacherLogits,
    TokenStats,
    composite_objective,
    token_stats,
)
from tutelage.core.shared_ids import SharedIds
from tutelage.core.terms import ReverseKL, Term
from tutelage.data.batch import Batch
from tutelage.models.forward import rounding
from tutelage.models.head import head, hidden_rows
from tutelage.models.sharding import plain_copy, shard_model, whole_weights

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


_MAX_GAP = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Largest ‖a − b‖/‖b‖ of a row's hidden states, computed in two ways."""


class Student(nn.Module):
    """The student and its loss in one module.

    The loss is computed inside `forward`, so that whatever gathers or sums over processes sees one
    ordinary module and nothing special is needed for the head. With weights in parts every process
    has to call it as often, and learn from it as often.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int,
        mesh: DeviceMesh | None = None,
        is_offloaded: bool = False,
        stops: tuple[int, ...] = (),
        shared: SharedIds | None = None,
    ) -> None:
        """Take a model as it is, or cut its weights into parts, in place.

        Args:
            model: on its device.
            vocab_size: ids that both models know.
            mesh: processes that share the weights, of `sharding_mesh`; None keeps them whole.
            is_offloaded: whether the parts lie in main memory.
            stops: ids that count as one wherever the student is compared with a teacher.
            shared: what it shares with a teacher that has another vocabulary, stops included.
        """
        super().__init__()
        self.model = model
        self.vocab_size = vocab_size
        self.stops = stops
        self.shared = shared
        self.mesh = mesh
        # In a tuple, so that it counts as no part of this module.
        self._plain = (model if mesh is None else plain_copy(model),)
        if mesh is not None:
            shard_model(self, model, mesh, is_offloaded)

    @property
    def is_sharded(self) -> bool:
        """Whether this process has only a part of the weights."""
        return self.mesh is not None

    @property
    def plain(self) -> PreTrainedModel:
        """The model that has all weights inside `whole`; of whole weights always."""
        return self._plain[0]

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """The model with all weights for the time of the block, as an ordinary one.

        Where they lie in parts, every process has to enter together, and has room for them all.
        Inside none waits for another, and each may leave at its own time. Where they are whole this
        is the model itself.
        """
        if self.mesh is None:
            yield self.model
            return
        with whole_weights(self.model, self.plain) as model:
            yield model

    def forward(
        self,
        batch: Batch,
        teacher: TeacherLogits | None,
        rows: Tensor | None = None,
        terms: Sequence[tuple[Term, Tensor | float]] = ((ReverseKL(), 1.0),),
        extras: Sequence[str] = (),
        hidden: Tensor | None = None,
        has_stops: bool = True,
    ) -> Objective | TokenStats:
        """Scores every row (`rows` is None, no gradient) or learns from the given ones.

        Args:
            batch: B sequences with N completion tokens.
            teacher: teacher logits of the N rows; None scores the student alone, or learns by terms
                that need none.
            rows: rows to learn from `[K]`; None to score all.
            terms: terms of the objective with their weights, `[K]` or one number each.
            extras: names of extra statistics to compute.
            hidden: hidden states of the N rows that are known already `[N, D]`, for scoring.
            has_stops: whether `stops` count as one; False for the sampled ids' own
                log-probabilities, as an engine reports them.

        Returns:
            `TokenStats` of N rows, or the `Objective` of K rows, a sum.

        Raises:
            ValueError: there is no teacher, and a term needs one.
        """
        if rows is None:
            with torch.no_grad():
                known = hidden_rows(self.model, batch) if hidden is None else hidden
                logits = self._compared(head(self.model, known, self.vocab_size), has_stops)
                return token_stats(logits, teacher, batch.tokens, extras=extras)
        found = head(self.model, hidden_rows(self.model, batch), self.vocab_size)
        logits, other = self._compared(found, has_stops), None if teacher is None else teacher[rows]
        return composite_objective(logits[rows], other, terms, extras=extras)

    def _compared(self, logits: LazyLogits, has_stops: bool) -> LazyLogits:
        if self.shared is not None:
            return replace(logits, shared=self.shared)
        return replace(logits, one_class=self.stops) if has_stops and self.stops else logits

    @torch.no_grad()
    def logits(self, batch: Batch) -> LazyLogits:
        """Student logits of the batch's N rows, no gradient; not of weights in parts."""
        return head(self.model, hidden_rows(self.model, batch), self.vocab_size)

    @torch.no_grad()
    def hidden_gap(self, batch: Batch, hidden: Tensor) -> tuple[float, float]:
        """Largest relative difference of a row, known hidden states against a fresh forward pass.

        Every row is measured by its own norm: a few rows with massive activations hide no other.
        Where a router chooses experts, rounding gives some tokens others: there half of the rows
        have to agree.

        Args:
            batch: B sequences with N completion tokens.
            hidden: their hidden states, known from drawing them `[N, D]`.

        Returns:
            max (with experts: median) ‖hidden − fresh‖/‖fresh‖ over rows, and the most that
            rounding may explain.
        """
        with self.whole() as model:
            if not len(hidden):
                return 0.0, 0.0
            fresh = hidden_rows(model, batch).double()
        difference, size = (fresh - hidden.double()).norm(dim=1), fresh.norm(dim=1)
        gaps = torch.where(size > 0, difference / size, difference)
        has_experts = any(name.endswith("experts") for name, _ in self.model.named_modules())
        found = gaps.median() if has_experts else gaps.max()  # either is nan where a row is
        return float(found), max(_MAX_GAP[hidden.dtype], rounding(self.model))


def trained_names(student: Student) -> list[str]:
    """Names of the trained weights, in the order of their masters."""
    named = student.model.named_parameters()
    return [name for name, parameter in named if parameter.requires_grad]
