"""Single steps taken under a magnifying glass: gradients and kept rows instead of new weights."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tiny import tiny_config
from tutelage.core import TokenSelection
from tutelage.data.types import Rollout
from tutelage.setup.components import Components, build_components
from tutelage.teachers.group import TeacherGroup
from tutelage.train.distributed import StepRows
from tutelage.train.step import Step

RULES: dict[str, dict[str, Any]] = {
    "all": {"rule": "all"},
    "soft_or": {"rule": "soft_or", "keep": 0.5},
    "entropy": {"rule": "entropy", "keep": 0.5},
    "entropy_sample": {"rule": "entropy_sample", "keep": 0.3},
    "q3": {"rule": "q3", "keep": 0.1},
    "random": {"rule": "random", "keep": 0.29},
    "divergence": {"rule": "divergence", "keep": 0.2, "scope": "batch"},
    "bottom": {"rule": "bottom", "keep": 0.5},
    "probability_gap": {"rule": "probability_gap", "keep": 0.3, "b": 0.5},
    "extreme_advantage": {"rule": "extreme_advantage", "keep": 0.2},
    "influence": {"rule": "influence", "keep": 0.3, "combine": "soft_and"},
    "lowest_logprob": {"rule": "lowest_logprob", "keep": 0.2},
}


class Recorder(torch.optim.SGD):
    """Keeps the gradients of the last step and changes no weight."""

    gradients: list[Tensor]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for p in self.param_groups[0]["params"]
        ]


@dataclass
class Taken:
    """What one step did."""

    metrics: dict[str, Any]
    gradients: list[Tensor]
    kept: set[tuple[int, int]] = field(default_factory=set)
    """(completion, position) of every kept row."""
    components: Components | None = None


def take_step(
    models: Path, rollouts: Sequence[Rollout], dtype: torch.dtype, **changes: Any
) -> Taken:
    """Step 1 of a tiny run, on the given rollouts."""
    changes = {"optimizer": {"learning_rate": 1.0, "max_grad_norm": 0}} | changes
    config = tiny_config(models, Path("unused"), **changes)
    components = build_components(config)
    components.student.model.to(dtype)
    teacher = components.teacher
    for one in teacher.teachers.values() if isinstance(teacher, TeacherGroup) else [teacher]:
        one.model.to(dtype)
    recorder = Recorder(list(components.student.parameters()), lr=1.0)
    accelerator = Accelerator(cpu=True)
    student, optimizer = accelerator.prepare(components.student, recorder)
    step = Watched(config, components, accelerator, student, optimizer)
    step.rollouts = list(rollouts)
    metrics = step.take(1)
    return Taken(metrics, recorder.gradients, step.kept, components)


class Watched(Step):
    """A step on rollouts that were written before, which remembers what it chose."""

    rollouts: list[Rollout]
    kept: set[tuple[int, int]]

    def generate(self, step: int) -> list[Rollout]:
        return self.rollouts

    def choose(self, gathered: StepRows, step: int) -> TokenSelection:
        chosen = super().choose(gathered, step)
        pairs = zip(gathered.completion.tolist(), gathered.position.tolist(), strict=True)
        names = list(pairs)
        self.kept = {names[row] for row in chosen.rows.tolist()}
        return chosen


def ragged_rollouts(components: Components, count: int = 8, seed: int = 0) -> list[Rollout]:
    """Completions of 1 to 9 random ids, two for each prompt."""
    rng = random.Random(seed)
    prompts = components.task.prompts(0, count // 2, 0)
    rollouts = []
    for i in range(count):
        prompt = prompts[i // 2]
        ids = components.tokenizer(prompt.content).input_ids
        # The first length is always 1: a completion of a single token is a row too.
        length = 1 if i == 0 else rng.randint(2, 9)
        completion = tuple(rng.randrange(components.student.vocab_size) for _ in range(length))
        rollouts.append(Rollout(prompt, i % 2, tuple(ids), completion))
    return rollouts


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """‖found − expected‖ / ‖expected‖ over all parameters together."""
    pairs = list(zip(found, expected, strict=True))
    size = sum(float(b.double().square().sum()) for _, b in pairs)
    error = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return math.sqrt(error / size)
