"""Runs side by side: what they reached, what was set differently, and paired differences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tutelage.errors import RunError
from tutelage.evaluation.metrics import Interval, paired_difference
from tutelage.report import text
from tutelage.report.records import EvaluationRecord, RunRecord, read_run

_LOSS_KEYS = ("objective.", "selection.", "weighting.", "renormalize", "data.")
"""Keys, or tables of keys, that decide what a run's loss is the mean of, beside its teachers'."""
_TEACHER_KEYS = (
    "model", "quantization", "vocabulary", "stop_token", "num_logprobs", "context", "weights",
    "ema_decay",
)  # fmt: skip
"""Keys of a teacher that decide what the student is compared with, and so what a divergence is."""
_DEFAULTS = {"quantization": "none", "vocabulary": "same"}
"""What a teacher has whose kind lacks the key: a hidden_server says what a local one does."""


@dataclass(frozen=True)
class RunSummary:
    """Where one run ended. A value that it did not measure is None, and so is one that means
    something else in another of the runs."""

    name: str
    num_steps: int
    """Steps in its metrics."""
    num_rows: int
    """Completion tokens scored over the run."""
    num_kept: int
    """Completion tokens trained on over the run."""
    seconds: float
    loss: float | None
    reverse_kl_nats: float | None
    entropy_nats: float | None
    accuracy: Interval | None
    """mean@k of the student at its last evaluation."""
    pass_at_k: float | None
    held_out_reverse_kl_nats: float | None
    success_share: float | None = None
    """Of the conversations of the last step, as all that follow."""
    score_mean: float | None = None
    turns_mean: float | None = None
    tokens_per_turn: float | None = None
    tool_error_share: float | None = None


@dataclass(frozen=True)
class Difference:
    """Accuracy of a run minus that of the first run on the problems they share, in [-1, 1]."""

    run: str
    baseline: str
    num_problems: int
    """Problems that both runs evaluated."""
    interval: Interval


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side; the first is the baseline."""

    runs: tuple[RunSummary, ...]
    config: dict[str, tuple[str | None, ...]]
    """Dotted configuration keys that differ, with one value per run; None where it is not set."""
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The comparison as plain JSON values."""
        return asdict(self)

    def as_text(self) -> str:
        """The comparison as aligned tables for a terminal."""
        return text.tables(self.tables(), self.notes)

    def tables(self) -> list[text.Table]:
        """What the runs reached with the differences, and what was set differently."""
        lines = [_difference_line(difference) for difference in self.differences]
        found = [text.Table("Final metrics", [*_summary_rows(self.runs)], lines)]
        if self.config:
            found.append(text.Table("Config differences", [*_config_rows(self)]))
        return found


def compare_runs(runs: Sequence[Path]) -> Comparison:
    """Compare run folders with the first one as the baseline.

    Args:
        runs: at least two run folders with metrics.

    Returns:
        Final metrics, differing configuration keys, and the paired difference in accuracy of
        every run that shares evaluated problems with the baseline.

    Raises:
        RunError: fewer than two runs, or a folder that `read_run` refuses.
    """
    return compare_records([read_run(run) for run in runs])


def compare_records(records: Sequence[RunRecord]) -> Comparison:
    """`compare_runs` of runs that were read."""
    if len(records) < 2:
        raise RunError(f"A comparison needs at least two run folders, got {len(records)}.")
    names = names_of(records)
    notes = [
        f"{name}: {note}"
        for name, record in zip(names, records, strict=True)
        for note in record.notes
    ]
    differences = []
    for name, record in zip(names[1:], records[1:], strict=True):
        unlike = _unlike_measurements(records[0], record)
        difference = None if unlike else _difference(records[0], names[0], record, name)
        if unlike:
            notes.append(f"{name} measured otherwise ({', '.join(unlike)}): no paired difference.")
        elif difference is None:
            notes.append(f"{name} shares no saved verdicts with {names[0]}: no paired difference.")
        else:
            differences.append(difference)
    summaries = [_summary(n, record) for n, record in zip(names, records, strict=True)]
    left_out = "is left out: the runs compute it in other ways"
    if keys := loss_differs_by(records):
        summaries = [replace(summary, loss=None) for summary in summaries]
        notes.append(f"last loss {left_out} ({', '.join(keys)}).")
    if keys := kl_differs_by(records):
        summaries = [replace(summary, reverse_kl_nats=None) for summary in summaries]
        notes.append(f"last reverse KL {left_out} ({', '.join(keys)}).")
    if keys := teachers_differ_by(records):
        summaries = [replace(summary, held_out_reverse_kl_nats=None) for summary in summaries]
        notes.append(f"held-out reverse KL {left_out} ({', '.join(keys)}).")
    return Comparison(
        runs=tuple(summaries),
        config=_differing_config(records),
        differences=tuple(differences),
        notes=tuple(notes),
    )


def names_of(records: Sequence[RunRecord]) -> list[str]:
    """Folder names, or whole paths when two folders have the same name."""
    short = [record.path.resolve().name for record in records]
    is_unique = len(set(short)) == len(short)
    return [
        text.visible(name if is_unique else str(record.path), 120)
        for name, record in zip(short, records, strict=True)
    ]


def loss_differs_by(records: Sequence[RunRecord]) -> list[str]:
    """Configuration keys by which runs minimise different things; none if losses compare."""
    own = [key for key in _differing_config(records) if key.startswith(_LOSS_KEYS)]
    return [*teachers_differ_by(records), *(text.visible(key, 60) for key in own)]


def kl_differs_by(records: Sequence[RunRecord]) -> list[str]:
    """The same of the divergence that is logged in every step."""
    own = [key for key in _differing_config(records) if key == "diagnostics"]
    return [*teachers_differ_by(records), *own]


def teachers_differ_by(records: Sequence[RunRecord]) -> list[str]:
    """The same of what runs compare the student with, as of the held-out divergence."""
    found = []
    for key, values in _differing_config(records).items():
        table, _, name = key.rpartition(".")
        if table.partition(".")[0] in ("teacher", "teachers") and name in _TEACHER_KEYS:
            default = _DEFAULTS.get(name) if table == "teacher" else None
            if len({default if value is None else value for value in values}) > 1:
                found.append(text.visible(key, 60))
    return found


def _summary(name: str, record: RunRecord) -> RunSummary:
    last = record.steps[-1]
    evaluations = record.evaluations_of("student")
    final = evaluations[-1] if evaluations else None
    return RunSummary(
        name=name,
        num_steps=len(record.steps),
        num_rows=sum(step.num_rows or 0 for step in record.steps),
        num_kept=sum(step.num_kept or 0 for step in record.steps),
        seconds=sum(s or 0.0 for step in record.steps for s in (step.seconds or {}).values()),
        loss=last.loss,
        reverse_kl_nats=last.reverse_kl_nats,
        entropy_nats=last.entropy_nats,
        accuracy=_accuracy(final) if final else None,
        pass_at_k=final.pass_at_k if final else None,
        held_out_reverse_kl_nats=final.held_out_reverse_kl_nats if final else None,
        success_share=last.success_share,
        score_mean=last.score_mean,
        turns_mean=last.turns_mean,
        tokens_per_turn=last.tokens_per_turn,
        tool_error_share=last.tool_error_share,
    )


def _accuracy(record: EvaluationRecord) -> Interval | None:
    if record.mean_at_k is None or record.mean_at_k_low is None or record.mean_at_k_high is None:
        return None
    return Interval(record.mean_at_k, record.mean_at_k_low, record.mean_at_k_high)


def _differing_config(records: Sequence[RunRecord]) -> dict[str, tuple[str | None, ...]]:
    configs = [dict(text.flatten(record.config)) for record in records]
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: tuple(config.get(key) for config in configs) for key in keys}
    # Runs always go to folders of their own.
    return {key: row for key, row in values.items() if len(set(row)) > 1 and key != "out"}


def _unlike_measurements(baseline: RunRecord, record: RunRecord) -> list[str]:
    """Keys by which two runs measured different problems, or the same ones differently."""
    free = ("evaluation.every", "evaluation.num_problems", "evaluation.teacher")
    differing = _differing_config([baseline, record])
    measured = [key for key in differing if key.startswith(("data.", "evaluation."))]
    return [key for key in measured if key not in free]


def _difference(
    baseline: RunRecord, baseline_name: str, record: RunRecord, name: str
) -> Difference | None:
    ours, theirs = _final_scores(record), _final_scores(baseline)
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    interval = paired_difference([ours[p] for p in shared], [theirs[p] for p in shared])
    return Difference(name, baseline_name, len(shared), interval)


def _final_scores(record: RunRecord) -> dict[str, float]:
    steps = record.evaluated_steps("student")
    return record.problem_scores("student", steps[-1]) if steps else {}


def _summary_rows(runs: Sequence[RunSummary]) -> Iterator[list[str]]:
    yield ["", *(run.name for run in runs)]
    yield ["steps", *(text.number(run.num_steps) for run in runs)]
    yield ["tokens scored", *(text.number(run.num_rows) for run in runs)]
    yield ["tokens trained on", *(text.number(run.num_kept) for run in runs)]
    yield ["time", *(text.duration(run.seconds) for run in runs)]
    yield ["mean@k", *(text.interval(run.accuracy) for run in runs)]
    yield ["pass@k", *(text.percent(run.pass_at_k) for run in runs)]
    if any(run.held_out_reverse_kl_nats is not None for run in runs):
        yield ["held-out reverse KL", *(text.number(r.held_out_reverse_kl_nats) for r in runs)]
    if any(run.reverse_kl_nats is not None for run in runs):
        yield ["last reverse KL", *(text.number(run.reverse_kl_nats) for run in runs)]
    yield ["last entropy", *(text.number(run.entropy_nats) for run in runs)]
    if any(run.loss is not None for run in runs):
        yield ["last loss", *(text.number(run.loss) for run in runs)]
    if any(run.success_share is not None for run in runs):
        yield ["last success", *(text.percent(run.success_share) for run in runs)]
        yield ["last score", *(text.number(run.score_mean) for run in runs)]
        yield ["last turns", *(text.number(run.turns_mean) for run in runs)]
        yield ["last tokens a turn", *(text.number(run.tokens_per_turn) for run in runs)]
        yield ["last tool errors", *(text.percent(run.tool_error_share) for run in runs)]


def _config_rows(comparison: Comparison) -> Iterator[list[str]]:
    yield ["", *(run.name for run in comparison.runs)]
    for key, values in comparison.config.items():
        cells = (text.MISSING if value is None else value for value in values)
        yield [text.visible(key, 60), *(text.visible(cell, 60) for cell in cells)]


def _difference_line(difference: Difference) -> str:
    return (
        f"{difference.run} − {difference.baseline}: {text.signed_interval(difference.interval)}, "
        f"paired over {difference.num_problems} problems"
    )
