"""Fills the store before the first step: the initial student samples, or a file is encoded."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.config.rollouts import LiveRollouts, StoredRollouts, given_path
from tutelage.config.schema import Config
from tutelage.data.completions import GivenCompletions
from tutelage.data.types import Prompt
from tutelage.errors import RunError
from tutelage.files.atomic import write_atomically
from tutelage.memory.stored import stored_rollout_bytes
from tutelage.models.tokenizers import encode_prompt, stop_ids
from tutelage.rollout.given_rollouts import GivenEncoder
from tutelage.rollout.saved_rollouts import to_line
from tutelage.setup.inputs import prompt_format
from tutelage.setup.manifest import model_digest
from tutelage.setup.phases import PhaseCallback
from tutelage.setup.teacher import ROLLOUTS, STATES
from tutelage.train.agreement import in_main
from tutelage.train.ahead import saved_lines
from tutelage.train.signals import StoppedError
from tutelage.train.stored.sources import LINES
from tutelage.train.stored.store import Store

if TYPE_CHECKING:
    from tutelage.train.step import Step

_STUDENT = "student.json"
"""File of the store that names the weights which sample it, while they do."""


def store_of(config: Config, run: Path, digests: dict[str, str]) -> Store | None:
    """The store of a run; None where every rollout is live.

    Args:
        config: the run.
        run: its folder.
        digests: its `input_digests`.
    """
    if isinstance(config.rollouts, LiveRollouts):
        return None
    names = ("tokenizer", "chat template", "training prompts", "rollouts")
    origin: dict[str, Any] = {name: digests[name] for name in names if name in digests}
    origin |= {"data": asdict(config.data), "sampling": asdict(config.sampling)}
    origin |= {"seed": config.seed, "prompts_per_step": config.prompts_per_step}
    if config.rollouts.path is None:
        student = config.student
        origin["student"] = [student.model, student.dtype, student.num_layers]
    store = Store(run / ROLLOUTS, origin)
    rollouts, teacher = config.rollouts, config.teacher
    if isinstance(rollouts, StoredRollouts) and rollouts.teacher_states != "none":
        settings = rollouts.teacher_states
        origin = {"teacher": digests["teacher"], "teacher.dtype": teacher.dtype}
        origin |= {"quantization": teacher.quantization, "rollouts.teacher_states": settings}
        store.states = Store(store.folder / STATES, origin, store.folder)
    return store


class Fill:
    """Fills a store. Every process calls the same methods in the same order.

    Args:
        step: takes the steps.
        store: is filled.
        is_stopped: whether any process is to stop.
        log: receives a line for every event.
        on_phase: told what is done.
    """

    def __init__(
        self,
        step: Step,
        store: Store,
        is_stopped: Callable[[], bool],
        log: Callable[[str], None],
        on_phase: PhaseCallback,
    ) -> None:
        self.step, self.store, self.config = step, store, step.config
        self._is_stopped, self._log, self._on_phase = is_stopped, log, on_phase
        self._accelerator = step.ranks.accelerator
        self._missing: list[int] = []
        self._steps: Sequence[int] = ()

    def begin(self, first_step: int) -> None:
        """Look what the steps from `first_step` on need and the store lacks.

        Raises:
            TutelageError: the store is another run's, or the disk has no room for the rest.
        """
        steps = range(first_step, self.config.num_steps + 1)
        if steps:
            self._steps = steps
            self._missing = in_main(self._accelerator, lambda: self._begin(steps))
            if self.step.states is not None:
                self.step.states.begin(steps)

    def run(self) -> None:
        """Store what is missing.

        Raises:
            StoppedError: a signal came; what is stored stays.
            TutelageError: completions cannot be had or stored.
        """
        if self._missing:
            self._store()
        if self.step.states is not None and self._steps:
            self.step.states.fill(self._steps, self._is_stopped, self._on_phase)
            self._on_phase("")

    def _store(self) -> None:
        if given_path(self.config.rollouts) is None:
            self._sample(self._missing)
        else:
            in_main(self._accelerator, lambda: self._encode(self._missing))
        self._on_phase("")
        self._log(f"rollouts of {len(self._missing)} steps stored in {self.store.folder}")

    def _begin(self, steps: Sequence[int]) -> list[int]:
        """Steps without a part, which the disk has room for."""
        self.store.open()
        missing, rollouts = self.store.missing(steps), self.config.rollouts
        stored = [step for step in steps if step not in set(missing)]
        if stored:
            self.store.read(stored[0])  # an early word about a store of another run
        if missing and not isinstance(rollouts, LiveRollouts):
            longest = max(len(self._encoded(p)) for p in self.step.prompts(missing[0]))
            needed = stored_rollout_bytes(self.config, longest, len(missing))
            self.store.require_space(needed, rollouts.max_bytes, "storing the rollouts")
            if rollouts.path is None:
                self._require_initial(steps[0], missing[0])
        return missing

    def _encoded(self, prompt: Prompt) -> list[int]:
        components = self.step.components
        return encode_prompt(components.tokenizer, prompt, components.enable_thinking)

    def _require_initial(self, first_step: int, missing: int) -> None:
        """Only the initial student samples, and the same one all steps."""
        if first_step > 1:
            raise RunError(
                f"the rollouts of step {missing} are not in {self.store.folder}, and the initial "
                f"student that samples them is trained to step {first_step - 1}. Restore them, "
                "keep num_steps, or choose another out=FOLDER."
            )
        path = self.store.folder / _STUDENT
        digest = model_digest(self.config.student.model)
        if path.exists() and path.read_text(encoding="utf-8") != json.dumps(digest):
            raise RunError(
                f"the files of student.model = {self.config.student.model!r} changed since it "
                f"began to sample the rollouts in {self.store.folder}. Restore them, or choose "
                "another out=FOLDER."
            )
        write_atomically(path, json.dumps(digest))

    def _sample(self, missing: Sequence[int]) -> None:
        step = self.step
        for number in missing:
            if self._is_stopped():
                raise StoppedError
            self._on_phase(f"storing rollouts: step {number} of {self.config.num_steps}")
            with step.stop.interruptible():
                request = replace(step.request(number), record_hidden=False)
                rollouts = step.sample(request, 1)
            lines = saved_lines(step.ranks, rollouts, step.share(len(rollouts)))
            in_main(self._accelerator, partial(self._write, number, lines))

    def _encode(self, missing: Sequence[int]) -> None:
        """The completions of a file, which every prompt gets in the file's order."""
        config, components = self.config, self.step.components
        path = str(given_path(config.rollouts))
        given = GivenCompletions.read(path, prompt_format(config.data))
        student, k = components.student, config.sampling.num_samples
        encoder = GivenEncoder(
            components.tokenizer,
            stop_ids(student.plain, components.tokenizer),
            student.vocab_size,
            config.sampling.max_new_tokens,
            components.enable_thinking,
        )
        for number in range(1, config.num_steps + 1):
            prompts = self.step.prompts(number)
            given.require(prompts, k)
            choice = given.take(prompts, k)
            if number in missing:
                self._on_phase(f"storing rollouts: step {number} of {config.num_steps}")
                rollouts = encoder.rollouts(choice)
                self._write(number, "".join(f"{to_line(rollout)}\n" for rollout in rollouts))
        for line in encoder.warnings(path):
            self._log(f"warning: {line}")

    def _write(self, number: int, text: str) -> None:
        def fill(folder: Path) -> None:
            (folder / LINES).write_text(text, encoding="utf-8")

        self.store.write(number, fill)
