"""One process of several that measure: runs the cases and notes what this process did.

Usage: measuring_rank.py MODELS OUT; the usual environment variables name rank, world size and
master.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator

from ranks import process_group
from tiny import tiny_config
from tutelage.data.types import Rollout
from tutelage.errors import ConfigError, TutelageError
from tutelage.models.teacher import Teacher
from tutelage.rollout.request import RolloutRequest
from tutelage.rollout.sampler import TransformersSampler
from tutelage.setup.shares import Shares
from tutelage.train import loop
from tutelage.train.loop import train
from tutelage.train.signals import Stop, StoppedError, listening

ONE_AT_A_TIME = {"sampling_batch_size": 1, "micro_batch_size": 1, "num_steps": 1}
"""Every process then computes what a single one does."""
CASES: dict[str, dict[str, Any]] = {
    "shared": {
        **ONE_AT_A_TIME,
        "evaluation": {"num_problems": 3, "num_samples": 2},
        "recording": {"every": 1, "num_prompts": 3, "num_rollouts": 3},
    },
    # Fewer problems than processes: one has none.
    "few": {
        **ONE_AT_A_TIME,
        "student": {"sharding": "fsdp2"},
        "evaluation": {"num_problems": 1, "num_samples": 2},
        "recording": {"every": 1, "num_prompts": 1, "num_rollouts": 1},
    },
    "stopped": {**ONE_AT_A_TIME, "evaluation": {"num_problems": 3, "num_samples": 2}},
}


def case_config(models: Path, out: Path, case: str, **changes: Any) -> Any:
    """Configuration of a case."""
    table = CASES[case] | changes
    table["student"] = {"model": str(models / "student")} | table.get("student", {})
    return tiny_config(models, out / case, **table)


class Notes:
    """What this process sampled and how often it read with the teacher."""

    def __init__(self) -> None:
        self.sampled: list[tuple[list[int], list[str]]] = []
        self.num_passes = 0
        self.before_sampling: Callable[[], None] = lambda: None
        sample, forward = TransformersSampler.sample, Teacher.forward

        def noted(sampler: TransformersSampler, request: RolloutRequest) -> list[Rollout]:
            self.sampled.append((list(request.seed), [one.id for one in request.prompts]))
            self.before_sampling()
            return sample(sampler, request)

        def counted(teacher: Teacher, batch: Any) -> Any:
            self.num_passes += 1
            return forward(teacher, batch)

        TransformersSampler.sample = noted  # type: ignore[method-assign]
        Teacher.forward = counted  # type: ignore[method-assign]

    def take(self) -> dict[str, Any]:
        found = {"sampled": self.sampled, "num_passes": self.num_passes}
        self.sampled, self.num_passes = [], 0
        return found


def interrupted(models: Path, out: Path, notes: Notes, index: int) -> list[Any]:
    """A signal reaches process 1 alone, in the first evaluation; then the same run goes on."""
    lines: list[str] = []
    if index == 1:
        notes.before_sampling = lambda: signal.raise_signal(signal.SIGINT)
    first = train(case_config(models, out, "stopped"), log=lines.append)
    notes.before_sampling = lambda: None
    logs = sorted(path.name for path in (out / "stopped").glob("*.jsonl"))
    again = train(case_config(models, out, "stopped"), log=lines.append)
    return [first.is_finished, first.step, logs if index == 0 else [], again.is_finished]


def ended(index: int, count: int, work: Callable[[], Any]) -> str:
    """How `work` ends in this process, if process 1 alone does what is in it."""
    stop = Stop(may_interrupt=False)
    shares = Shares(count, index, StoppedError, lambda: stop.interruptible(is_agreed=True))
    with listening(stop):
        try:
            shares.apart(lambda: work() if index == 1 else None)
            return "went on"
        except (TutelageError, StoppedError, ValueError) as error:
            return f"{type(error).__name__}: {error}"


def endings(index: int, count: int) -> dict[str, str]:
    def refused() -> None:
        raise ConfigError("no such thing.")

    def failed() -> None:
        raise ValueError("a\nb")

    def signalled() -> None:
        signal.raise_signal(signal.SIGTERM)

    kinds = {"refused": refused, "failed": failed, "signalled": signalled, "done": lambda: None}
    return {name: ended(index, count, work) for name, work in kinds.items()}


def main(models: Path, out: Path) -> None:
    torch.set_num_threads(1)
    with process_group() as index, ExitStack() as stack:
        accelerator = Accelerator(cpu=True)
        stack.enter_context(mock.patch.object(loop, "open_accelerator", return_value=accelerator))
        stack.enter_context(mock.patch.object(accelerator, "end_training"))
        notes = Notes()
        found: dict[str, Any] = {}
        for case in ("shared", "few"):
            train(case_config(models, out, case), log=lambda _: None)
            found[case] = notes.take()
        found["stopped"] = interrupted(models, out, notes, index)
        found["endings"] = endings(index, torch.distributed.get_world_size())
        (out / f"rank{index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
