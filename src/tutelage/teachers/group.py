"""Several teachers of one run, each of which supervises the prompts that name it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from tutelage.config.models import TeacherMode
from tutelage.core import TeacherLogits
from tutelage.data.batch import Batch
from tutelage.models.teacher_protocol import AnyTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TeacherGroup:
    """Hands each batch to the teacher of its sequences; one at a time is on the device.

    A teacher stays there until a batch of another comes, so batches of one teacher follow one
    another.

    Args:
        teachers: by name; "" is that of prompts without a name.
    """

    def __init__(self, teachers: Mapping[str, AnyTeacher]) -> None:
        self.teachers = dict(teachers)
        self._current: str | None = None
        self._stack: ExitStack | None = None
        """Leaves the teacher that is on the device; None outside `on_device()`."""

    @property
    def first(self) -> AnyTeacher:
        """The teacher of prompts that name none."""
        return self.teachers[""]

    @property
    def vocab_size(self) -> int:
        """Ids that all share with the student."""
        return self.first.vocab_size

    @property
    def model(self) -> PreTrainedModel:
        """The first one's, which is on the device then if a phase has begun."""
        if self._stack is not None:
            self._enter("")
        return self.first.model

    @property
    def mode(self) -> TeacherMode:
        """`reload` if one is loaded anew in every step, else the first one's."""
        modes = [teacher.mode for teacher in self.teachers.values()]
        return "reload" if "reload" in modes else self.first.mode

    @property
    def head_shape(self) -> tuple[int, ...]:
        """Of the widest head."""
        return max((teacher.head_shape for teacher in self.teachers.values()), key=lambda x: x[-1])

    @property
    def itemsize(self) -> int:
        """Bytes of a number of hidden states, the most."""
        return max(teacher.itemsize for teacher in self.teachers.values())

    @property
    def head_bytes(self) -> int:
        """Bytes of all heads."""
        return sum(teacher.head_bytes for teacher in self.teachers.values())

    @property
    def full_bytes(self) -> int:
        """Bytes of the weights while the largest that does not rest on the device is there."""
        resting = self.resting_bytes
        return max(
            resting - teacher.resting_bytes + teacher.full_bytes
            for teacher in self.teachers.values()
        )

    @property
    def resting_bytes(self) -> int:
        """Bytes of the weights that are loaded while none computes."""
        return sum(teacher.resting_bytes for teacher in self.teachers.values())

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """`forward` can be called inside; a new phase begins."""
        try:
            with ExitStack() as self._stack:
                yield
        finally:
            self._current = self._stack = None

    def _enter(self, name: str) -> None:
        """Exchange what is on the device, unless it is that teacher."""
        if self._stack is None:
            raise RuntimeError("teachers forward inside `with teacher.on_device()`.")
        if self._current != name:
            self._stack.close()
            self._stack.enter_context(self.teachers[name].on_device())
            self._current = name

    def forward(self, batch: Batch) -> TeacherLogits:
        """Logits of the batch's rows by the teacher of its sequences."""
        self._enter(batch.teacher)
        return self.teachers[batch.teacher].forward(batch)

    def to_device(self, logits: TeacherLogits) -> TeacherLogits:
        """What `forward` returned, on the device for the objective."""
        return self.first.to_device(logits)

    @property
    def notices(self) -> tuple[str, ...]:
        """What a user has to know at the start of a run."""
        return tuple(
            f"teacher {name or 'of prompts without one'}: {line}"
            for name, teacher in self.teachers.items()
            for line in teacher.notices
        )

    def checks(self) -> dict[str, float | None]:
        """What the teachers measured of themselves, with their names behind a colon."""
        return {
            f"{key}:{name}" if name else key: value
            for name, teacher in self.teachers.items()
            for key, value in teacher.checks().items()
        }
