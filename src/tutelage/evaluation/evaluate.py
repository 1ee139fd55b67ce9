"""Sampling, grading and intervals: how good a model is on held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from tutelage.data.batch import micro_batches
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import DataError
from tutelage.evaluation.metrics import (
    Interval,
    clustered_interval,
    problem_means,
    problem_pass_rates,
)
from tutelage.models.sampling import SamplingConfig, sample
from tutelage.models.student import Student
from tutelage.models.teacher import Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Grade: TypeAlias = Callable[[Prompt, str], bool | None]


@dataclass(frozen=True)
class Evaluation:
    """What was measured; the intervals are None when the task has no grader."""

    mean_at_k: Interval | None
    pass_at_k: Interval | None
    num_problems: int
    num_samples: int
    rollouts: list[Rollout]
    is_correct: list[bool | None]
    """Verdict on each rollout; a truncated completion is wrong."""

    def summary(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        record: dict[str, Any] = {
            "k": self.num_samples,
            "num_problems": self.num_problems,
            "num_samples": self.num_samples,
        }
        for name in ("mean_at_k", "pass_at_k"):
            interval: Interval | None = self.__dict__[name]
            record[name] = None if interval is None else interval.value
            record[f"{name}_low"] = None if interval is None else interval.low
            record[f"{name}_high"] = None if interval is None else interval.high
        return record

    def rows(self) -> list[dict[str, Any]]:
        """One plain record a completion: prompt, sample, verdict."""
        return [
            {"prompt_id": r.prompt.id, "sample": r.sample, "is_correct": verdict}
            for r, verdict in zip(self.rollouts, self.is_correct, strict=True)
        ]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    grade: Grade,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    seed: tuple[int, ...],
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """mean@k and pass@k over `prompts`, k = `sampling.num_samples`, with 95 % intervals.

    Args:
        model: causal language model.
        tokenizer: its tokenizer.
        grade: verdict on a decoded completion, None if it can't be graded, e.g. `Task.grade`.
        prompts: held-out prompts, at least one.
        sampling: how completions are drawn.
        seed: names the draw.
        batch_size: completions decoded at the same time.
        progress: called with the number of completions just finished.

    Returns:
        `Evaluation`, whose intervals treat the problems as clusters.

    Raises:
        DataError: there are no prompts.
    """
    if not prompts:
        raise DataError("there are no held-out prompts, got 0. Raise data.num_held_out.")
    rollouts = sample(model, tokenizer, prompts, sampling, seed, batch_size, progress)
    verdicts = [_verdict(grade, rollout) for rollout in rollouts]
    k = sampling.num_samples
    graded = _by_problem(verdicts, k)
    return Evaluation(
        clustered_interval(problem_means(graded)) if graded else None,
        clustered_interval(problem_pass_rates(graded, k)) if graded else None,
        len(prompts),
        k,
        rollouts,
        verdicts,
    )


def _verdict(grade: Grade, rollout: Rollout) -> bool | None:
    verdict = grade(rollout.prompt, rollout.text)
    return False if verdict and rollout.is_truncated else verdict


def _by_problem(verdicts: list[bool | None], k: int) -> list[list[bool]]:
    """Verdicts of each problem that can be graded."""
    groups = [verdicts[start : start + k] for start in range(0, len(verdicts), k)]
    return [[bool(v) for v in group] for group in groups if None not in group]


def held_out_reverse_kl(
    student: Student,
    teacher: Teacher,
    rollouts: Sequence[Rollout],
    pad_id: int,
    micro_batch_size: int,
) -> float | None:
    """Mean reverse KL in nats over all completion tokens; None without tokens or if infinite."""
    total, count = 0.0, 0
    with teacher.awake(), torch.no_grad():
        for batch in micro_batches(rollouts, micro_batch_size, pad_id):
            here = batch.to(student.model.device)
            stats = student(here, teacher.view(teacher.read(here)))
            total += float(stats.reverse_kl.double().sum())
            count += batch.num_rows
    return total / count if count and math.isfinite(total) else None
