"""A teacher whose hidden states are stored with the rollouts: then its head alone is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tutelage.config.models import TeacherMode
from tutelage.core import LazyLogits, TeacherLogits
from tutelage.data.batch import Batch
from tutelage.errors import RunError
from tutelage.models.device import give_back
from tutelage.models.teacher import Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HEAD, _FORM = "head.safetensors", "head.json"
STATES = "states.safetensors"
"""File of the hidden states of a step."""


class StoredTeacher:
    """Forwards batches with its model until `leave`, and then gives the rows that are stored.

    Args:
        model: the whole teacher; None once all states are stored.
        head: what is left of it then, with no rows, on the device for the objective.
    """

    def __init__(self, model: Teacher | None, head: LazyLogits | None = None) -> None:
        if (model is None) == (head is None):
            raise ValueError("a teacher has its model, or its head alone.")
        self._whole, self._head = model, head
        self._batches: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        """Tokens `[N]` and hidden states `[N, D]` by the completions of each batch that was stored
        of the step that is open."""
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}
        """The same of each completion by itself."""

    @classmethod
    def read(cls, folder: Path, device: torch.device) -> StoredTeacher:
        """The head that `write_head` wrote."""
        form = json.loads((folder / _FORM).read_text(encoding="utf-8"))
        tensors = load_file(folder / _HEAD, device=str(device))
        swap = None if form["swap"] is None else (int(form["swap"][0]), int(form["swap"][1]))
        head = LazyLogits(
            tensors["hidden"],
            tensors["weight"],
            tensors.get("bias"),
            form["scale"],
            form["softcap"],
            swap,
        )
        return cls(None, head)

    @property
    def num_rows(self) -> int:
        """Rows of the head."""
        return self.head_shape[0]

    @property
    def whole(self) -> Teacher | None:
        """The teacher with its model, before all states are stored."""
        return self._whole

    def leave(self, logits: LazyLogits) -> None:
        """Keep the head of some logits, and let the model go."""
        self._head, self._whole = logits[torch.arange(0)], None
        give_back()

    # --- what a run asks of any teacher ---------------------------------------------------------

    @property
    def _left(self) -> LazyLogits:
        if self._head is None:
            raise RuntimeError("the teacher has its model still.")
        return self._head

    @property
    def vocab_size(self) -> int:
        """Ids that student and teacher share."""
        return self._left.vocab_size if self._whole is None else self._whole.vocab_size

    @property
    def model(self) -> PreTrainedModel:
        """The model, which is gone once all states are stored."""
        if self._whole is None:
            raise RuntimeError("of the teacher only hidden states and the head are stored.")
        return self._whole.model

    @property
    def mode(self) -> TeacherMode:
        """The head stays on the device."""
        return "resident" if self._whole is None else self._whole.mode

    @property
    def head_shape(self) -> tuple[int, ...]:
        """V and D of the head."""
        return tuple(self._left.weight.shape) if self._whole is None else self._whole.head_shape

    @property
    def itemsize(self) -> int:
        """Bytes of a number of its hidden states."""
        return self._left.hidden.itemsize if self._whole is None else self._whole.itemsize

    @property
    def head_bytes(self) -> int:
        """Bytes of the head."""
        return self._left.weight.nbytes if self._whole is None else self._whole.head_bytes

    @property
    def full_bytes(self) -> int:
        """Bytes of the weights inside `on_device()`."""
        return self.head_bytes if self._whole is None else self._whole.full_bytes

    @property
    def resting_bytes(self) -> int:
        """Bytes of the weights that are loaded now."""
        return self.head_bytes if self._whole is None else self._whole.resting_bytes

    @property
    def notices(self) -> Sequence[str]:
        """Lines about it for the start of a run."""
        return () if self._whole is None else self._whole.notices

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """`forward` can be called inside."""
        if self._whole is None:
            yield
            return
        with self._whole.on_device():
            yield

    def forward(self, batch: Batch) -> LazyLogits:
        """Teacher logits of the batch's N rows: those of its model, or the stored ones.

        Raises:
            RunError: other tokens are stored of a completion.
        """
        if self._whole is not None:
            return self._whole.forward(batch)
        head = self._left
        tokens, hidden = self._batches.get(tuple(batch.names)) or self._collected(batch)
        if not torch.equal(tokens, batch.tokens.cpu()):
            raise RunError(
                "the teacher's stored hidden states are of other tokens than the step's "
                "completions. Choose another out=FOLDER for a run with states of its own."
            )
        return replace(head, hidden=hidden.to(head.hidden.dtype))

    def _collected(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rows of completions that were stored in other batches."""
        hidden = self._left.hidden.cpu()
        found = [self._rows[name] for name in batch.names if name in self._rows]
        return (
            torch.cat([torch.zeros(0, dtype=torch.int64), *(tokens for tokens, _ in found)]),
            torch.cat([hidden, *(states.to(hidden.dtype) for _, states in found)]),
        )

    def to_device(self, logits: TeacherLogits) -> TeacherLogits:
        """What `forward` returned, on the device for the objective."""
        if self._whole is not None:
            return self._whole.to_device(logits)
        return logits.to(self._left.weight.device)

    def checks(self) -> Mapping[str, float]:
        """Nothing is measured."""
        return {}

    # --- files ----------------------------------------------------------------------------------

    def open(self, folder: Path) -> None:
        """Let `forward` give the rows of a step that `write_states` wrote."""
        tensors = load_file(folder / STATES)
        self._batches, self._rows = {}, {}
        for number in range(len(tensors) // 4):
            names, sizes, tokens, hidden = (
                tensors[f"{what}.{number}"] for what in ("names", "sizes", "tokens", "hidden")
            )
            self._batches[tuple(names.tolist())] = (tokens, hidden)
            parts = zip(
                torch.split(tokens, sizes.tolist()),
                torch.split(hidden, sizes.tolist()),
                strict=True,
            )
            self._rows |= dict(zip(names.tolist(), parts, strict=True))


def write_states(
    folder: Path, pairs: Sequence[tuple[Batch, LazyLogits]], dtype: torch.dtype
) -> None:
    """Write the hidden states of a step.

    Args:
        folder: receives the file.
        pairs: each batch of the step with the teacher's logits of its rows.
        dtype: of the numbers in the file.
    """
    tensors: dict[str, Tensor] = {}
    for number, (batch, logits) in enumerate(pairs):
        names, sizes = torch.unique_consecutive(batch.completion.cpu(), return_counts=True)
        tensors |= {
            f"names.{number}": names,
            f"sizes.{number}": sizes,
            f"tokens.{number}": batch.tokens.cpu().contiguous(),
            f"hidden.{number}": logits.hidden.to("cpu", dtype).contiguous(),
        }
    save_file(tensors, folder / STATES)


def write_head(folder: Path, logits: LazyLogits) -> None:
    """Write what projects hidden states."""
    tensors = {"hidden": logits.hidden[:0], "weight": logits.weight}
    tensors |= {} if logits.bias is None else {"bias": logits.bias}
    save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, folder / _HEAD)
    form = {"scale": logits.scale, "softcap": logits.softcap, "swap": logits.swap}
    (folder / _FORM).write_text(json.dumps(form), encoding="utf-8")
