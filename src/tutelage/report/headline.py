"""The first screen of a run's page: what was run, and the result in three numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.evaluation.metrics import Interval, mean_difference, paired_difference, ratio_terms
from tutelage.report import text
from tutelage.report.records import EvaluationRecord, RunRecord

_NUM_SHOWN = 3
_OBJECTIVES = {
    "kl": "KL",
    "jsd": "Jensen-Shannon divergence",
    "skew_reverse_kl": "skew reverse KL",
    "akl": "adaptive KL",
    "topk": "top-k reverse KL",
    "sampled": "reverse KL of the sampled tokens",
    "eopd": "entropy-aware (EOPD)",
    "tropd": "trust region (TrOPD)",
    "grpo": "GRPO",
    "opsa": "OPSA, without a teacher",
}


@dataclass(frozen=True)
class Headline:
    """One large number with its interval and what it has to be seen against."""

    label: str
    value: str
    interval: str
    """The 95 % interval, empty where there is none."""
    note: str


def setup_rows(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was run: student, teacher, data, rule, objective and learning rate, as configured."""
    rows = {
        "student": _student(config.get("student")),
        "teacher": _model(config.get("teacher")),
        "data": _data(config.get("data")),
        "rule": _rule(config.get("selection")),
        "objective": _objective(config.get("objective")),
        "learning rate": _rate(config.get("optimizer")),
    }
    return [(label, text.visible(value, 120)) for label, value in rows.items() if value]


def headlines(record: RunRecord) -> list[Headline]:
    """At most three results: accuracy and its change, or else divergence from the teacher."""
    return [*_results(record)][:_NUM_SHOWN]


def paired_change(record: RunRecord) -> Interval | None:
    """How much the student changed on the same problems, when their verdicts were saved."""
    steps = record.evaluated_steps("student")
    if len(steps) < 2:
        return None
    before = record.problem_scores("student", steps[0])
    after = record.problem_scores("student", steps[-1])
    shared = sorted(before.keys() & after.keys())
    if not shared:
        return None
    return paired_difference([after[p] for p in shared], [before[p] for p in shared])


def held_out_kl(record: RunRecord, step: int) -> Interval | None:
    """Held-out reverse KL of the student, nats per token, with the problems as the unit.

    The value is a ratio, summed KL over tokens; its interval is Student's t of the linearised
    ratio.
    """
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in record.verdicts:
        is_here = (row.model, row.step) == ("student", step)
        count = row.num_tokens if row.num_rows is None else row.num_rows
        if is_here and row.reverse_kl_nats is not None and count:
            totals[row.prompt_id][0] += row.reverse_kl_nats
            totals[row.prompt_id][1] += count
    if len(totals) < 2:
        return None
    sums, counts = zip(*totals.values(), strict=True)
    return mean_difference(ratio_terms(sums, counts), [0.0] * len(sums))


def _results(record: RunRecord) -> Iterator[Headline]:
    student, teacher = record.evaluations_of("student"), record.evaluations_of("teacher")
    if student and student[-1].mean_at_k is not None:
        last, k = student[-1], text.number(student[-1].num_samples)
        yield Headline(
            f"mean@{k} after step {last.step}",
            text.percent(last.mean_at_k),
            _percents(last.mean_at_k_low, last.mean_at_k_high),
            _against("mean_at_k", student, teacher, text.percent),
        )
    if change := paired_change(record):
        ends = f"{100 * change.low:+.1f} to {100 * change.high:+.1f}"
        yield Headline("change on the same problems", f"{100 * change.value:+.1f} points", ends,
                       "paired, after minus before")  # fmt: skip
    if student and (kl := student[-1].held_out_reverse_kl_nats) is not None:
        found = held_out_kl(record, student[-1].step)
        ends = f"{text.number(found.low, 3)} to {text.number(found.high, 3)}" if found else ""
        before = _against("held_out_reverse_kl_nats", student, [], text.number)
        yield Headline("held-out reverse KL, nats a token", text.number(kl, 3), ends, before)
    if student and student[-1].pass_at_k is not None:
        last = student[-1]
        yield Headline(
            f"pass@{text.number(last.k)}",
            text.percent(last.pass_at_k),
            _percents(last.pass_at_k_low, last.pass_at_k_high),
            _against("pass_at_k", student, teacher, text.percent),
        )
    yield from _of_training(record)


def _of_training(record: RunRecord) -> Iterator[Headline]:
    """Means of the last tenth of the steps, where evaluations are too few."""
    names: dict[str, tuple[str, Callable[[float], str]]] = {
        "success_share": ("successful conversations", text.percent),
        "reverse_kl_nats": ("reverse KL in training, nats a token", text.number),
        "loss": ("loss per kept token", text.number),
    }
    for name, (label, shown) in names.items():
        values = [v for step in record.steps if (v := getattr(step, name)) is not None]
        if values:
            last = values[-max(1, len(values) // 10) :]
            where = "last step" if len(last) == 1 else f"mean of the last {len(last)} steps"
            note = f"{where}; {shown(values[0])} at the first"
            yield Headline(label, shown(sum(last) / len(last)), "", note)


def _against(
    name: str, student: Sequence[EvaluationRecord], teacher: Sequence[EvaluationRecord], shown: Any
) -> str:
    found = [("before", student[0])] if len(student) > 1 else []
    found += [("teacher", teacher[-1])] if teacher else []
    values = [(label, getattr(record, name)) for label, record in found]
    return ", ".join(f"{label} {shown(value)}" for label, value in values if value is not None)


def _percents(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f} %"


def _model(table: object) -> str:
    match table:
        case str(name) | {"model": str(name)} | {"path": str(name)}:
            is_local = name.startswith(("package:", "/", ".", "~"))
            return name.rstrip("/").rpartition("/")[2] if is_local else name
    return ""


def _student(table: object) -> str:
    match table:
        case {"lora": {"rank": int(rank)}}:
            return f"{_model(table)}, LoRA of rank {rank}"
    return _model(table)


def _data(table: object) -> str:
    match table:
        case {"kind": "file", "path": str(path)}:
            return path.rpartition("/")[2] if path.startswith(("/", ".", "~")) else path
        case {"kind": str(kind)}:
            return kind.replace("_", " ")
    return ""


def _rule(table: object) -> str:
    match table:
        case {"rule": "all"}:
            return "all tokens"
        case {"rule": str(rule), "keep": int() | float() as keep}:
            return f"{rule}, keeps {100 * keep:.3g} %"
        case {"rule": str(rule)}:
            return rule
    return ""


def _objective(table: object) -> str:
    match table:
        case {
            "kind": "kl",
            "reverse_weight": int() | float() as reverse,
            "forward_weight": int() | float() as forward,
        }:
            parts = {"reverse KL": reverse, "forward KL": forward}
            named = {name: weight for name, weight in parts.items() if weight}
            if len(named) == 1:
                return f"{next(iter(named))}, exact"
            return f"{' + '.join(f'{w:g} × {name}' for name, w in named.items())}, exact"
        case {"kind": str(kind)}:
            return _OBJECTIVES.get(kind, kind)
    return ""


def _rate(table: object) -> str:
    match table:
        case {"learning_rate": int() | float() as rate, "schedule": str(schedule)}:
            return f"{rate:g}, {schedule}"
        case {"learning_rate": int() | float() as rate}:
            return f"{rate:g}"
    return ""
