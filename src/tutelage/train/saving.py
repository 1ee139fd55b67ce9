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
from tutelage.setup.components import Components, plain_student
from tutelage.setup.phases import PhaseCallback
from tutelage.setup.run_folder import RunFolder, environment
from tutelage.train.checkpoint import (
    Snapshot,
    require_space,
    savable_tensors,
    save_checkpoint,
    write_snapshot,
)
from tutelage.train.checkpoint_thread import CheckpointThread, is_written_beside
from tutelage.train.model_card import model_card


def checkpoint_bytes(config: Config, masters: MasterWeights) -> int:
    """What a checkpoint will hold: weights, float32 masters and the optimizer's state."""
    own = sum(master.nbytes for _, master in masters.pairs)
    return sum(weight.nbytes for weight in masters.weights) + own + _state_bytes(config, masters)


def require_checkpoint_space(config: Config, folder: RunFolder, masters: MasterWeights) -> None:
    """Refuse a run whose first checkpoint will not fit: better now than after hours.

    Raises:
        RunError: the disk of the run folder has too little room.
    """
    needed = checkpoint_bytes(config, masters)
    if config.optimizer.state_is_on_disk:  # in use and in the checkpoint
        needed += _state_bytes(config, masters)
    if folder.is_writer:
        require_space(folder.path, needed)


def _state_bytes(config: Config, masters: MasterWeights) -> int:
    count = sum(master.numel() for master in masters.masters)
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
        self._thread = None
        device = components.device
        copied = copied_bytes(config, components.masters.weights, device)
        if folder.is_writer and is_written_beside(config, device, copied):
            keep = config.keep_checkpoints
            self._thread = CheckpointThread(folder.path, components, optimizer, keep)

    def save(self, step: int) -> None:
        """Write the checkpoint after `step` updates, or begin to.

        Raises:
            RunError: it cannot be written; earlier ones stay.
        """
        self._on_phase("saving a checkpoint")
        if self._thread is not None:
            self._thread.save(step)
        elif self._folder.is_writer or self._components.student.is_sharded:
            self._save_inline(step)
        self._accelerator.wait_for_everyone()

    def _save_inline(self, step: int) -> None:
        run, keep = self._folder.path, self._config.keep_checkpoints
        if not self._components.student.is_sharded:
            save_checkpoint(run, step, self._components, self._optimizer, keep)
            return
        tensors = savable_tensors(run, step, self._components, self._optimizer)
        with self._components.whole() as components:
            if self._folder.is_writer:
                write_snapshot(run, Snapshot(step, None, tensors), components, keep)

    def look(self) -> None:
        """Raise what went wrong with a checkpoint that is no longer being written.

        Raises:
            RunError: it could not be written.
        """
        if self._thread is not None:
            self._thread.look()

    def wait(self) -> None:
        """Return once every checkpoint stands.

        Raises:
            RunError: one could not be written.
        """
        if self._thread is not None:
            self._thread.wait()
        self._accelerator.wait_for_everyone()

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
        target = self._folder.path / "student"
        with self._components.student.whole() as whole:
            if not self._folder.is_writer:
                return
            self._on_phase("exporting the student")
            model = plain_student(self._config, whole)
            records = self._folder.read("evaluation.jsonl")
            card = model_card(self._config, records, environment(), verdict)
            save_model(model, self._components.tokenizer, target, card)
        self._on_phase("")
        self._log(f"student exported to {target}")
