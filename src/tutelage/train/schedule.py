"""The learning rate of every step."""

from __future__ import annotations

import math

from tutelage.config.models import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Learning rate of update `step` (from 1): linear warm-up, then the schedule.

    The last update of `linear` and `cosine` still learns: they reach 0 one step later.
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    done = (step - 1 - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    match config.schedule:
        case "constant":
            return config.learning_rate
        case "linear":
            return config.learning_rate * (1 - done)
        case "cosine":
            return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
