"""Evaluations side by side: paired differences of mean@k, benchmark by benchmark."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tutelage.errors import RunError
from tutelage.evaluation.metrics import Interval, clustered_interval, paired_difference
from tutelage.report import text

_DECISIVE = ("temperature", "top_p", "chat", "thinking", "grader")
"""Settings that must agree before two evaluations can be compared."""


_INTERVALS = "Intervals are 95 %, with the problems as the unit."


class _Row(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)
    benchmark: str
    prompt_id: str
    sample: int = Field(ge=0)
    is_correct: bool | None


class _Benchmark(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")
    max_new_tokens: int
    conversations: dict[str, Any] | None = None
    """Limits of conversations."""


@dataclass(frozen=True)
class EvaluationRecord:
    """One evaluation folder in memory."""

    name: str
    settings: dict[str, Any]
    scores: dict[str, dict[str, float]]
    """Share of right samples of each problem, by benchmark and problem."""


@dataclass(frozen=True)
class BenchmarkDifference:
    """mean@k of an evaluation minus that of the first one, in [-1, 1]."""

    benchmark: str
    evaluation: str
    baseline: str
    num_problems: int
    """Problems that both measured."""
    interval: Interval


@dataclass(frozen=True)
class EvaluationComparison:
    """Several evaluations side by side; the first is the baseline."""

    names: tuple[str, ...]
    means: dict[str, tuple[Interval | None, ...]]
    """mean@k by benchmark, one for each evaluation; None where it was not measured."""
    settings: dict[str, tuple[str | None, ...]]
    """Settings that differ."""
    differences: tuple[BenchmarkDifference, ...]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The comparison as plain JSON values."""
        return asdict(self)

    def as_text(self) -> str:
        """The comparison as tables for a terminal."""
        return text.tables(self.tables(), self.notes)

    def tables(self) -> list[text.Table]:
        """mean@k with the differences, and what was set differently."""
        rows = [["mean@k", *self.names]]
        rows += [[name, *map(text.interval, values)] for name, values in self.means.items()]
        lines = [_difference_line(difference) for difference in self.differences]
        found = [text.Table("Accuracy", rows, lines, _INTERVALS)]
        if self.settings:
            cells = [
                [key, *(text.MISSING if v is None else text.visible(v, 60) for v in values)]
                for key, values in self.settings.items()
            ]
            found.append(text.Table("Config differences", [["", *self.names], *cells]))
        return found


def is_evaluation(folder: Path) -> bool:
    """Whether a folder was written by `tutelage eval --suite`."""
    return (folder / "settings.json").is_file() and (folder / "rows.jsonl").is_file()


def compare_evaluations(folders: Sequence[Path]) -> EvaluationComparison:
    """Compare evaluation folders with the first one as the baseline.

    Raises:
        RunError: fewer than two folders, or one that is damaged.
    """
    if len(folders) < 2:
        raise RunError(f"A comparison needs at least two folders, got {len(folders)}.")
    short = [folder.resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else list(map(str, folders))
    records = [_read(path, text.visible(n, 120)) for path, n in zip(folders, names, strict=True)]
    benchmarks = dict.fromkeys(name for record in records for name in record.scores)
    differences, notes = [], []
    for record in records[1:]:
        for benchmark in benchmarks:
            found = _difference(benchmark, records[0], record)
            if isinstance(found, str):
                notes.append(found)
            else:
                differences.append(found)
    flat = [dict(text.flatten(record.settings)) for record in records]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    values = {key: tuple(settings.get(key) for settings in flat) for key in keys}
    return EvaluationComparison(
        tuple(record.name for record in records),
        {b: tuple(_mean(record, b) for record in records) for b in benchmarks},
        {key: row for key, row in values.items() if len(set(row)) > 1},
        tuple(differences),
        tuple(notes),
    )


def _difference(
    benchmark: str, baseline: EvaluationRecord, record: EvaluationRecord
) -> BenchmarkDifference | str:
    """The paired difference, or why there is none."""
    ours, theirs = record.scores.get(benchmark, {}), baseline.scores.get(benchmark, {})
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return f"{record.name} and {baseline.name} share no graded problems of {benchmark}."
    pair = (record.settings, baseline.settings)
    unlike = [key for key in _DECISIVE if pair[0].get(key) != pair[1].get(key)]
    limits = [_limits(settings["benchmarks"][benchmark]) for settings in pair]
    keys = dict.fromkeys(key for one in limits for key in one)
    unlike += [key for key in keys if limits[0].get(key) != limits[1].get(key)]
    if unlike:
        return (
            f"{record.name} measured {benchmark} otherwise ({', '.join(unlike)}): "
            "no paired difference."
        )
    interval = paired_difference([ours[p] for p in shared], [theirs[p] for p in shared])
    return BenchmarkDifference(benchmark, record.name, baseline.name, len(shared), interval)


def _limits(benchmark: dict[str, Any]) -> dict[str, Any]:
    """How long completions, or conversations, could become."""
    length = {"max_new_tokens": benchmark["max_new_tokens"]}
    return length | (benchmark.get("conversations") or {})


def _mean(record: EvaluationRecord, benchmark: str) -> Interval | None:
    scores = record.scores.get(benchmark)
    return clustered_interval(list(scores.values())) if scores else None


def _read(folder: Path, name: str) -> EvaluationRecord:
    try:
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        settings.pop("started", None)  # no setting: when it was begun
        lines = (folder / "rows.jsonl").read_bytes().split(b"\n")
        verdicts: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
        for number, line in enumerate(lines[:-1], start=1):
            row = _parse_row(line, folder, number)
            if row.is_correct is not None:
                verdicts[row.benchmark][row.prompt_id].append(row.is_correct)
        for benchmark in verdicts:
            _Benchmark.model_validate(settings["benchmarks"][benchmark])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, RunError):
            raise
        reason = " ".join(str(error).split())[:150]
        raise RunError(f"{folder} is not a readable evaluation ({reason}).") from None
    return EvaluationRecord(
        name,
        settings,
        {
            benchmark: {p: sum(group) / len(group) for p, group in problems.items()}
            for benchmark, problems in verdicts.items()
        },
    )


def _parse_row(line: bytes, folder: Path, number: int) -> _Row:
    try:
        return _Row.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]["msg"]
        raise RunError(f"{folder / 'rows.jsonl'}, line {number} is damaged ({first}).") from None


def _difference_line(difference: BenchmarkDifference) -> str:
    return (
        f"{difference.benchmark}: {difference.evaluation} − {difference.baseline}: "
        f"{text.signed_interval(difference.interval)}, paired over "
        f"{difference.num_problems} problems"
    )
