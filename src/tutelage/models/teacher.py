"""The frozen side: a teacher that reads completions and may then leave the accelerator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from tutelage.core import LazyLogits
from tutelage.data.batch import Batch
from tutelage.models.head import head, hidden_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Teacher:
    """A frozen model whose reading of a batch is D numbers a token, not V.

    With `offload` the model lives in main memory outside `awake()`, and `view` brings its head to
    the device for each micro-batch. `swap` trades two ids of its vocabulary: its stop token and
    the student's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int,
        device: torch.device | str = "cpu",
        offload: bool = False,
        swap: tuple[int, int] | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.offload = offload
        self.swap = swap
        self.model.to("cpu" if offload else self.device)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """The teacher is on its device inside, and where it rests afterwards."""
        self.model.to(self.device)
        try:
            yield
        finally:
            if self.offload:
                self.model.to("cpu")

    @torch.no_grad()
    def read(self, batch: Batch) -> LazyLogits:
        """Teacher logits of the batch's N rows; the hidden states rest in main memory if offloaded.

        Args:
            batch: sequences on any device.

        Returns:
            `LazyLogits` of N rows, no gradient.
        """
        hidden = hidden_rows(self.model, batch.to(self.device))
        logits = head(self.model, hidden.cpu() if self.offload else hidden, self.vocab_size)
        return replace(logits, swap=self.swap)

    def view(self, logits: LazyLogits) -> LazyLogits:
        """What `read` returned, with hidden states and head on the device for the objective."""
        projection = head(self.model, logits.hidden, self.vocab_size)
        bias = None if projection.bias is None else projection.bias.to(self.device)
        return replace(
            logits,
            hidden=logits.hidden.to(self.device),
            weight=projection.weight.to(self.device),
            bias=bias,
        )
