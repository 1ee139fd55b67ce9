"""The student as its own teacher: its model with other values of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tutelage.config.models import TeacherMode
from tutelage.core import LazyLogits, TeacherLogits
from tutelage.data.batch import Batch
from tutelage.models.head import head, hidden_rows
from tutelage.models.teacher import HiddenStore, device_budget

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ZERO_AT_FIRST = ("lora_B.", "lora_embedding_A.")
"""What an adapter starts with at 0, so that it adds nothing."""


def first_values(
    model: PreTrainedModel, start: PreTrainedModel | None, mode: TeacherMode
) -> dict[str, Tensor]:
    """Values of the trained weights with which the model says what it said at first.

    Those of an adapter are zeros where it began with zeros, and its other weights as they are,
    which then change nothing: the model is its base.

    Args:
        model: the student.
        start: the student as it was at first; None where it is so now.
        mode: where the values are to rest.
    """
    weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
    if any(".lora_" in name for name in weights):
        names = [name for name in weights if any(mark in name for mark in _ZERO_AT_FIRST)]
        return {name: torch.zeros_like(weights[name]) for name in names}
    first = dict((start or model).named_parameters())
    found = {name: first[name].detach() for name in weights}
    if mode == "offload":
        return {name: value.to("cpu", copy=True) for name, value in found.items()}
    return found if start is not None else {name: value.clone() for name, value in found.items()}


class StudentAsTeacher:
    """Reads with the student's model, in which other values take the place of trained weights.

    The student has its own weights again after every pass, in the same memory. What the objective
    needs of the head outlives the pass.
    """

    notices: tuple[str, ...] = ()

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int,
        values: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
        mode: TeacherMode = "resident",
        store: HiddenStore | None = None,
        keeps_head: bool = False,
    ) -> None:
        """Take values as they are; they may change between passes.

        Args:
            model: the student, with all weights.
            vocab_size: ids of its tokenizer.
            values: by name, of those weights that are not the student's own; empty for none.
            device: of the passes.
            mode: `offload` keeps the values in main memory.
            store: keeps hidden states.
            keeps_head: copies the head, which changes before the last use of a pass.
        """
        self.model = model
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.mode: TeacherMode = mode
        self.store = store or HiddenStore()
        self._device_budget_bytes = device_budget(self.device) if mode == "resident" else 0
        self._on_device_bytes = 0
        named = dict(model.named_parameters())
        self._pairs: list[tuple[nn.Parameter, Tensor]] = [(named[n], v) for n, v in values.items()]
        self._here: Sequence[Tensor] | None = None
        self._keeps_head = keeps_head
        self._head: LazyLogits | None = None
        projection = model.get_output_embeddings().weight
        self.head_shape, self.itemsize = tuple(projection.shape), projection.dtype.itemsize
        has_own = any(weight is projection for weight, _ in self._pairs)
        self.head_bytes = projection.nbytes if has_own or keeps_head else 0
        """Bytes of the head beside the student's."""
        self.resting_bytes = sum(value.nbytes for _, value in self._pairs)
        """Bytes of the values."""
        copied = [w for w, v in self._pairs if v.dtype != w.dtype or v.device != w.device]
        self.full_bytes = self.resting_bytes + sum(weight.nbytes for weight in copied)
        """The same and those of their copies for a pass."""

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The values are on the device inside, in the model's dtype."""
        self._head = None
        self.store.empty()
        self._on_device_bytes = 0
        self._here = [value.to(weight.device, weight.dtype) for weight, value in self._pairs]
        try:
            yield
        finally:
            self._here = self._head = None

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        if self._here is None:
            raise RuntimeError("the teacher's forward pass runs inside `with teacher.on_device()`.")
        own = [weight.data for weight, _ in self._pairs]
        try:
            for (weight, _), value in zip(self._pairs, self._here, strict=True):
                weight.data = value
            yield
        finally:
            for (weight, _), value in zip(self._pairs, own, strict=True):
                weight.data = value

    @torch.no_grad()
    def forward(self, batch: Batch) -> LazyLogits:
        """Teacher logits of the batch's N rows, no gradient; see `Teacher.forward`."""
        with self._exchanged():
            hidden = hidden_rows(self.model, batch.to(self.device))
            if self._head is None:
                self._head = self._detached_head(hidden)
        self._on_device_bytes += hidden.nbytes
        if self._on_device_bytes > self._device_budget_bytes:
            hidden = self.store.keep(hidden)
        return replace(self._head, hidden=hidden)

    def to_device(self, logits: TeacherLogits) -> TeacherLogits:
        """What `forward` returned, with its hidden states on the device for the objective."""
        return logits.to(self.device)

    def checks(self) -> Mapping[str, float]:
        """Nothing that could go wrong unseen."""
        return {}

    def _detached_head(self, hidden: Tensor) -> LazyLogits:
        logits = head(self.model, hidden[:0], self.vocab_size)
        weight = logits.weight.detach()
        bias = None if logits.bias is None else logits.bias.detach()
        if self._keeps_head:
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        return replace(logits, weight=weight, bias=bias)
