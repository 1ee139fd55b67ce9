"""The teacher's hidden states of stored rollouts: computed once, after which no model is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from tutelage.config.rollouts import StoredRollouts
from tutelage.errors import RunError
from tutelage.models.load import DTYPES
from tutelage.models.stored_teacher import StoredTeacher, write_head, write_states
from tutelage.setup.phases import PhaseCallback
from tutelage.setup.teacher import HEAD
from tutelage.train.signals import StoppedError
from tutelage.train.stored.store import Store

if TYPE_CHECKING:
    from tutelage.train.step import Step


class States:
    """Fills the store of the teacher's states, in one process.

    Args:
        step: takes the steps.
        teacher: has its model, or its head alone once all states are stored.
        store: is filled.
        settings: the dtype of the numbers, and the most bytes.
    """

    def __init__(
        self, step: Step, teacher: StoredTeacher, store: Store, settings: StoredRollouts
    ) -> None:
        self._step, self._teacher, self.store, self._settings = step, teacher, store, settings

    def open(self, step: int) -> None:
        """Let the teacher give the rows of a step, unless it has its model.

        Raises:
            RunError: the step's part is missing or damaged.
        """
        if self._teacher.whole is None:
            self._teacher.open(self.store.read(step))

    def begin(self, steps: Sequence[int]) -> None:
        """Look what is there.

        Raises:
            RunError: states are missing, and the teacher's model is no longer used.
        """
        self.store.open()
        missing = self.store.missing(steps)
        if missing and self._teacher.whole is None:
            raise RunError(
                f"the teacher's states of step {missing[0]} are not in {self.store.folder}. "
                f"Restore them, or remove {self.store.part(HEAD)} to compute them again."
            )

    def fill(
        self, steps: Sequence[int], is_stopped: Callable[[], bool], on_phase: PhaseCallback
    ) -> None:
        """Compute and store what is missing, and let the teacher's model go.

        Raises:
            StoppedError: a signal came; what is stored stays.
            RunError: the disk has no room for it.
        """
        whole = self._teacher.whole
        if whole is None:
            return
        missing = self.store.missing(steps)
        self._require_space(missing)
        dtype = DTYPES[self._settings.teacher_states]
        with whole.on_device():
            for number in missing:
                if is_stopped():
                    raise StoppedError
                on_phase(f"storing the teacher's states: step {number} of {steps[-1]}")
                with self._step.stop.interruptible():
                    whole.store.empty()
                    micro_batches = self._step.pack(self._step.source.take(number), number)
                    pairs = [(m.batch, whole.forward(m.read_by_teacher)) for m in micro_batches]
                self.store.write(number, partial(write_states, pairs=pairs, dtype=dtype))
            first = self._step.pack(self._step.source.take(steps[0]), steps[0])[0]
            logits = whole.forward(first.read_by_teacher)
        if not self.store.part(HEAD).is_dir():
            self.store.write(HEAD, partial(write_head, logits=logits))
        self._teacher.leave(logits)

    def _require_space(self, missing: Sequence[int]) -> None:
        rows = sum(
            len(rollout.generated_ids)
            for number in missing
            for rollout in self._step.source.take(number)
        )
        size = DTYPES[self._settings.teacher_states].itemsize * self._teacher.head_shape[1] + 8
        needed = rows * size + self._teacher.head_bytes
        limit = self._settings.max_bytes
        self.store.require_space(needed if missing else 0, limit, "storing the teacher's states")


def states_of(step: Step, store: Store | None) -> States | None:
    """What a run stores of its teacher, if anything.

    Args:
        step: takes the steps.
        store: of the run's rollouts.
    """
    settings, teacher = step.config.rollouts, step.components.teacher
    if not isinstance(settings, StoredRollouts) or not isinstance(teacher, StoredTeacher):
        return None
    if store is None or store.states is None:
        return None
    return States(step, teacher, store.states, settings)
