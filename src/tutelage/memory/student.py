"""What a student takes in a process that trains it, whole or in shards, by shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tutelage.config.schema import Config
from tutelage.memory.cpu import STATE_BYTES, pinned_bytes
from tutelage.memory.meta_model import stored_bytes
from tutelage.memory.shards import Shards, shard_numel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class StudentBytes:
    """Bytes of weights and of what the optimizer keeps, on the device and in main memory."""

    device: dict[str, int]
    """Weights, master weights and optimizer state."""
    host: dict[str, int]
    """The same, and gradients, where the optimizer works in main memory."""
    whole: int = 0
    """Weights that are gathered for the time of a draw, beside the shards."""
    forward: int = 0
    """Weights that are gathered during a forward pass."""


def whole_student(config: Config, student: PreTrainedModel) -> StudentBytes:
    """Of a student that each process holds whole."""
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    count = sum(weight.numel() for weight in trained)
    masters = sum(4 * weight.numel() for weight in trained if weight.itemsize < 4)
    is_offloaded, moments = config.optimizer.offload, _moments(config, count)
    return StudentBytes(
        {
            "student": stored_bytes(student),
            "masters": masters * (not is_offloaded),
            "optimizer": moments * (not is_offloaded),
        },
        {
            "float32 weights": masters * is_offloaded,
            "moments": moments * is_offloaded,
            "float32 gradients": masters * is_offloaded,
        },
    )


def student_in_shards(config: Config, shards: Shards) -> StudentBytes:
    """Of a student of which each process holds a shard; those of trained weights are the masters.

    Shards in main memory are pinned, and torch pins powers of two.
    """
    is_offloaded = config.optimizer.offload
    moments = _moments(config, shards.trained_numel)
    pinned = gradients = 0
    for weight in shards.weights:
        numel, size = shard_numel(weight, shards.group), weight.itemsize
        pinned += pinned_bytes(numel * (max(4, size) if weight.requires_grad else size))
        gradients += pinned_bytes(numel * max(4, size)) * weight.requires_grad
    return StudentBytes(
        {
            "student": shards.stored_bytes * (not is_offloaded),
            "masters": 0,
            "optimizer": moments * (not is_offloaded),
        },
        {
            "float32 weights": pinned * is_offloaded,
            "moments": moments * is_offloaded,
            "float32 gradients": gradients * is_offloaded,
        },
        shards.whole_bytes + shards.gathering_bytes,
        max(shards.first_bytes, shards.forward_bytes),
    )


def _moments(config: Config, count: int) -> int:
    """Bytes of optimizer state of so many trained numbers, unless it lies on disk."""
    optimizer = config.optimizer
    return 0 if optimizer.state_is_on_disk else int(count * STATE_BYTES[optimizer.kind])
