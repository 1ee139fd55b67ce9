"""The optimizer of a run and its learning rate."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from tutelage.config.models import OptimizerConfig
from tutelage.models.optimizer import MasterWeights, make_optimizer, undecayed_weights


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


def build_optimizer(
    config: OptimizerConfig, student: nn.Module, masters: MasterWeights, folder: Path
) -> torch.optim.Optimizer:
    """The configured optimizer over the master weights, which copies them to the model.

    Args:
        config: kind, learning rate, betas, weight decay.
        student: names the weights that do not decay (norms, biases, embeddings).
        masters: what is updated.
        folder: for a state on disk.
    """
    betas = (config.beta1, config.beta2)
    rate, decay = config.learning_rate, config.weight_decay
    spared = set() if config.decay_all else {id(weight) for weight in undecayed_weights(student)}
    both = zip(masters.weights, masters.masters, strict=True)
    undecayed = [master for weight, master in both if id(weight) in spared]
    every = masters.masters
    optimizer = make_optimizer(config.kind, every, rate, betas, decay, folder, undecayed)
    masters.register_hook(optimizer)
    return optimizer
