"""Checkpoints written beside training, from copies in main memory."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tutelage.errors import RunError
from tutelage.memory.cpu import available_bytes
from tutelage.train.checkpoint import Snapshot, savable_tensors, write_snapshot

if TYPE_CHECKING:
    from tutelage.config.schema import Config
    from tutelage.setup.components import Components


def is_written_beside(config: Config, device: torch.device, num_bytes: int) -> bool:
    """Whether checkpoints are written beside training.

    Args:
        config: the run's configuration.
        device: what it trains on.
        num_bytes: what a copy of a checkpoint takes of main memory.

    Raises:
        RunError: a thread is asked for, and its copy does not fit.
    """
    if config.checkpoint_writer == "inline":
        return False
    free = available_bytes(torch.device("cpu"))
    if config.checkpoint_writer == "thread" and num_bytes > free:
        raise RunError(
            f"checkpoint_writer 'thread' copies {num_bytes:,} bytes to main memory, of which "
            f'{free:,} are free. Use checkpoint_writer = "inline".'
        )
    if config.checkpoint_writer == "thread":
        return True
    return device.type == "cuda" and config.can_copy_checkpoints and num_bytes < free


class CheckpointThread:
    """Writes checkpoints beside training, each from a copy in main memory of its moment.

    Training waits for the copy alone, and for the checkpoint before if that is still written. A
    checkpoint stands whole or not at all, as everywhere, so a process that dies meanwhile leaves
    the one before.
    """

    def __init__(
        self, run: Path, components: Components, optimizer: torch.optim.Optimizer, keep: int
    ) -> None:
        self._run, self._components, self._optimizer, self._keep = run, components, optimizer, keep
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None
        self._copies: dict[str, Tensor] = {}

    def save(self, step: int, rollouts: str = "", best: int | None = None) -> None:
        """Copy the numbers and begin to write them; the checkpoint of step `best` stays.

        Raises:
            RunError: as `save_checkpoint`, about this checkpoint or the one before.
        """
        self.wait()
        tensors = savable_tensors(self._run, step, self._components, self._optimizer)
        weights = self._weights()
        snapshot = Snapshot(step, self._copy(weights), self._copy(tensors), rollouts)
        if self._components.device.type == "cuda":
            torch.cuda.synchronize(self._components.device)  # whole before a weight changes
        arguments = (self._run, snapshot, self._components, self._keep, best)
        self._writing = self._pool.submit(write_snapshot, *arguments)

    def look(self) -> None:
        """Say at once what went wrong with a checkpoint that is no longer being written.

        Raises:
            RunError: it could not be written.
        """
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Return once every checkpoint stands.

        Raises:
            RunError: one could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """End the thread, after the checkpoint it is writing."""
        self._pool.shutdown(wait=True)

    def _weights(self) -> dict[str, Tensor]:
        """What `save_model` writes: of a student with an adapter, the adapter alone."""
        model = self._components.student.model
        weights: dict[str, Tensor] = model.state_dict()
        if model._hf_peft_config_loaded:
            trained = {name for name, p in model.named_parameters() if p.requires_grad}
            weights = {name: weight for name, weight in weights.items() if name in trained}
        return weights

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in main memory, in the same buffers every time; tied tensors stay tied."""
        copies: dict[tuple[int, torch.Size], Tensor] = {}
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            key = (
                (tensor.data_ptr(), tensor.shape) if tensor.numel() else (id(tensor), tensor.shape)
            )
            if key not in copies:
                copies[key] = self._buffer(name, tensor)
                copies[key].copy_(tensor.detach(), non_blocking=True)
            found[name] = copies[key]
        return found

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        held = self._copies.get(name)
        if held is None or held.shape != like.shape or held.dtype != like.dtype:
            is_pinned = like.device.type == "cuda"
            held = torch.empty(like.shape, dtype=like.dtype, pin_memory=is_pinned)
            self._copies[name] = held
        return held
