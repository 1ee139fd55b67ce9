"""Evaluations side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tutelage.errors import RunError
from tutelage.evaluation.metrics import paired_difference
from tutelage.report.compare_evaluations import compare_evaluations, is_evaluation


def make(folder: Path, verdicts: dict[str, dict[str, list[Any]]], **settings: Any) -> Path:
    folder.mkdir()
    benchmarks = {name: {"max_new_tokens": settings.pop("length", 64)} for name in verdicts}
    table = {"model": folder.name, "temperature": 1.0, "benchmarks": benchmarks} | settings
    (folder / "settings.json").write_text(json.dumps(table))
    rows = [
        {"benchmark": b, "prompt_id": p, "sample": s, "is_correct": verdict, "completion": "x"}
        for b, problems in verdicts.items()
        for p, group in problems.items()
        for s, verdict in enumerate(group)
    ]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


A = {"m": {"1": [True, True], "2": [False, True], "3": [True, True]}, "g": {"1": [True]}}
B = {"m": {"2": [False, False], "3": [True, False], "4": [True, True]}, "h": {"1": [True]}}


def test_differences_are_paired_over_shared_problems(tmp_path: Path) -> None:
    folders = [make(tmp_path / "a", A), make(tmp_path / "b", B)]
    comparison = compare_evaluations(folders)
    (difference,) = comparison.differences
    assert (difference.benchmark, difference.num_problems) == ("m", 2)
    assert difference.interval == paired_difference([0.0, 0.5], [0.5, 1.0])
    assert difference.interval.value == -0.5
    assert comparison.notes == (
        "b and a share no graded problems of g.",
        "b and a share no graded problems of h.",
    )
    means = comparison.means["m"]
    assert means[0] is not None
    assert means[0].value == pytest.approx(5 / 6)
    assert comparison.means["h"][0] is None
    assert comparison.settings["model"] == ("a", "b")
    assert "m: b − a: -50.0 points of mean@k" in comparison.as_text()
    assert json.loads(json.dumps(comparison.as_dict()))["names"] == ["a", "b"]


@pytest.mark.parametrize("changed", [{"temperature": 0.5}, {"length": 128}, {"chat": True}])
def test_what_was_measured_otherwise_is_not_paired(tmp_path: Path, changed: dict[str, Any]) -> None:
    folders = [make(tmp_path / "a", A), make(tmp_path / "b", {"m": B["m"]}, **changed)]
    comparison = compare_evaluations(folders)
    key = "max_new_tokens" if "length" in changed else next(iter(changed))
    assert comparison.differences == ()
    assert f"b measured m otherwise ({key}): no paired difference." in comparison.notes


def test_other_seeds_and_numbers_of_samples_are_paired(tmp_path: Path) -> None:
    more = {"m": {p: group * 2 for p, group in A["m"].items()}}
    folders = [make(tmp_path / "a", A, seed=1), make(tmp_path / "b", more, seed=2)]
    (difference,) = compare_evaluations(folders).differences
    assert difference.interval.value == 0.0


def test_ungraded_problems_and_damaged_folders(tmp_path: Path) -> None:
    a = make(tmp_path / "a", A)
    ungraded = make(tmp_path / "u", {"m": {"1": [None, None]}})
    assert compare_evaluations([a, ungraded]).differences == ()
    assert is_evaluation(a)
    assert not is_evaluation(tmp_path)
    with pytest.raises(RunError, match="at least two"):
        compare_evaluations([a])
    with pytest.raises(RunError, match="is not a readable evaluation"):
        compare_evaluations([a, tmp_path])
    with (a / "rows.jsonl").open("a") as file:
        file.write('{"benchmark": "m", "prompt_id": "9", "sample": 0, "is_correct": "yes"}\n')
    with pytest.raises(RunError, match=r"rows\.jsonl, line 8 is damaged"):
        compare_evaluations([a, ungraded])
