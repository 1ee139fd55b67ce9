"""How old the weights are that sampled a step's completions, and how far the student has moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tutelage.config.rollouts import LiveRollouts
from tutelage.data.types import Rollout
from tutelage.rollout.replica_sampler import ReplicaSampler
from tutelage.train.logprob_check import ratio_metrics, sampler_logprobs, staleness
from tutelage.train.micro_batch import MicroBatch

if TYPE_CHECKING:
    from tutelage.train.step import Step


def has_older(step: Step) -> bool:
    """Whether older weights may have sampled, with log-probabilities that are known."""
    is_stored = not isinstance(step.config.rollouts, LiveRollouts)
    has_versions = is_stored or isinstance(step.components.sampler, ReplicaSampler)
    return has_versions and step.source.has_logprobs


def age_of(step: Step, rollouts: Sequence[Rollout], number: int) -> int:
    """Steps since the weights were the oldest that sampled; logged where they are known.

    Args:
        step: takes the steps.
        rollouts: this process's.
        number: of the step that learns from them.
    """
    age = staleness(rollouts, number)
    if not isinstance(step.config.rollouts, LiveRollouts):
        age = int(step.ranks.max([age])[0])
        share = step.ranks.sum(step.source.num_stored) / step.ranks.sum(len(rollouts))
        step.checks |= {"stored_share": share, "staleness_steps": None}
    if has_older(step):
        step.checks["staleness_steps"] = age
    return age


def compare_with_sampler(
    step: Step,
    micro_batches: Sequence[MicroBatch],
    rollouts: Sequence[Rollout],
    age: int,
    log_p: Tensor | None = None,
) -> None:
    """Log how far the student has moved from the weights that sampled.

    Args:
        step: takes the steps.
        micro_batches: those that are compared.
        rollouts: of the step.
        age: `age_of` them.
        log_p: the student's log-probability of every row, where it is known.
    """
    if not has_older(step):
        return
    if not age:
        step.checks |= ratio_metrics(torch.zeros(0), torch.zeros(0), step.ranks)
        return
    batches = [micro_batch.batch for micro_batch in micro_batches]
    if log_p is None or step.components.student.stops:
        with step.clock.phase("score"), torch.no_grad():
            found = [step.student(batch, None, has_stops=False) for batch in batches]
            log_p = torch.cat([stats.log_p for stats in found])
    reported = sampler_logprobs(batches, step.named(rollouts))
    step.checks |= ratio_metrics(log_p, reported, step.ranks)
