"""Benchmarks in chunks of problems: complete, grade, save, score; from where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from tutelage.data.types import Prompt
from tutelage.errors import DataError
from tutelage.evaluation.evaluate import Grade
from tutelage.evaluation.folder import EvaluationFolder, Row
from tutelage.evaluation.scores import BY_NUMBER, Scores, Voting, score
from tutelage.grading.pool import in_parallel


@dataclass(frozen=True)
class Completion:
    """One sampled completion, from a model here or from a server."""

    prompt: Prompt
    sample: int
    text: str
    is_truncated: bool
    """True when it was cut off at the length limit."""
    num_tokens: int | None = None
    """Length in tokens, the end included; None when a server does not say."""
    thought: str = ""
    """The mark of a thought that the prompt ends with; see `Rollout.thought`."""


Complete: TypeAlias = Callable[[Sequence[Prompt], int], list[Completion]]
"""Draws all samples of some problems, at most so many tokens each."""


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

    def fingerprint(self) -> str:
        """A hash of problems, reference answers and order."""
        content = json.dumps(
            [(p.id, p.content, p.answer, *([p.tools] if p.tools else [])) for p in self.prompts]
        )
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Result:
    """One benchmark's scores and all its samples."""

    name: str
    scores: Scores
    rows: list[Row] = field(repr=False)
    """Samples in the order of the problems."""

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
        }


def run_benchmark(
    benchmark: Benchmark,
    complete: Complete,
    num_samples: int,
    chunk_size: int,
    folder: EvaluationFolder | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Measure a model on one benchmark, continuing what the folder holds.

    Chunks are the same whatever was saved before, so a continued evaluation decodes the same
    batches as an unbroken one.

    Args:
        benchmark: its problems, at least one.
        complete: draws completions.
        num_samples: completions of each problem, k.
        chunk_size: problems completed and saved together.
        folder: where rows are saved; None keeps them in memory only.
        progress: called with problems done and problems in all.

    Returns:
        Scores and rows.

    Raises:
        DataError: there are no problems, or a completion is missing.
    """
    if not benchmark.prompts:
        raise DataError(f"{benchmark.name} has no problems, got 0. Check its file.")
    rows: dict[str, list[Row]] = {}
    for chunk in _chunks(benchmark.prompts, chunk_size):
        ids = [prompt.id for prompt in chunk]
        found = folder.find(benchmark.name, ids, num_samples) if folder else None
        if found is None:
            completions = complete(chunk, benchmark.max_new_tokens)
            found = in_parallel(partial(_row, benchmark), completions)
            _refuse_gaps(found, ids, num_samples)
            if folder:
                folder.append(found)
        for row in found:
            rows.setdefault(row["prompt_id"], []).append(row)
        if progress:
            progress(len(rows), len(benchmark.prompts))
    groups = [rows[prompt.id] for prompt in benchmark.prompts]
    verdicts = [[row["is_correct"] for row in group] for group in groups]
    answers = [[row["answer"] for row in group] for group in groups]
    scores = score(verdicts, answers, benchmark.voting)
    return Result(benchmark.name, scores, [r for g in groups for r in g])


def _chunks(prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Neighbours in length share a chunk, so that little of a batch is padding."""
    ordered = sorted(prompts, key=lambda prompt: len(json.dumps(prompt.content)))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _row(benchmark: Benchmark, completion: Completion) -> Row:
    text, is_truncated = completion.thought + completion.text, completion.is_truncated
    return {
        "benchmark": benchmark.name,
        "prompt_id": completion.prompt.id,
        "sample": completion.sample,
        "is_correct": benchmark.grade(completion.prompt, text, is_truncated),
        "is_truncated": is_truncated,
        "num_tokens": completion.num_tokens,
        "answer": benchmark.voting.answer_of(text, is_truncated),
        "gold": completion.prompt.answer,
        "completion": completion.text,
    }


def _refuse_gaps(rows: Sequence[Row], prompt_ids: Sequence[str], num_samples: int) -> None:
    """Every sample once and in order; nothing is ever filled in."""
    expected = [(prompt_id, sample) for prompt_id in prompt_ids for sample in range(num_samples)]
    if [(row["prompt_id"], row["sample"]) for row in rows] != expected:
        raise DataError(
            f"{len(rows)} completions came back for {len(expected)} asked for, or in another "
            "order. Nothing of this chunk was saved; run the command again."
        )
