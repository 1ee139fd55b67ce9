"""One way to measure a model on a benchmark: generate, grade, save, score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any, TypeAlias, TypeVar

from tutelage.config.sampling import SamplingConfig
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import DataError
from tutelage.evaluation.folder import EvaluationFolder, Row
from tutelage.evaluation.metrics import clustered_interval
from tutelage.evaluation.scores import BY_NUMBER, Scores, Voting, score
from tutelage.grading.pool import in_parallel
from tutelage.rollout.request import Agent, RolloutRequest
from tutelage.rollout.sampler import Sampler
from tutelage.setup.shares import ALONE, Shares

T = TypeVar("T")
Grade: TypeAlias = Callable[[Prompt, str, bool], bool | None]
"""Verdict on a prompt's completion, given whether it was cut off; None if it can't be graded."""
Progress: TypeAlias = Callable[[int], None]
"""Called with the number of completions just finished."""


@dataclass(frozen=True)
class Benchmark:
    """Problems with the way they are graded."""

    name: str
    prompts: tuple[Prompt, ...] = field(repr=False)
    grade: Grade = field(repr=False)
    max_new_tokens: int
    grader: str = ""
    """What `grade` is called in the settings."""
    voting: Voting = field(default=BY_NUMBER, repr=False)
    agent: Agent | None = field(default=None, repr=False)
    """Where problems are conversations; None where they have single answers."""

    def fingerprint(self) -> str:
        """A hash of problems, reference answers and order."""
        content = json.dumps(
            [(p.id, p.content, p.answer, *([p.tools] if p.tools else [])) for p in self.prompts]
        )
        return hashlib.sha256(content.encode()).hexdigest()[:16]


Generate: TypeAlias = Callable[[Benchmark, Sequence[Prompt], Progress], list[Rollout]]
"""All samples of some of a benchmark's prompts, in their order."""


@dataclass(frozen=True)
class Result:
    """One benchmark's scores and all its samples."""

    name: str
    scores: Scores
    rows: list[Row] = field(repr=False)
    """One record a sample, in the order of the problems."""
    rollouts: list[Rollout] = field(default_factory=list, repr=False, compare=False)
    """The completions of the rows, of several processes this one's; empty where a folder keeps the
    rows."""

    @property
    def is_correct(self) -> list[bool | None]:
        """Verdict on each sample; one that was cut off is graded on an answer it had marked."""
        return [row["is_correct"] for row in self.rows]

    def summary(self) -> dict[str, Any]:
        """Scores and lengths as plain JSON values."""
        lengths = [row["num_tokens"] for row in self.rows if row["num_tokens"] is not None]
        count = len(self.rows)
        return {
            "benchmark": self.name,
            **self.scores.summary(),
            "truncated_share": sum(row["is_truncated"] for row in self.rows) / count,
            "no_answer_share": sum(row["answer"] is None for row in self.rows) / count,
            "completion_length_mean": sum(lengths) / len(lengths) if lengths else None,
            **self._of_conversations(),
        }

    def _of_conversations(self) -> dict[str, Any]:
        """Scores of conversations; nothing for single answers.

        Among the details, floats in [0, 1] are shares, which have 95 % intervals like the score;
        other numbers, such as counts, have plain means. A detail that some rows lack has no mean,
        but the number of rows that have it.
        """
        if not all("score" in row for row in self.rows):
            return {}
        shares = {"score": self._share([float(row["score"]) for row in self.rows])}
        counts, partial_details = {}, {}
        for name in sorted(set().union(*(row["details"] for row in self.rows))):
            found = [row["details"][name] for row in self.rows if name in row["details"]]
            if any(type(value) not in (float, int) for value in found):
                continue
            if len(found) < len(self.rows):
                partial_details[name] = len(found)
            elif all(type(value) is float and 0 <= value <= 1 for value in found):
                shares[name] = self._share(found)
            else:
                counts[name] = fmean(found)
        return {
            "conversations": shares,
            "counts": counts,
            "partial_details": partial_details,
            "turns_mean": fmean(row["turns"] for row in self.rows),
            "tool_errors_mean": fmean(row["tool_errors"] for row in self.rows),
        }

    def _share(self, values: Sequence[float]) -> list[float]:
        """Mean, and its interval over problems."""
        k = self.scores.num_samples
        by_problem = [fmean(values[i : i + k]) for i in range(0, len(values), k)]
        interval = clustered_interval(by_problem)
        return [interval.value, interval.low, interval.high]


def generate_with(sampler: Sampler, sampling: SamplingConfig, seed: tuple[int, ...]) -> Generate:
    """Completions from a sampler; `seed` names the random numbers."""

    def generate(
        benchmark: Benchmark, prompts: Sequence[Prompt], progress: Progress
    ) -> list[Rollout]:
        limited = replace(sampling, max_new_tokens=benchmark.max_new_tokens)
        agent = benchmark.agent
        request = RolloutRequest(prompts, limited, seed, progress=progress, agent=agent)
        return sampler.sample(request)

    return generate


