"""Processes as launchers start them: torchrun, our own, accelerate, MPI and Slurm."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tutelage.models.sharding import GROUP_TIMEOUT

_SIZES = (
    "WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
)
"""Variables by which launchers tell how many processes they started."""
_REMEDY = "Start them by torchrun --nproc_per_node N -m tutelage"


def launcher_warning(num_processes: int, environment: Mapping[str, str] = os.environ) -> str | None:
    """A warning where a launcher was asked for several processes and this one is alone.

    Args:
        num_processes: that work together.
        environment: names and values that the launcher set.
    """
    if num_processes > 1:
        return None
    for name in _SIZES:
        value = environment.get(name, "")
        if value.isdecimal() and int(value) > 1:
            return (
                f"{name} is {value}, and this process works alone: others that were started do "
                f"the same work again. {_REMEDY}."
            )
    # `accelerate launch --cpu` sets these for several processes, and starts one.
    if "ACCELERATE_DYNAMO_BACKEND" in environment and "MASTER_PORT" in environment:
        return (
            "accelerate launch was asked for several processes and started one, as it does with "
            f"--cpu. {_REMEDY}."
        )
    return None


@dataclass(frozen=True)
class Layout:
    """How the processes of a run lie and what they share."""

    num_processes: int
    num_hosts: int
    sharding: str
    """Of the student."""
    teacher_sharding: str

    def __str__(self) -> str:
        count, hosts = self.num_processes, self.num_hosts
        if count == 1:
            return "1 process"
        parts = [f"{count} processes", f"{hosts} host{'s' * (hosts > 1)}"]
        parts += [self.sharding] * (self.sharding != "none")
        parts += [f"teacher {self.teacher_sharding}"] * (self.teacher_sharding != "none")
        return ", ".join(parts)

    def record(self, earlier: dict[str, Any] | None, step: int) -> dict[str, Any]:
        """Keys for a run's manifest: this layout, and all that took steps, by their first steps.

        Args:
            earlier: manifest of the start before; None for a new run.
            step: the first step that this start takes.
        """
        found = (earlier or {}).get("layouts")
        layouts = [one for one in found if _first_step(one) < step] if type(found) is list else []
        own = {"first_step": step, **asdict(self)}
        if not layouts or {**layouts[-1], "first_step": step} != own:
            layouts.append(own)
        return {**asdict(self), "layouts": layouts}


def _first_step(layout: object) -> float:
    """Of a layout in a manifest; infinite for something else, which an edit may have left."""
    step = layout.get("first_step") if isinstance(layout, dict) else None
    return step if isinstance(step, int) else math.inf


def num_hosts() -> int:
    """Different machines, by their names, on which the processes of the group run."""
    if not torch.distributed.is_initialized():
        return 1
    names: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(names, socket.gethostname())
    return len(set(names))


class Processes:
    """A group of the processes that a launcher started, for a command that is no run.

    Args:
        device: of what they compute; on CUDA each takes its own.
    """

    def __init__(self, device: torch.device) -> None:
        # Their functions have the group of the time of import as the default of an argument.
        import torch.distributed.fsdp
        import torch.distributed.nn
        import torch.distributed.optim  # noqa: F401
        from accelerate import PartialState

        self._state = PartialState(cpu=device.type == "cpu", timeout=GROUP_TIMEOUT)
        self.num_processes, self.index = self._state.num_processes, self._state.process_index

    def end_training(self) -> None:
        """Leave the group."""
        self._state.destroy_process_group()
