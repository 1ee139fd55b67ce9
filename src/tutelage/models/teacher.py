"""The frozen side: a teacher that reads completions and may then leave the accelerator."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tutelage.config.models import TeacherMode
from tutelage.core import LazyLogits, TeacherLogits
from tutelage.data.batch import Batch
from tutelage.errors import RunError
from tutelage.models.device import give_back
from tutelage.models.head import head, hidden_rows
from tutelage.models.host_weights import copied_to, has_plain_weights, read_into_memory
from tutelage.models.offload import MappedFile
from tutelage.models.teacher_shards import TeacherShards, held_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


DEVICE_SHARE = 16
"""Hidden states of a step that need more than this part of an accelerator's memory leave it."""


def device_budget(device: torch.device) -> int:
    """Bytes of hidden states that stay on a device; on a CPU, whose memory is main memory, none."""
    if device.type == "cpu":
        return 0
    return int(torch.cuda.get_device_properties(device).total_memory) // DEVICE_SHARE


class HiddenStore:
    """Keeps hidden states in main memory up to a budget, and beyond it in files without a name.

    A file that never had a name needs no removal: it is gone with the last tensor in it, or with
    the process, however that ended.
    """

    def __init__(self, budget_bytes: int = 4 << 30, folder: Path | None = None) -> None:
        self.budget_bytes = budget_bytes
        self.folder = folder
        self._used_bytes = 0

    def empty(self) -> None:
        """A new phase: what was kept before counts no longer."""
        self._used_bytes = 0

    def keep(self, hidden: Tensor) -> Tensor:
        """The same numbers in main memory, or in a memory-mapped file once the budget is used.

        Raises:
            RunError: the disk has no room for the file.
        """
        self._used_bytes += hidden.nbytes
        if self._used_bytes <= self.budget_bytes or not hidden.nbytes:
            return hidden.cpu()
        return self._mapped(hidden.nbytes, hidden.dtype).view(hidden.shape).copy_(hidden)

    def _mapped(self, num_bytes: int, dtype: torch.dtype) -> Tensor:
        try:
            file = MappedFile(num_bytes, self.folder)
        except OSError as error:
            raise RunError(
                f"{num_bytes:,} bytes of teacher hidden states do not fit on the disk of "
                f"{self.folder or tempfile.gettempdir()}: {error.strerror}. Free some space, "
                "raise teacher.hidden_budget_bytes or take fewer prompts a step."
            ) from None
        return file.tensor(0, num_bytes // dtype.itemsize, dtype)


class Teacher:
    """A frozen model whose reading of a batch is D numbers a token, not V.

    Where it is outside `on_device()`: `resident` on its device; `offload` in main memory; `reload`
    nowhere, it is read from disk again. Its head stays on the device for the objective. `swap`
    trades two ids of its vocabulary: its stop token and the student's.

    With `shards` it lies in parts in the processes of a group, which have to enter `on_device()`
    together and to call `forward` as often inside.
    """

    notices: tuple[str, ...] = ()

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int,
        device: torch.device | str = "cpu",
        mode: TeacherMode = "resident",
        swap: tuple[int, int] | None = None,
        load: Callable[[], PreTrainedModel] | None = None,
        store: HiddenStore | None = None,
        shards: TeacherShards | None = None,
    ) -> None:
        if mode == "reload" and load is None:
            raise ValueError("mode 'reload' needs `load`, which reads the model again.")
        if mode == "offload" and shards is not None:
            raise ValueError("a teacher in shards is resident or reloaded.")
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.mode = mode
        self.swap = swap
        self.store = store or HiddenStore()
        self.device_budget_bytes = device_budget(self.device) if mode == "resident" else 0
        self._on_device_bytes = 0
        self._load = load
        self._shards = shards
        self._model: PreTrainedModel | None = self._placed(model)
        self._head: LazyLogits | None = None
        weight = model.get_output_embeddings().weight
        self.head_shape: tuple[int, ...] = tuple(weight.shape)
        self.itemsize = weight.dtype.itemsize
        self.head_bytes = weight.nbytes
        self.full_bytes = held_bytes(model)
        """Bytes of the weights that this process has of the teacher."""
        if mode != "resident" and shards is None:
            model.to("cpu")
        if mode == "offload" and self.device.type != "cpu" and has_plain_weights(model):
            read_into_memory(model)

    def _placed(self, model: PreTrainedModel) -> PreTrainedModel:
        """A model that was loaded, frozen, where it computes."""
        model = model.eval().requires_grad_(False)
        if self._shards is not None:
            self._shards.shard(model)
        elif self.mode == "resident":
            model.to(self.device)
        return model

    @property
    def is_sharded(self) -> bool:
        """Whether this process has only a part of the weights."""
        return self._shards is not None

    @property
    def model(self) -> PreTrainedModel:
        """The model, which in mode `reload` exists only inside `on_device()`."""
        if self._model is None:
            raise RuntimeError(
                "the teacher is not loaded; use it inside `with teacher.on_device()`."
            )
        return self._model

    @property
    def resting_bytes(self) -> int:
        """Bytes of the weights that are loaded now."""
        return 0 if self._model is None else self.full_bytes

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The teacher is on its device inside, and where it rests afterwards."""
        self._head = None
        if self._model is None and self._load is not None:
            self._model = self._placed(self._load())
        self.store.empty()
        self._on_device_bytes = 0
        try:
            with self._moved():
                yield
        finally:
            self._head = None
            if self.mode == "reload":
                self._model = None
                give_back()

    @contextmanager
    def _moved(self) -> Iterator[None]:
        """The model on its device inside; one that is offloaded is in main memory afterwards."""
        if self.mode == "resident" or self.is_sharded:
            yield
        elif self.mode == "offload" and has_plain_weights(self.model):
            with copied_to(self.model, self.device):
                yield
        else:
            self.model.to(self.device)
            try:
                yield
            finally:
                if self.mode == "offload":
                    self.model.to("cpu")

    @torch.no_grad()
    def forward(self, batch: Batch) -> LazyLogits:
        """Teacher logits of the batch's N rows.

        Those of a teacher that is resident on an accelerator stay there, up to a share of its
        memory; all others rest in main memory, or on disk beyond `store`'s budget.

        Args:
            batch: sequences on any device.

        Returns:
            `LazyLogits` of N rows, no gradient.
        """
        here = batch.to(self.device)
        if self._shards is None:
            hidden = hidden_rows(self.model, here)
        else:
            hidden = self._shards.hidden_rows(self.model, here)
        if self._head is None:
            # detached: the model may move or go, while its head's memory stays for the objective
            self._head = self._detached_head(hidden)
        self._on_device_bytes += hidden.nbytes
        if self._on_device_bytes > self.device_budget_bytes:
            hidden = self.store.keep(hidden)
        return replace(self._head, hidden=hidden)

    def to_device(self, logits: TeacherLogits) -> TeacherLogits:
        """What `forward` returned, with its hidden states on the device for the objective."""
        return logits.to(self.device)

    def checks(self) -> dict[str, float]:
        """Nothing: its model is the one that was loaded."""
        return {}

    def _detached_head(self, hidden: Tensor) -> LazyLogits:
        logits = head(self.model, hidden[:0], self.vocab_size)
        weight = logits.weight.detach()
        bias = None if logits.bias is None else logits.bias.detach()
        if self.mode == "reload" and weight.device.type == "cpu" and not self.is_sharded:
            weight = weight.clone()  # a part of a mapped file would keep all of it in memory
        return replace(logits, weight=weight, bias=bias, swap=self.swap)
