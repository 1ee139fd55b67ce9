"""Results of several benchmarks as one JSON record and as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tutelage.evaluation.benchmark import Result
from tutelage.evaluation.metrics import Interval

_MISSING = "–"


def summarize(results: Sequence[Result], head: dict[str, Any]) -> dict[str, Any]:
    """One record: that of the only benchmark, or all of them with their plain average."""
    records = [result.summary() for result in results]
    if len(records) == 1:
        return head | records[0]
    average = {
        key: _mean([record[key] for record in records])
        for key in ("mean_at_k", "pass_at_k", "maj_at_k")
    }
    return head | average | {"benchmarks": {record["benchmark"]: record for record in records}}


def as_markdown(results: Sequence[Result], title: str) -> str:
    """A table with one line a benchmark; percentages with 95 % intervals over problems."""
    k = results[0].scores.num_samples
    header = ["", "problems", f"mean@{k}", f"pass@{k}", f"maj@{k}", "cut off", "tokens"]
    lines = [_cells(result) for result in results]
    if len(results) > 1:
        lines.append(["average", "", *_averages(results), "", ""])
    tables = [_table(header, lines), *map(_conversations, results)]
    return "\n\n".join([title, *filter(None, tables)])


def _table(header: list[str], lines: Sequence[list[str]]) -> str:
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "\n".join(_line(cells, widths) for cells in (header, rule, *lines))


def _conversations(result: Result) -> str:
    """Means of a benchmark of agents, beside the success that the first table counts."""
    record = result.summary()
    if "conversations" not in record:
        return ""
    lines = [
        [name, _interval(Interval(*triple))] for name, triple in record["conversations"].items()
    ]
    lines += [[name, f"{mean:.2f}"] for name, mean in record["counts"].items()]
    total = len(result.rows)
    lines += [
        [name, f"{count} of {total} conversations have it"]
        for name, count in record["partial_details"].items()
    ]
    lines += [[name, f"{record[f'{name}_mean']:.2f}"] for name in ("turns", "tool_errors")]
    return _table([result.name, "mean"], lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]
    return f"| {' | '.join(padded)} |"


def _cells(result: Result) -> list[str]:
    record, scores = result.summary(), result.scores
    length = record["completion_length_mean"]
    return [
        result.name.replace("|", "/"),
        str(scores.num_problems),
        *map(_interval, (scores.mean_at_k, scores.pass_at_k, scores.maj_at_k)),
        f"{100 * record['truncated_share']:.1f} %",
        _MISSING if length is None else f"{length:.0f}",
    ]


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return _MISSING
    low, high = 100 * interval.low, 100 * interval.high
    return f"{100 * interval.value:.1f} % [{low:.1f}, {high:.1f}]"


def _averages(results: Sequence[Result]) -> list[str]:
    records = [result.scores.summary() for result in results]
    means = (_mean([r[key] for r in records]) for key in ("mean_at_k", "pass_at_k", "maj_at_k"))
    return [_MISSING if mean is None else f"{100 * mean:.1f} %" for mean in means]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
