"""What a run asks of its teacher, wherever the teacher's model is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from tutelage.config.models import TeacherMode
from tutelage.core import TeacherLogits
from tutelage.data.batch import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AnyTeacher(Protocol):
    """Gives a batch's rows their logits.

    The processes of a run may hold one together: all of them enter `on_device()` and call `forward`
    equally often.
    """

    @property
    def vocab_size(self) -> int:
        """Ids that student and teacher share."""

    @property
    def model(self) -> PreTrainedModel:
        """The model, perhaps only inside `on_device()`; of one that is elsewhere, its head."""

    @property
    def mode(self) -> TeacherMode:
        """Where the model is outside `on_device()`."""

    @property
    def head_shape(self) -> tuple[int, ...]:
        """V and D of the whole head."""

    @property
    def itemsize(self) -> int:
        """Bytes of a number of its hidden states."""

    @property
    def head_bytes(self) -> int:
        """Bytes of the head."""

    @property
    def full_bytes(self) -> int:
        """Bytes of the weights that this process has inside `on_device()`."""

    @property
    def resting_bytes(self) -> int:
        """Bytes of the weights that are loaded now."""

    @property
    def notices(self) -> Sequence[str]:
        """Lines about it for the start of a run."""

    def on_device(self) -> AbstractContextManager[None]:
        """`forward` can be called inside; a new phase begins."""

    def forward(self, batch: Batch) -> TeacherLogits:
        """Teacher logits of the batch's N rows, no gradient, perhaps on another device."""

    def to_device(self, logits: TeacherLogits) -> TeacherLogits:
        """What `forward` returned, on the device for the objective."""

    def checks(self) -> Mapping[str, float | None]:
        """What it measured of itself, in this process, since the last call, for a step's metrics.

        Each is at least 0, and the largest of all processes is logged; None where it was not
        measured. The names are the same in all of them.
        """
