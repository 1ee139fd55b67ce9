"""Several runs, or evaluations, side by side on one page."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tutelage.evaluation.metrics import paired_difference
from tutelage.report import text
from tutelage.report.compare_evaluations import EvaluationComparison
from tutelage.report.compare_runs import (
    Comparison,
    kl_differs_by,
    loss_differs_by,
    names_of,
    teachers_differ_by,
)
from tutelage.report.curves import panel_context
from tutelage.report.page import write_page
from tutelage.report.panels import Curve, Panel, panels_across, told_apart
from tutelage.report.records import RunRecord, TokenRecord
from tutelage.report.rule_overlap import kept_tables
from tutelage.report.token_viewer import keep_of, viewer_context


def write_comparison(
    comparison: Comparison, records: Sequence[RunRecord], out: Path, reload_s: int | None = None
) -> None:
    """Write a page about several runs: tables, curves, and the views of their recorded tokens.

    Args:
        comparison: `compare_records(records)`.
        records: the runs, the baseline first.
        out: HTML file.
        reload_s: seconds after which the page loads itself again, of runs that are followed.

    Raises:
        RunError: the page cannot be written.
    """
    runs = [*zip(names_of(records), records, strict=True)]
    tables = comparison.tables()
    budgets = {keep_of(record.config) for record in records}
    paired = {difference.run for difference in comparison.differences}
    differing = {
        "Loss": loss_differs_by(records),
        "Reverse KL": kl_differs_by(records),
        "Held-out reverse KL": teachers_differ_by(records),
    }
    across = [panel for panel in panels_across(runs) if not differing.get(panel.title)]
    panels = [*across, *_difference_panel(runs, paired)]
    context = {
        **_shell("Runs side by side", [name for name, _ in runs], comparison.notes),
        **viewer_context(_tokens(runs), *(record.config for record in records)),
        "keep": budgets.pop() if len(budgets) == 1 else None,
        "whiskers": [(run.name, run.accuracy) for run in comparison.runs if run.accuracy],
        "whiskers_of": "run",
        "tables": [tables[0], *kept_tables(runs), *tables[1:]],
        **panel_context(panels),
        "reload_s": reload_s,
    }
    write_page(out, context, "--html")


def write_evaluations(comparison: EvaluationComparison, out: Path) -> None:
    """Write a page about several evaluations; raises as `write_comparison`."""
    context = {
        **_shell("Evaluations side by side", comparison.names, comparison.notes),
        **viewer_context([], {}),
        "whiskers": [
            (f"{benchmark}: {name}", found)
            for benchmark, means in comparison.means.items()
            for name, found in zip(comparison.names, means, strict=True)
            if found is not None
        ],
        "whiskers_of": "benchmark and evaluation",
        "tables": comparison.tables(),
        **panel_context([]),
    }
    write_page(out, context, "--html")


def _shell(kicker: str, names: Sequence[str], notes: Sequence[str]) -> dict[str, Any]:
    return {
        "kicker": kicker,
        "name": " · ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more",
        "facts": [("baseline", names[0])],
        "setup": [],
        "headlines": [],
        "key": names,
        "notes": [text.visible(note) for note in notes],
        "overview": "compare.html",
    }


def _tokens(runs: Sequence[tuple[str, RunRecord]]) -> list[TokenRecord]:
    """All recorded tokens; their kind names the run too, so that every view can choose it."""
    return [
        record.model_copy(update={"kind": f"{name} · {record.kind}"})
        for name, run in runs
        for record in run.tokens
    ]


def _difference_panel(
    runs: Sequence[tuple[str, RunRecord]], paired: Collection[str]
) -> list[Panel]:
    """Paired difference of accuracy from the baseline over the steps that both evaluated."""
    (_, baseline), *others = runs
    # Curves without points leave the colours where the other panels have them.
    curves = [Curve("", [], "blue")]
    for name, run in others:
        is_paired = name in paired
        curves.append(_difference_curve(name, run, baseline) if is_paired else curves[0])
    shown = told_apart(curves)
    title, unit = "Accuracy minus the baseline's", "points of mean@k, paired"
    return [Panel(title, unit, shown, starts_at_zero=False, has_legend=False)] if shown else []


def _difference_curve(name: str, run: RunRecord, baseline: RunRecord) -> Curve:
    points, band = [], []
    both = {*run.evaluated_steps("student")} & {*baseline.evaluated_steps("student")}
    for step in sorted(both):
        ours, theirs = (r.problem_scores("student", step) for r in (run, baseline))
        shared = sorted(ours.keys() & theirs.keys())
        if shared:
            found = paired_difference([ours[p] for p in shared], [theirs[p] for p in shared])
            points.append((float(step), 100 * found.value))
            band.append((float(step), 100 * found.low, 100 * found.high))
    return Curve(name, points, "blue", band)
