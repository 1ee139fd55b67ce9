"""Sampling, grading and intervals: how good a model is on held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from tutelage.config.sampling import SamplingConfig
from tutelage.data.batch import micro_batches
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import DataError
from tutelage.evaluation.metrics import Interval
from tutelage.evaluation.scores import BY_NUMBER, Scores, Voting, score
from tutelage.grading.pool import in_parallel
from tutelage.models.student import Student
from tutelage.models.teacher import Teacher
from tutelage.rollout.request import RolloutRequest
from tutelage.rollout.sampler import Sampler

Grade: TypeAlias = Callable[[Prompt, str, bool], bool | None]
"""Verdict on a prompt's completion, given whether it was cut off; None if it can't be graded."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured; the intervals are None when the task has no grader."""

    mean_at_k: Interval | None
    pass_at_k: Interval | None
    num_problems: int
    num_samples: int
    rollouts: list[Rollout]
    is_correct: list[bool | None]
    """Verdict on each rollout; one that was cut off is right if it had marked its answer."""
    maj_at_k: Interval | None = None
    pass_at: dict[int, Interval] = field(default_factory=dict)
    """Unbiased pass@j for j = 1, 2, 4, … below k."""

    def summary(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        return Scores(
            self.num_problems,
            self.num_samples,
            self.mean_at_k,
            self.pass_at_k,
            self.maj_at_k,
            self.pass_at,
        ).summary()

    def rows(self) -> list[dict[str, Any]]:
        """One plain record a completion: prompt, sample, verdict, length."""
        return [
            {
                "prompt_id": r.prompt.id,
                "sample": r.sample,
                "is_correct": verdict,
                "is_truncated": r.is_truncated,
                "num_tokens": len(r.completion_ids),
            }
            for r, verdict in zip(self.rollouts, self.is_correct, strict=True)
        ]


def evaluate(
    sampler: Sampler,
    grade: Grade,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    seed: tuple[int, ...],
    progress: Callable[[int], None] | None = None,
    voting: Voting = BY_NUMBER,
) -> Evaluation:
    """mean@k, pass@k and maj@k over `prompts`, k = `sampling.num_samples`, with 95 % intervals.

    Args:
        sampler: the model that is measured, as it draws completions.
        grade: verdict on a decoded completion, such as `Task.grade`.
        prompts: held-out prompts, at least one.
        sampling: how completions are drawn.
        seed: names the draw.
        progress: called with the number of completions just finished.
        voting: what of a completion votes for maj@k, as `voting_of` the grader says.

    Returns:
        `Evaluation`, whose intervals treat the problems as clusters.

    Raises:
        DataError: there are no prompts.
    """
    if not prompts:
        raise DataError("there are no held-out prompts, got 0. Raise data.num_held_out.")
    request = RolloutRequest(prompts, sampling, seed, progress=progress)
    rollouts = sampler.sample(request).rollouts
    verdicts = grade_rollouts(grade, rollouts)
    answers = [voting.answer_of(r.graded_text, r.is_truncated) for r in rollouts]
    k = sampling.num_samples
    starts = range(0, len(rollouts), k)
    scores = score(
        [verdicts[start : start + k] for start in starts],
        [answers[start : start + k] for start in starts],
        voting,
    )
    return Evaluation(
        scores.mean_at_k,
        scores.pass_at_k,
        len(prompts),
        k,
        rollouts,
        verdicts,
        scores.maj_at_k,
        scores.pass_at,
    )


def grade_rollouts(grade: Grade, rollouts: Sequence[Rollout]) -> list[bool | None]:
    """Verdicts on completions, in their order; formulas are compared several at a time."""
    return in_parallel(lambda r: grade(r.prompt, r.graded_text, r.is_truncated), rollouts)


def held_out_reverse_kl(
    student: Student,
    teacher: Teacher,
    rollouts: Sequence[Rollout],
    pad_id: int,
    micro_batch_size: int,
    max_tokens: int = 0,
) -> list[float]:
    """Reverse KL of every rollout in nats, summed over its tokens."""
    order = sorted(range(len(rollouts)), key=lambda i: _length(rollouts[i]))
    by_length = [rollouts[i] for i in order]
    sums = torch.zeros(len(rollouts), dtype=torch.float64)
    with teacher.awake(), torch.no_grad():
        for batch in micro_batches(by_length, micro_batch_size, pad_id, max_tokens=max_tokens):
            here = batch.to(student.model.device)
            stats = student(here, teacher.view(teacher.read(here)))
            sums.index_add_(0, here.completion.cpu(), stats.reverse_kl.double().cpu())
    found = torch.zeros_like(sums)
    found[torch.tensor(order, dtype=torch.int64)] = sums
    return found.tolist()


def _length(rollout: Rollout) -> int:
    return len(rollout.prompt_ids) + len(rollout.completion_ids)


def mean_reverse_kl(rollouts: Sequence[Rollout], sums: Sequence[float]) -> float | None:
    """Mean over all completion tokens, nats; None without tokens or if infinite."""
    total, count = math.fsum(sums), sum(len(r.completion_ids) for r in rollouts)
    return total / count if count and math.isfinite(total) else None
