"""Runs side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from tutelage.errors import RunError
from tutelage.report.compare_page import write_comparison
from tutelage.report.compare_runs import compare_runs
from tutelage.report.records import read_run

MakeRun = Callable[..., Path]


def shares_at(run: Path, step: int) -> dict[str, float]:
    rows = [json.loads(line) for line in (run / "evaluation_rows.jsonl").read_text().splitlines()]
    at_step = [row for row in rows if row["step"] == step]
    problems = {row["prompt_id"] for row in at_step}
    return {
        problem: sum(row["is_correct"] for row in at_step if row["prompt_id"] == problem) / 8
        for problem in problems
    }


def test_final_metrics_stand_side_by_side(make_run: MakeRun) -> None:
    runs = [make_run("all", keep=1.0), make_run("tenth", keep=0.1, seed=1, num_steps=12)]
    comparison = compare_runs(runs)
    last = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in runs]
    assert [run.name for run in comparison.runs] == ["all", "tenth"]
    assert [run.num_steps for run in comparison.runs] == [24, 12]
    entropies = [run.entropy_nats for run in comparison.runs]
    assert entropies == [line["entropy_nats"] for line in last]
    assert comparison.runs[0].num_kept == comparison.runs[0].num_rows
    accuracy = comparison.runs[0].accuracy
    assert accuracy is not None
    assert (accuracy.value, accuracy.low) == pytest.approx((0.851, 0.791))


def with_config(run: Path, changes: dict[str, object]) -> Path:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["config"] |= changes
    (run / "manifest.json").write_text(json.dumps(manifest))
    return run


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"objective": {"kind": "jsd"}}, "objective.kind"),
        ({"selection": {"rule": "q3", "keep": 0.1}}, "selection.rule"),
        ({"weighting": {"kind": "fire"}}, "weighting.kind"),
        ({"renormalize": False}, "renormalize"),
        ({"teacher": {"model": "other"}}, "teacher.model"),
        ({"data": {"kind": "ledger", "num_items": 3}}, "data.num_items"),
    ],
)
def test_losses_of_runs_that_minimise_other_things_do_not_stand_side_by_side(
    make_run: MakeRun, tmp_path: Path, changes: dict[str, object], key: str
) -> None:
    runs = [make_run("a"), with_config(make_run("b"), changes)]
    comparison = compare_runs(runs)
    assert [run.loss for run in comparison.runs] == [None, None]
    (note,) = [note for note in comparison.notes if note.startswith("last loss is left out")]
    assert key in note
    assert "last loss" not in [row[0] for row in comparison.tables()[0].rows]
    records = [read_run(run) for run in runs]
    write_comparison(comparison, records, tmp_path / "page.html")
    assert "Loss (per kept token)" not in (page := (tmp_path / "page.html").read_text())
    assert "last loss is left out" in page


LOCAL = {"kind": "local", "model": "t", "quantization": "none", "vocabulary": "same",
         "stop_token": "map"}  # fmt: skip
SERVED = {"kind": "hidden_server", "model": "t", "stop_token": "map", "url": "http://a"}
TOLD = {"kind": "self", "context": "{answer}", "weights": "frozen"}


@pytest.mark.parametrize(
    ("first", "second", "key"),
    [
        ({"teacher": LOCAL}, {"teacher": SERVED}, None),
        ({"teacher": SERVED}, {"teacher": SERVED | {"url": "http://b"}}, None),
        ({"teacher": LOCAL}, {"teacher": LOCAL | {"stop_token": "class"}}, "teacher.stop_token"),
        ({"teacher": LOCAL}, {"teacher": SERVED | {"num_logprobs": 20}}, "teacher.num_logprobs"),
        ({"teacher": TOLD}, {"teacher": TOLD | {"context": ""}}, "teacher.context"),
        ({}, {"teachers": {"code": LOCAL}}, "teachers.code.model"),
    ],
)
def test_divergences_from_other_teachers_do_not_stand_side_by_side(
    make_run: MakeRun, tmp_path: Path, first: Any, second: Any, key: str | None
) -> None:
    runs = [with_config(make_run("a"), first), with_config(make_run("b"), second)]
    comparison = compare_runs(runs)
    rows = [row[0] for row in comparison.tables()[0].rows]
    write_comparison(comparison, [read_run(run) for run in runs], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    for name, panel in (
        ("last reverse KL", "Reverse KL (nats per token)"),
        ("held-out reverse KL", "Held-out reverse KL (nats per token)"),
    ):
        notes = [note for note in comparison.notes if note.startswith(f"{name} is left out")]
        assert [str(key) in note for note in notes] == ([] if key is None else [True])
        assert (name in rows) == (panel in page) == (key is None)


def test_losses_of_one_method_stand_side_by_side(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("a"), make_run("b", seed=1)]
    comparison = compare_runs(runs)
    last = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in runs]
    assert [run.loss for run in comparison.runs] == [line["loss"] for line in last]
    assert "last loss" in [row[0] for row in comparison.tables()[0].rows]
    write_comparison(comparison, [read_run(run) for run in runs], tmp_path / "page.html")
    assert "Loss (per kept token)" in (tmp_path / "page.html").read_text()


def test_only_differing_configuration_keys_are_listed(make_run: MakeRun) -> None:
    comparison = compare_runs([make_run("a", keep=1.0), make_run("b", keep=0.1, seed=1)])
    assert comparison.config == {"selection.keep": ("1.0", "0.1"), "seed": ("0", "1")}


def test_a_key_that_one_run_lacks_differs(make_run: MakeRun) -> None:
    a, b = make_run("a"), make_run("b")
    manifest = json.loads((b / "manifest.json").read_text())
    manifest["config"] |= {"extra": None, "out": "b"}
    (b / "manifest.json").write_text(json.dumps(manifest))
    assert compare_runs([a, b]).config == {"extra": (None, "null")}


def test_paired_differences_follow_the_final_verdicts_of_shared_problems(
    make_run: MakeRun,
) -> None:
    a, b = make_run("a", seed=0), make_run("b", seed=1, num_steps=12)
    kept = [
        line
        for line in (b / "evaluation_rows.jsonl").read_text().splitlines()
        if json.loads(line)["prompt_id"] != "ledger-0"
    ]
    (b / "evaluation_rows.jsonl").write_text("\n".join(kept[::-1]))
    (difference,) = compare_runs([a, b]).differences
    first, second = shares_at(a, 24), shares_at(b, 12)
    shared = sorted(first.keys() & second.keys())
    expected = stats.ttest_rel([second[p] for p in shared], [first[p] for p in shared])
    bounds = expected.confidence_interval(0.95)
    assert difference.num_problems == 39
    assert difference.interval.value == pytest.approx(
        sum(second[p] - first[p] for p in shared) / 39
    )
    # The pseudo-pairs widen 39 problems by a few tenths of a point.
    assert (difference.interval.low, difference.interval.high) == pytest.approx(
        (bounds.low, bounds.high), abs=0.01
    )


def test_without_shared_verdicts_the_comparison_says_so(make_run: MakeRun) -> None:
    a, b = make_run("a"), make_run("b", drop=("evaluation_rows.jsonl", "evaluation.jsonl"))
    comparison = compare_runs([a, b])
    assert comparison.differences == ()
    assert comparison.runs[1].accuracy is None
    assert "b shares no saved verdicts with a" in comparison.as_text()


def test_text_has_one_aligned_line_a_row_whatever_the_names(make_run: MakeRun) -> None:
    a, b = make_run("a\nb\x1b[31m"), make_run("plain", keep=0.5)
    shown = compare_runs([a, b]).as_text()
    header, *rows = shown.split("\n\n")[0].splitlines()
    assert "\x1b" not in shown
    assert "⟨U+001B⟩" in header
    assert {len(row) for row in rows} == {len(header)}
    assert "selection.keep" in shown
    assert "points of mean@k" in shown


def test_json_is_strict_and_complete(make_run: MakeRun) -> None:
    comparison = compare_runs([make_run("a"), make_run("b", keep=0.5)])
    loaded = json.loads(json.dumps(comparison.as_dict(), allow_nan=False))
    assert [run["name"] for run in loaded["runs"]] == ["a", "b"]
    assert loaded["config"]["selection.keep"] == ["0.1", "0.5"]
    assert loaded["differences"][0]["interval"]["level"] == 0.95


def test_folders_of_one_name_are_told_apart_by_their_paths(make_run: MakeRun) -> None:
    a, b = make_run("one/run"), make_run("two/run")
    names = [run.name for run in compare_runs([a, b]).runs]
    assert names == [str(a), str(b)]


@pytest.mark.parametrize("num_runs", [0, 1])
def test_one_run_is_no_comparison(make_run: MakeRun, num_runs: int) -> None:
    with pytest.raises(RunError, match=f"at least two run folders, got {num_runs}"):
        compare_runs([make_run("a")][:num_runs])
