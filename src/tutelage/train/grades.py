"""Grades of a step's completions: verdicts for weightings, rewards for policy gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from tutelage.config.method import GRPOObjective
from tutelage.config.schema import Config
from tutelage.core.policy import is_uniform
from tutelage.data.tasks import Task
from tutelage.data.types import Rollout
from tutelage.evaluation.benchmark import grade_rollouts
from tutelage.train.distributed import Ranks


@dataclass(frozen=True)
class Grades:
    """Of every completion of a step, of all processes; None where the task cannot grade one."""

    verdicts: Sequence[bool | None]
    """Whether it is right, or a conversation succeeded."""
    rewards: Sequence[float | None]
    """1 or 0 for a right or wrong answer; of a conversation, the environment's score."""

    def metrics(self, config: Config) -> dict[str, float]:
        """Mean reward, and the share of prompts whose completions all have the same reward.

        Nothing where the objective takes no rewards.
        """
        if not isinstance(config.objective, GRPOObjective):
            return {}
        rewards = torch.tensor([float(r or 0.0) for r in self.rewards], dtype=torch.float64)
        same = is_uniform(rewards, config.sampling.num_samples)
        return {
            "reward_mean": float(rewards.mean()),
            "no_signal_share": float(same.double().mean()),
        }


def grade_step(
    task: Task, rollouts: Sequence[Rollout], share: Sequence[int], ranks: Ranks
) -> Grades:
    """Grade this process's completions, several at a time, and gather all grades of the step.

    Args:
        task: grades.
        rollouts: this process's.
        share: which of the step's completions they are.
        ranks: the processes.
    """
    verdicts = grade_rollouts(task.grade, rollouts)
    rewards = [_reward(r, verdict) for r, verdict in zip(rollouts, verdicts, strict=True)]
    tables = (
        ranks.by_completion([torch.nan if x is None else float(x) for x in values], share)
        for values in (verdicts, rewards)
    )
    every = [[None if x != x else x for x in table] for table in tables]
    return Grades([None if x is None else bool(x) for x in every[0]], every[1])


GradeStep: TypeAlias = Callable[[Task, Sequence[Rollout], Sequence[int], Ranks], Grades]
"""What grades the completions of a step, with the arguments of `grade_step`."""


def _reward(rollout: Rollout, verdict: bool | None) -> float | None:
    if rollout.conversation is not None:
        return float(rollout.conversation.outcome.score)
    return None if verdict is None else float(verdict)
