"""Reading run folders: whole, torn, resumed, hostile and broken ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tutelage.errors import RunError
from tutelage.report.records import read_run

MakeRun = Callable[..., Path]


def test_records_hold_what_the_files_hold(make_run: MakeRun) -> None:
    run = make_run(num_steps=7)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    record = read_run(run)
    assert [step.model_dump(exclude_unset=True) for step in record.steps] == lines
    assert record.steps[3].keep == lines[3]["num_kept"] / lines[3]["num_rows"]
    assert record.config["selection"] == {"rule": "soft_or", "keep": 0.1}
    assert record.notes == ()


@pytest.mark.parametrize("num_bytes", [1, 20, 200])
def test_a_torn_last_line_is_left_out_and_said(make_run: MakeRun, num_bytes: int) -> None:
    run = make_run(num_steps=5)
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + metrics.read_bytes()[:num_bytes])
    record = read_run(run)
    assert [step.step for step in record.steps] == [0, 1, 2, 3, 4]
    (note,) = record.notes
    assert "metrics.jsonl (line 6) is cut off" in note


def test_a_line_torn_inside_a_character_is_left_out(make_run: MakeRun) -> None:
    run = make_run()
    with (run / "samples.jsonl").open("ab") as samples:
        samples.write('{"step": 24, "prompt": "é'.encode()[:-1])
    record = read_run(run)
    assert len(record.samples) == 10
    assert "samples.jsonl (line 11) is cut off" in record.notes[0]


@pytest.mark.parametrize(
    "bad",
    [
        '{"step": 1, "loss"',
        '{"step": 1, "loss": NaN}',
        '{"step": 1, "loss": 1e999}',
        '{"step": true}',
        '{"step": "1"}',
        '{"step": -1}',
        '{"step": 1.5}',
        '{"step": 1, "loss": "low"}',
        '{"step": 1, "seconds": {"learn_s": "fast"}}',
        '{"step": 1, "quadrants": {"q1": 3}}',
        '{"loss": 1.0}',
        "[1]",
        "null",
        "\x00\x00\x00",
        "[" * 100_000,
        '{"step": ' + "9" * 5000 + "}",
    ],
)
def test_a_malformed_line_is_refused_with_its_number(make_run: MakeRun, bad: str) -> None:
    run = make_run(num_steps=4)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:2], bad, *lines[2:]]) + "\n")
    with pytest.raises(RunError, match=r"^metrics\.jsonl line 3 ") as caught:
        read_run(run)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_whole_last_line_with_a_wrong_value_is_not_taken_for_torn(make_run: MakeRun) -> None:
    run = make_run(num_steps=2)
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 2, "loss": "low"}\n')
    with pytest.raises(RunError, match=r"line 3 does not fit: 'loss'.*got 'low'"):
        read_run(run)


def test_lines_that_a_resumed_run_repeats_are_taken_once(make_run: MakeRun) -> None:
    run = make_run(num_steps=4, drop=("metrics.jsonl",))
    lines = [{"step": step, "loss": loss} for step, loss in enumerate([4.0, 3.0, 2.5, 2.4])]
    lines += [{"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = read_run(run)
    assert [(step.step, step.loss) for step in record.steps] == [(0, 4), (1, 3), (2, 2), (3, 1)]
    assert "2 repeated step(s)" in record.notes[0]


def test_line_separators_inside_model_text_do_not_split_a_line(make_run: MakeRun) -> None:
    run = make_run()
    line = {"step": 0, "prompt_id": "p", "prompt": "a\u2028b\x85c", "completion": "\u2029\x0b"}
    (run / "samples.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", "utf-8")
    assert read_run(run).samples[0].prompt == "a\u2028b\x85c"


@pytest.mark.parametrize("content", [None, "", "\n\n", '{"step": 0, "lo'])
def test_a_run_without_metrics_is_refused(make_run: MakeRun, content: str | None) -> None:
    run = make_run(drop=("metrics.jsonl",))
    if content is not None:
        (run / "metrics.jsonl").write_text(content)
    with pytest.raises(RunError, match="has no metrics yet"):
        read_run(run)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a folder"):
        read_run(tmp_path / "absent")


@pytest.mark.parametrize("content", [None, "", "{", "[1]", '{"a": Infinity}', "\ufeff{}"])
def test_a_broken_manifest_is_refused(make_run: MakeRun, content: str | None) -> None:
    run = make_run(drop=("manifest.json",))
    if content is not None:
        (run / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match=r"manifest\.json") as caught:
        read_run(run)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(make_run: MakeRun) -> None:
    run = make_run(drop=("samples.jsonl",))
    (run / "samples.jsonl").mkdir()
    with pytest.raises(RunError, match=r"samples\.jsonl cannot be read"):
        read_run(run)


def test_optional_files_may_be_missing(make_run: MakeRun) -> None:
    run = make_run(drop=("evaluation.jsonl", "samples.jsonl", "evaluation_rows.jsonl"))
    record = read_run(run)
    assert (record.evaluations, record.samples, record.verdicts) == ((), (), ())
    assert record.evaluated_steps("student") == []


def test_problem_scores_keep_models_steps_and_ungraded_samples_apart(make_run: MakeRun) -> None:
    run = make_run(drop=("evaluation_rows.jsonl",))
    rows = [
        (0, "student", "a", True),
        (0, "student", "a", False),
        (0, "student", "b", None),
        (0, "teacher", "a", True),
        (9, "student", "a", True),
    ]
    keys = ("step", "model", "prompt_id", "is_correct")
    lines = [json.dumps({**dict(zip(keys, row, strict=True)), "sample": 0}) for row in rows]
    (run / "evaluation_rows.jsonl").write_text("\n".join(lines))
    record = read_run(run)
    assert record.problem_scores("student", 0) == {"a": 0.5}
    assert record.problem_scores("teacher", 0) == {"a": 1.0}
    assert record.evaluated_steps("student") == [0, 9]
