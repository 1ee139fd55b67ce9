"""Runs side by side on a page: aligned curves, paired differences, what rules keep."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import html5lib
import pytest
from token_lines import NUM_TOKENS, token_lines

from tutelage.cli import main
from tutelage.evaluation.metrics import paired_difference
from tutelage.report.compare_page import _difference_panel
from tutelage.report.panels import panels_across
from tutelage.report.records import RunRecord, read_run
from tutelage.report.rule_overlap import kept_tables

MakeRun = Callable[..., Path]
CUTS = [0.5, 0.5]


def runs_of(make_run: MakeRun, rules: tuple[str, ...], **changes: Any) -> list[tuple[str, Any]]:
    """Runs that recorded the same tokens and differ in their rule; `changes` goes to the last."""
    found = []
    for seed, rule in enumerate(rules):
        run = make_run(f"{rule}-{seed}", num_steps=4, seed=seed)
        manifest = json.loads((run / "manifest.json").read_text())
        manifest["config"] |= {"selection": {"rule": rule}, "quadrant_thresholds": CUTS}
        (run / "manifest.json").write_text(json.dumps(manifest))
        lines = token_lines(["a", " b", "c"])
        if seed == len(rules) - 1:
            lines = [line | changes for line in lines]
        (run / "tokens.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        found.append((run.name, run))
    return found


def read(runs: list[tuple[str, Path]]) -> list[tuple[str, RunRecord]]:
    return [(name, read_run(run)) for name, run in runs]


def test_what_each_rule_keeps_is_counted_on_the_shared_prompts(make_run: MakeRun) -> None:
    kept, agreement = kept_tables(read(runs_of(make_run, ("all", "q3", "entropy"))))
    rows = {row[0]: row[1:] for row in kept.rows}
    lines = [n for n in token_lines(["a", " b", "c"]) if (n["step"], n["kind"]) == (10, "held-out")]
    total = sum(sum(n["reverse_kl"]) for n in lines)
    mass = sum(n["reverse_kl"][i] for n in lines for i in n["kept"]["q3"])
    q3 = [(k, i) for k, n in enumerate(lines) for i in range(NUM_TOKENS)
          if n["entropy"][i] <= 0.5 and n["reverse_kl"][i] > 0.5]  # fmt: skip
    kept_q3 = sum(i in lines[k]["kept"]["q3"] for k, i in q3)
    assert rows["rule"] == ["all", "q3", "entropy"]
    assert rows["tokens"] == ["24"] * 3
    assert rows["kept tokens"] == ["100.0 %", "16.7 %", "16.7 %"]
    assert rows["KL mass on kept tokens"][:2] == ["100.0 %", f"{100 * mass / total:.1f} %"]
    name = "kept of Q3, low entropy, high KL"
    assert rows[name][1] == f"{100 * kept_q3 / len(q3):.1f} %"
    first = [n for n in token_lines(["a", " b", "c"]) if (n["step"], n["kind"]) == (0, "held-out")]
    sets = [{(k, i) for k, n in enumerate(first) for i in n["kept"][r]} for r in ("q3", "entropy")]
    overlap = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    assert agreement.rows[2][3] == f"{overlap:.2f}"
    assert agreement.rows[1][2] == f"{2 / NUM_TOKENS:.2f}"  # all of them against two in twelve
    assert [agreement.rows[i][i] for i in (1, 2, 3)] == ["1.00"] * 3


def test_completions_that_differ_are_not_called_the_same(make_run: MakeRun) -> None:
    other = [0] * NUM_TOKENS
    tables = kept_tables(read(runs_of(make_run, ("all", "q3"), token=other)))
    assert [table.title for table in tables] == ["What each rule keeps"]


@pytest.mark.parametrize("lack", ["tokens", "prompts", "rule", "steps"])
def test_without_common_ground_there_is_no_table(make_run: MakeRun, lack: str) -> None:
    changes = {"prompts": {"prompt_id": "z"}, "steps": {"step": 3}}.get(lack, {})
    runs = runs_of(make_run, ("all", "unknown" if lack == "rule" else "q3"), **changes)
    if lack == "tokens":
        (runs[1][1] / "tokens.jsonl").unlink()
    assert kept_tables(read(runs)) == []


def test_curves_are_aligned_and_differences_paired(make_run: MakeRun) -> None:
    runs = read(runs_of(make_run, ("all", "q3", "entropy")))
    panels = {panel.title: panel for panel in panels_across(runs)}
    curves = panels["Reverse KL"].curves
    assert [curve.label for curve in curves] == [name for name, _ in runs]
    assert len({(curve.color, curve.line_style) for curve in curves}) == 3
    for curve, (_, run) in zip(curves, runs, strict=True):
        assert curve.points == [(s.step, s.reverse_kl_nats) for s in run.steps]
    (panel,) = _difference_panel(runs, {runs[2][0]})
    (curve,) = panel.curves
    assert (curve.label, curve.color) == (runs[2][0], panels["Reverse KL"].curves[2].color)
    ours, theirs = (run.problem_scores("student", 4) for run in (runs[2][1], runs[0][1]))
    expected = paired_difference(*([side[p] for p in sorted(ours)] for side in (ours, theirs)))
    assert curve.points[-1] == (4, pytest.approx(100 * expected.value))
    assert curve.band[-1][1:] == pytest.approx((100 * expected.low, 100 * expected.high))


def test_compare_writes_a_page_beside_its_text(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, page = runs_of(make_run, ("all", "q3")), tmp_path / "pages" / "compare.html"
    assert main(["compare", *(str(run) for _, run in runs), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert out.endswith(f"page: {page}\n")
    tree = html5lib.parse(page.read_text("utf-8"), namespaceHTMLElements=False)
    titles = ["".join(h.itertext()) for h in tree.iter("h2")]
    assert titles[:5] == ["Accuracy", "Final metrics", "Training", "What each rule keeps",
                          "How far the rules agree"]  # fmt: skip
    (difference,) = [line for line in out.splitlines() if "points of mean@k" in line]
    assert difference in ["".join(p.itertext()) for p in tree.iter("p")]
    assert main(["compare", *(str(run) for _, run in runs), "--html", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_hostile_run_names_and_settings_stay_text(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("<b>x", num_steps=2), make_run("<script>1", num_steps=2)]
    manifest = json.loads((runs[1] / "manifest.json").read_text())
    manifest["config"]["student"] = "</td><img src=x onerror=alert(1)>"
    (runs[1] / "manifest.json").write_text(json.dumps(manifest))
    page = tmp_path / "p.html"
    assert main(["compare", *map(str, runs), "--html", str(page), "--json"]) == 0
    tree = html5lib.parse(page.read_text("utf-8"), namespaceHTMLElements=False)
    (data, _) = tree.iter("script")
    assert data.get("type") == "application/json"
    assert not [*tree.iter("img"), *tree.findall(".//h1//b"), *tree.findall(".//table//b")]
    assert "</td><img src=x" in "".join(tree.itertext())
