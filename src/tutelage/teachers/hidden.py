"""A teacher on a server: its head is here, its hidden states come over HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from tutelage.config.models import TeacherMode
from tutelage.core import LazyLogits, TeacherLogits
from tutelage.data.batch import Batch
from tutelage.errors import ModelError
from tutelage.models.forward import relative_gap, rounding
from tutelage.models.head import head, output_embeddings
from tutelage.models.teacher import HiddenStore
from tutelage.teachers.messages import Payload

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLED_EVERY = 256
"""Micro-batches, of which the first is asked for twice, and compared."""
_PAYLOAD_GAP = 8e-3
"""Largest relative difference that rounding to bfloat16 explains."""


class HiddenSource(Protocol):
    """Servers of one model that give its final hidden states."""

    weights: str
    """Checksum of the weights on them, once they were asked; "" if they tell none."""

    def connect(self) -> list[str]:
        """Compare the models of all servers with the head that is here.

        Returns:
            Lines about them for the start of a run.

        Raises:
            TutelageError: one does not answer, or has another model.
        """

    def hidden(self, batch: Batch, payload: Payload) -> Tensor:
        """Hidden states of a batch's rows `[N, D]`, on the CPU.

        Raises:
            TutelageError: a server does not answer, or not to what it was asked.
        """

    def prove(self, batch: Batch, logits: LazyLogits) -> None:
        """Refuse logits of a batch's rows that cannot be the model's.

        Args:
            batch: what was asked for.
            logits: over all ids of the head, none of them exchanged, on the device of the run.

        Raises:
            ModelError: they cannot.
        """


class ServedTeacher:
    """A frozen model on a server, of which the head is here.

    Args:
        model: from `load_head_model`, on the device of the run.
        source: the servers.
        vocab_size: ids that student and teacher share.
        payload: dtype of hidden states on their way.
        swap: two ids of its vocabulary that trade places: its stop token and the student's.
        store: keeps hidden states until the objective needs them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: HiddenSource,
        vocab_size: int,
        payload: Payload = "float32",
        swap: tuple[int, int] | None = None,
        store: HiddenStore | None = None,
    ) -> None:
        self.model = model
        self.source = source
        self.vocab_size = vocab_size
        self.payload: Payload = payload
        self.store = store or HiddenStore()
        weight: Tensor = output_embeddings(model).weight
        self.device = weight.device
        self.head_shape: tuple[int, ...] = tuple(weight.shape)
        self.itemsize = weight.dtype.itemsize
        self.head_bytes = self.full_bytes = self.resting_bytes = weight.nbytes
        none = torch.empty(0, weight.shape[1], dtype=weight.dtype)
        self._whole = head(model, none, int(weight.shape[0]))
        self._head = replace(head(model, none, vocab_size), swap=swap)
        self._limit = rounding(model)
        if payload != "float32":
            self._limit = max(self._limit, _PAYLOAD_GAP)
        self.notices: tuple[str, ...] = ()
        self._num_read = 0
        self._gap: float | None = None

    @property
    def weights(self) -> str:
        """Checksum of the weights on the servers, once they were asked; "" if they tell none."""
        return self.source.weights

    @property
    def mode(self) -> TeacherMode:
        """The head is on the device all the time."""
        return "resident"

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """A new phase begins; nothing moves."""
        self.store.empty()
        yield

    @torch.no_grad()
    def forward(self, batch: Batch) -> LazyLogits:
        """Teacher logits of the batch's N rows, from the servers, in main memory or on disk.

        Raises:
            TutelageError: a server does not answer, or not to what it was asked.
        """
        if not batch.num_rows:
            return self._head
        hidden = self.source.hidden(batch, self.payload).to(self._head.weight.dtype)
        if self._num_read % SAMPLED_EVERY == 0:
            self.source.prove(batch, replace(self._whole, hidden=hidden).to(self.device))
            self._compare(batch, hidden)
        self._num_read += 1
        return replace(self._head, hidden=self.store.keep(hidden))

    def _compare(self, batch: Batch, hidden: Tensor) -> None:
        """Refuse hidden states that a second request, without loss, does not give again."""
        again = self.source.hidden(batch, "float32").to(hidden.dtype)
        gap = relative_gap(hidden, again)
        if not gap <= self._limit:
            raise ModelError(
                f"the teacher's server answers the same token ids with other hidden states: they "
                f"differ by {gap:.2g} of their size, more than {self._limit:.2g}. Nothing of this "
                "batch was kept; check the server."
            )
        self._gap = max(gap, self._gap or 0.0)

    def to_device(self, logits: TeacherLogits) -> TeacherLogits:
        """What `forward` returned, with its hidden states on the device for the objective."""
        return logits.to(self.device)

    def checks(self) -> dict[str, float | None]:
        """What the payload's rounding changes of hidden states, where it rounds."""
        if self.payload == "float32":
            return {}
        gap, self._gap = self._gap, None
        return {"teacher_payload_gap": gap}


def cut(batch: Batch, count: int) -> Sequence[Batch]:
    """A batch in so many parts, or one a sequence if there are fewer."""
    if count <= 1 or batch.num_sequences <= 1:
        return [batch]
    first, last = batch.halves()
    return [*cut(first, (count + 1) // 2), *cut(last, count // 2)]