def run_benchmark(
    benchmark: Benchmark,
    generate: Generate,
    num_samples: int,
    chunk_size: int | None = None,
    folder: EvaluationFolder | None = None,
    progress: Progress = lambda count: None,
    shares: Shares = ALONE,
) -> Result:
    """Measure a model on one benchmark, continuing what the folder holds.

    Chunks are the same whatever was saved before, so a continued evaluation decodes the same
    batches as an unbroken one.

    Args:
        benchmark: its problems, at least one.
        generate: a model here (`generate_with`) or on a server (`Server.complete`).
        num_samples: completions of each problem, k.
        chunk_size: problems completed and saved together, neighbors in length; None takes all of
            them in their order.
        folder: where rows are saved; None keeps them and the completions in memory only.
        progress: called with the number of completions just finished.
        shares: the processes that complete and grade the problems of each chunk together; the main
            one alone opens the folder.

    Returns:
        Scores and rows in the main process, neither in the others; of the completions, in each
        process those of its share of the problems.

    Raises:
        DataError: there are no problems, or a completion is missing.
    """
    if not benchmark.prompts:
        raise DataError(f"{benchmark.name} has no problems, got 0. Check its file.")
    groups: dict[int, list[Row]] = {}
    rollouts: dict[int, list[Rollout]] = {}
    for chunk in _chunks(benchmark.prompts, chunk_size):
        prompts = [benchmark.prompts[i] for i in chunk]
        rows = _saved(folder, benchmark, prompts, num_samples, shares)
        if shares.told(rows is not None):
            progress(len(rows or []))
        else:
            mine = shares.mine(len(chunk))
            own = [prompts[i] for i in mine]
            generated, found = shares.apart(
                partial(_completed, benchmark, generate, own, num_samples, progress)
            )
            collected = shares.collect(_grouped(mine, found, num_samples))
            rows = [row for group in collected for row in group]
            if folder:
                shares.in_main(partial(folder.append, rows))
            else:
                rollouts |= _grouped([chunk[i] for i in mine], generated, num_samples)
        groups |= _grouped(chunk, rows or [], num_samples)
    ordered = [groups[i] for i in sorted(groups)]
    scores = shares.in_main(partial(_scores, benchmark, ordered))
    if scores is None:
        scores, ordered = Scores(len(benchmark.prompts), num_samples), []
    kept = [rollout for i in sorted(rollouts) for rollout in rollouts[i]]
    return Result(benchmark.name, scores, [row for group in ordered for row in group], kept)


def _saved(
    folder: EvaluationFolder | None,
    benchmark: Benchmark,
    prompts: Sequence[Prompt],
    num_samples: int,
    shares: Shares,
) -> list[Row] | None:
    """The rows of a chunk that the folder holds, in the main process."""
    if folder is None:
        return None
    ids = [prompt.id for prompt in prompts]
    return shares.in_main(partial(folder.find, benchmark.name, ids, num_samples))


def _completed(
    benchmark: Benchmark,
    generate: Generate,
    prompts: Sequence[Prompt],
    num_samples: int,
    progress: Progress,
) -> tuple[list[Rollout], list[Row]]:
    """Completions of some problems, and their rows."""
    generated = generate(benchmark, prompts, progress)
    rows = in_parallel(partial(_row, benchmark), generated)
    _refuse_gaps(rows, [prompt.id for prompt in prompts], num_samples)
    return generated, rows


def _scores(benchmark: Benchmark, groups: Sequence[Sequence[Row]]) -> Scores:
    return score(
        [[row["is_correct"] for row in group] for group in groups],
        [[row["answer"] for row in group] for group in groups],
        benchmark.voting if benchmark.agent is None else None,
    )


def grade_rollouts(grade: Grade, rollouts: Sequence[Rollout]) -> list[bool | None]:
    """Verdicts on completions, in their order; formulas are compared several at a time."""
    return in_parallel(partial(_verdict, grade), rollouts)


def _verdict(grade: Grade, rollout: Rollout) -> bool | None:
    """The environment's verdict on a conversation, the grader's on a single answer."""
    if rollout.conversation is not None:
        return rollout.conversation.outcome.is_success
    return grade(rollout.prompt, rollout.graded_text, rollout.is_truncated)


def _chunks(prompts: Sequence[Prompt], size: int | None) -> list[list[int]]:
    """Indices of problems; neighbors in length share a chunk, so that little of a batch is padding.

    Without a size: all of them, in their order.
    """
    if size is None:
        return [list(range(len(prompts)))]
    ordered = sorted(range(len(prompts)), key=lambda i: len(json.dumps(prompts[i].content)))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def _grouped(chunk: Sequence[int], found: Sequence[T], num_samples: int) -> dict[int, list[T]]:
    """The samples of each problem of a chunk, by the problem's index."""
    return {
        index: list(found[place * num_samples : (place + 1) * num_samples])
        for place, index in enumerate(chunk)
    }


def _row(benchmark: Benchmark, rollout: Rollout) -> Row:
    text, is_truncated = rollout.graded_text, rollout.is_truncated
    return {
        "benchmark": benchmark.name,
        "prompt_id": rollout.prompt.id,
        "sample": rollout.sample,
        "is_correct": _verdict(benchmark.grade, rollout),
        "is_truncated": is_truncated,
        "num_tokens": rollout.num_tokens,
        "answer": benchmark.voting.answer_of(text, is_truncated),
        "gold": rollout.prompt.answer,
        "completion": rollout.transcript,
        **_measures(rollout),
    }


def _measures(rollout: Rollout) -> Row:
    """What the environment says of a conversation; nothing of a single answer."""
    found = rollout.conversation
    if found is None:
        return {}
    return {
        "turns": found.num_turns,
        "tool_errors": found.num_tool_errors,
        "score": found.outcome.score,
        "details": found.outcome.details,
    }


def _refuse_gaps(rows: Sequence[Row], prompt_ids: Sequence[str], num_samples: int) -> None:
    """Every sample once and in order; nothing is ever filled in."""
    expected = [(prompt_id, sample) for prompt_id in prompt_ids for sample in range(num_samples)]
    if [(row["prompt_id"], row["sample"]) for row in rows] != expected:
        raise DataError(
            f"{len(rows)} completions came back for {len(expected)} asked for, or in another "
            "order. Nothing of this chunk was saved; run the command again."
        )
