"""What a run saves: its checkpoints, and the student at its end."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator

from tutelage.config.schema import Config
from tutelage.evaluation.verdict import Verdict
from tutelage.memory.cpu import STATE_BYTES, copied_bytes
from tutelage.models.load import save_model
from tutelage.models.optimizer import MasterWeights
from tutelage.models.student import trained_names
from tutelage.setup.components import Components, plain_student
from tutelage.setup.phases import PhaseCallback
from tutelage.setup.run_folder import RunFolder, environment
from tutelage.train.agreement import in_main
from tutelage.train.checkpoint import has_own_master, save_checkpoint
from tutelage.train.checkpoint_thread import CheckpointThread, is_written_beside
from tutelage.train.model_card import model_card
from tutelage.train.sharded_checkpoint import (
    gathered_to_main,
    save_sharded_checkpoint,
    save_sharded_model,
    trained_parts,
)


def checkpoint_bytes(config: Config, components: Components) -> int:
    """What a checkpoint will hold: weights, float32 masters and the optimizer's state."""
    plain, masters = dict(components.student.plain.named_parameters()), components.masters
    total = state_bytes(config, masters) + sum(average.nbytes for average in masters.averages)
    both = zip(masters.weights, masters.masters, strict=True)
    for name, (weight, master) in zip(trained_names(components.student), both, strict=True):
        total += plain[name].nbytes
        if has_own_master(weight, master, plain[name]):
            total += weight.numel() * master.itemsize
    return total


def state_bytes(config: Config, masters: MasterWeights) -> int:
    """What the optimizer's state takes."""
    count = sum(weight.numel() for weight in masters.weights)
    return int(STATE_BYTES[config.optimizer.kind] * count)


class Saver:
    """Writes checkpoints and the exported student; every process calls it at the same points."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        accelerator: Accelerator,
        components: Components,
        optimizer: torch.optim.Optimizer,
        on_phase: PhaseCallback,
        log: Callable[[str], None],
    ) -> None:
        self._config, self._folder, self._accelerator = config, folder, accelerator
        self._components, self._optimizer = components, optimizer
        self._on_phase, self._log = on_phase, log
        self._keep = config.keep_checkpoints
        self._thread: CheckpointThread | None = None
        self._is_beside = not components.student.is_sharded and in_main(accelerator, self._begin)

    def _begin(self) -> bool:
        """Start the thread of the main process, if there is to be one."""
        components, device = self._components, self._components.device
        copied = copied_bytes(self._config, components.masters.weights, device)
        if not is_written_beside(self._config, device, copied):
            return False
        self._thread = CheckpointThread(self._folder.path, components, self._optimizer, self._keep)
        return True

    def save(self, step: int, rollouts: str = "", best: int | None = None) -> None:
        """Write the checkpoint after `step` updates, or begin to.

        Args:
            step: updates done.
            rollouts: lines of the next step's completions, where they were sampled already.
            best: step of a checkpoint that stays besides the newest.

        Raises:
            RunError: it cannot be written, the same in every process; earlier ones stay.
        """
        self._on_phase("saving a checkpoint")
        parts = (self._components, self._optimizer, self._keep, rollouts, best)
        if self._components.student.is_sharded:
            save_sharded_checkpoint(self._accelerator, self._folder.path, step, *parts)
        elif self._is_beside:
            self._by_thread(lambda thread: thread.save(step, rollouts, best))
        else:
            run = self._folder.path
            in_main(self._accelerator, lambda: save_checkpoint(run, step, *parts))

    def look(self) -> None:
        """Raise what went wrong with a checkpoint that is no longer being written.

        Raises:
            RunError: it could not be written.
        """
        if self._is_beside:
            self._by_thread(CheckpointThread.look)

    def wait(self) -> None:
        """Return once every checkpoint stands.

        Raises:
            RunError: one could not be written.
        """
        if self._is_beside:
            self._by_thread(CheckpointThread.wait)

    def _by_thread(self, work: Callable[[CheckpointThread], None]) -> None:
        def called() -> None:
            if self._thread is not None:
                work(self._thread)

        in_main(self._accelerator, called)

    def close(self) -> None:
        """End the thread that writes, if there is one."""
        if self._thread is not None:
            self._thread.close()

    def export(self, verdict: Verdict | None) -> None:
        """Write the student as a plain model folder with a model card.

        Args:
            verdict: of the run's evaluations, for the card.

        Raises:
            RunError: the folder cannot be written.
        """
        self._on_phase("exporting the student")
        target, tokenizer = self._folder.path / "student", self._components.tokenizer
        records = self._folder.read("evaluation.jsonl")
        card = model_card(self._config, records, environment(), verdict)
        student = self._components.student
        if student.is_sharded and self._config.student.lora is None:
            save_sharded_model(self._accelerator, student, tokenizer, target, card)
        else:
            adapter = gathered_to_main(trained_parts(student)) if student.is_sharded else None

            def save() -> None:
                model = plain_student(self._config, student.plain, adapter)
                save_model(model, tokenizer, target, card)

            in_main(self._accelerator, save)
        self._on_phase("")
        self._log(f"student exported to {target}")
