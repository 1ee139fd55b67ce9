"""One self-contained HTML page about a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.report import text
from tutelage.report.conversations import conversation_views
from tutelage.report.curves import panel_context
from tutelage.report.headline import headlines, paired_change, setup_rows
from tutelage.report.page import write_page
from tutelage.report.panels import Panel, panels_of, points_per_mark
from tutelage.report.records import (
    EvaluationRecord,
    Quadrant,
    RunRecord,
    SampleRecord,
    StepRecord,
    TokenRecord,
    read_run,
)
from tutelage.report.token_viewer import viewer_context
from tutelage.report.tokens import QUADRANTS

_MAX_PROMPTS = 8
_MAX_COMPLETIONS = 2


@dataclass(frozen=True)
class SampleView:
    """Completions of one prompt at one step."""

    step: int
    completions: tuple[tuple[str, str, str], ...]
    """(verdict in words, CSS class, text)."""


def write_report(run: Path, out: Path | None = None, reload_s: int | None = None) -> Path:
    """Write `report.html` about a run folder.

    The page is one file that fetches nothing. Everything the run wrote is escaped, and a content
    security policy forbids the browser all but its own style and its own script.

    Args:
        run: run folder with manifest.json and metrics.jsonl.
        out: where the page goes: a file name, or an existing folder; by default the run folder.
        reload_s: seconds after which the page loads itself again, of a run that is followed.

    Returns:
        The path of the page.

    Raises:
        RunError: the folder is no run folder, has no metrics yet, holds a malformed line, or the
            page cannot be written.
    """
    record = read_run(run)
    page = _page_path(run, out)
    context = _context(record, panels_of(record)) | {"reload_s": reload_s}
    write_page(page, context)
    return page


def write_score_page(
    lines: Sequence[dict[str, Any]], config: dict[str, Any], keep: float, out: Path
) -> Path:
    """Write a page about scored completions without a run.

    Args:
        lines: records as in tokens.jsonl.
        config: the configuration they were scored with, as a table.
        keep: budget of the rules.
        out: HTML file.

    Raises:
        RunError: the page cannot be written.
    """
    tokens = [TokenRecord.model_validate(line) for line in lines]
    facts = [("completions", text.number(len(tokens))),
             ("tokens", text.number(sum(len(record.token) for record in tokens)))]  # fmt: skip
    context = {
        "overview": None,
        "setup": setup_rows(config),
        "headlines": [],
        **panel_context([]),
        "kicker": "Scored completions, nothing was trained",
        "name": text.visible(out.stem, 120),
        "facts": facts,
        "notes": [],
        **viewer_context(tokens, {**config, "selection": {"keep": keep}}),
    }
    write_page(out, context)
    return out


def _page_path(run: Path, out: Path | None) -> Path:
    if out is None:
        return run / "report.html"
    return out / "report.html" if out.is_dir() else out


def _context(record: RunRecord, panels: Sequence[Panel]) -> dict[str, Any]:
    environment = {key: value for key, value in record.manifest.items() if key != "config"}
    return {
        **viewer_context(record.tokens, record.config),
        "overview": "run.html",
        "kicker": "On-policy distillation run",
        "name": text.visible(record.path.resolve().name, 120),
        "facts": _facts(record),
        "notes": [*record.notes, *_end_notes(record.manifest), *_thinning_note(record)],
        "evaluations": _evaluation_rows(record),
        "evaluation_set": _evaluation_set(record),
        "is_graded": any(e.mean_at_k is not None for e in record.evaluations),
        "change": paired_change(record),
        "setup": setup_rows(record.config),
        "headlines": headlines(record),
        **panel_context(panels),
        "quadrants": _quadrant_rows(record.steps),
        "quadrant_steps": _quadrant_steps(record.steps),
        "quadrant_cuts": _quadrant_cuts(record.config),
        "figures": _figures(record.steps),
        "conversations": conversation_views(record.tokens, record.config),
        "samples": _samples(record.samples),
        "config_toml": text.visible(text.toml(record.config), 20_000),
        "environment": text.visible_rows(environment),
    }


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """The run in a handful of label and value pairs."""
    rows = sum(step.num_rows or 0 for step in record.steps)
    kept = sum(step.num_kept or 0 for step in record.steps)
    seconds = sum(s or 0.0 for step in record.steps for s in (step.seconds or {}).values())
    facts = [("steps", text.number(len(record.steps)))]
    if rows:
        facts.append(("completion tokens", f"{rows:,}"))
        facts.append(("trained on", f"{kept:,} ({text.percent(kept / rows)})"))
    if seconds:
        facts.append(("time", text.duration(seconds)))
    return facts


def _end_notes(manifest: dict[str, Any]) -> list[str]:
    """Why no step followed, and which checkpoint is the best, as the manifest has them."""
    notes = []
    match manifest.get("stopped_early"):
        case {"reason": str(reason)}:
            notes.append(f"Stopped early: {text.visible(reason)}.")
    match manifest.get("best"):
        case {"metric": str(name), "step": int(step), "value": int() | float() as value}:
            found = f"{text.visible(name)} {text.number(value)} after step {step}"
            notes.append(f"Best checkpoint: {found}.")
    return notes


def _thinning_note(record: RunRecord) -> list[str]:
    size = points_per_mark(len(record.steps))
    return [f"Each point of a curve is the mean of {size} steps."] if size > 1 else []


def _evaluation_rows(record: RunRecord) -> list[tuple[str, EvaluationRecord]]:
    """The student before and after, and the teacher, as far as they were evaluated."""
    student, teacher = record.evaluations_of("student"), record.evaluations_of("teacher")
    rows = []
    if student:
        rows.append((f"student, step {student[0].step}", student[0]))
    if len(student) > 1:
        rows.append((f"student, step {student[-1].step}", student[-1]))
    if teacher:
        rows.append(("teacher", teacher[-1]))
    return rows


def _evaluation_set(record: RunRecord) -> EvaluationRecord | None:
    return next(iter(record.evaluations_of("student") or record.evaluations), None)


def _with_quadrants(steps: Sequence[StepRecord]) -> list[StepRecord]:
    return [step for step in steps if step.quadrants]


def _quadrant_steps(steps: Sequence[StepRecord]) -> tuple[int, int] | None:
    measured = _with_quadrants(steps)
    return (measured[0].step, measured[-1].step) if measured else None


def _quadrant_rows(
    steps: Sequence[StepRecord],
) -> list[tuple[str, str, Quadrant, Quadrant]]:
    """Each quadrant with its meaning, at the first and at the last step that measured it."""
    measured = _with_quadrants(steps)
    if not measured:
        return []
    first, last = measured[0].quadrants or {}, measured[-1].quadrants or {}
    blank = Quadrant()
    return [
        (f"Q{number}", meaning, first.get(f"q{number}", blank), last.get(f"q{number}", blank))
        for number, meaning in QUADRANTS.items()
    ]


def _quadrant_cuts(config: dict[str, Any]) -> str | None:
    """What counts as high, in words: the shares mean nothing without it."""
    match config.get("quadrant_thresholds"):
        case "median":
            return "above the median of the step"
        case [int() | float() as entropy, int() | float() as divergence]:
            return f"entropy above {entropy:g} nats and divergence above {divergence:g} nats"
    return None


def _figures(steps: Sequence[StepRecord]) -> list[tuple[str, str, str, str]]:
    """(name, unit, first, last) of every scalar the run measured."""
    names = {
        "reward_mean": "of a completion",
        "no_signal_share": "share of prompts",
        "loss": "per kept token",
        "reverse_kl_nats": "nats per token",
        "forward_kl_nats": "nats per token",
        "entropy_nats": "nats per token",
        "teacher_entropy_nats": "nats per token",
        "keep": "share of tokens",
        "grad_norm": "before clipping",
        "learning_rate": "",
        "completion_length_mean": "tokens",
        "truncated_share": "share of completions",
        "success_share": "share of conversations",
        "score_mean": "of a conversation",
        "turns_mean": "turns a conversation",
        "tokens_per_turn": "generated tokens",
        "tool_calls_mean": "calls a conversation",
        "tool_error_share": "share of tool calls",
        "inserted_tokens_mean": "tokens a conversation",
    }
    rows = []
    for name, unit in names.items():
        values = [v for step in steps if (v := getattr(step, name)) is not None]
        if values:
            label = name.removesuffix("_nats").replace("_", " ").replace("kl", "KL")
            rows.append((label, unit, text.number(values[0]), text.number(values[-1])))
    return rows


def _samples(samples: Sequence[SampleRecord]) -> list[tuple[str, list[SampleView]]]:
    """Prompts with their completions at the first and the last step that sampled them."""
    by_prompt: dict[str, list[SampleRecord]] = defaultdict(list)
    for sample in samples:
        by_prompt[sample.prompt_id].append(sample)
    shown = list(by_prompt.values())[:_MAX_PROMPTS]
    return [(text.visible(group[0].prompt), _first_and_last(group)) for group in shown]


def _first_and_last(samples: Sequence[SampleRecord]) -> list[SampleView]:
    steps = sorted({sample.step for sample in samples})
    return [
        SampleView(step, tuple(map(_completion, _at_step(samples, step)[:_MAX_COMPLETIONS])))
        for step in dict.fromkeys((steps[0], steps[-1]))
    ]


def _at_step(samples: Sequence[SampleRecord], step: int) -> list[SampleRecord]:
    return [sample for sample in samples if sample.step == step]


def _completion(sample: SampleRecord) -> tuple[str, str, str]:
    verdict, css_class = {
        True: ("correct", "correct"),
        False: ("wrong", "wrong"),
        None: ("not graded", "ungraded"),
    }[sample.is_correct]
    return verdict, css_class, text.visible(sample.completion)
