"""Conversations in what an evaluation keeps: transcripts, turns, errors and scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tutelage.data.types import Conversation, Message, Outcome, Prompt, Rollout
from tutelage.evaluation.benchmark import Benchmark, Progress, Result, run_benchmark
from tutelage.evaluation.folder import EvaluationFolder
from tutelage.evaluation.measure import _sample
from tutelage.evaluation.scores import score
from tutelage.evaluation.tables import as_markdown
from tutelage.models.tiny import tiny_tokenizer
from tutelage.report.compare_evaluations import compare_evaluations

PROMPTS = tuple(Prompt(f"p{i}", "a") for i in range(3))
MESSAGES: tuple[Message, ...] = (
    {"role": "assistant", "content": "calls\nf"},
    {"role": "tool", "name": "f", "content": "</pre>1"},
    {"role": "user", "content": "go on"},
    {"role": "assistant", "content": "the answer is 7"},
)
TRANSCRIPT = "assistant: calls\nf\ntool f: </pre>1\nuser: go on\nassistant: the answer is 7"


DETAILS: dict[str, float | int | str] = {"match": 0.25, "n": 2, "why": "x"}


def rollout(
    prompt: Prompt,
    sample: int,
    is_success: bool = True,
    details: dict[str, float | int | str] = DETAILS,
) -> Rollout:
    outcome = Outcome(0.5, is_success, details)
    found = Conversation(MESSAGES, 2, 3, 1, outcome)
    mask = (True, True, False, True)
    ids = (1, 2, 3, 4)
    return Rollout(
        prompt, sample, (1,), ids, text="the answer is 7", is_generated=mask, conversation=found
    )


def benchmark(name: str = "b") -> Benchmark:
    return Benchmark(name, PROMPTS, lambda *_: None, 50)


def run(folder: Path, worlds: Sequence[bool], **limits: Any) -> Result:
    """An evaluation in which so many conversations of each problem succeed."""

    def generate(_: Benchmark, prompts: Sequence[Prompt], progress: Progress) -> list[Rollout]:
        return [rollout(p, s, is_success) for p in prompts for s, is_success in enumerate(worlds)]

    about = {"max_new_tokens": 50} | ({"conversations": limits} if limits else {})
    with EvaluationFolder(folder, {"benchmarks": {"b": about}}) as saved:
        result = run_benchmark(benchmark(), generate, len(worlds), 2, saved)
        saved.finish({}, "")
    return result


def test_rows_of_conversations_hold_their_transcript_and_measures(tmp_path: Path) -> None:
    result = run(tmp_path / "a", [True, False])
    lines = (tmp_path / "a" / "rows.jsonl").read_text().splitlines()
    assert sorted(map(json.loads, lines), key=str) == sorted(result.rows, key=str)
    for row in result.rows:
        assert row["completion"] == TRANSCRIPT
        assert (row["turns"], row["tool_errors"], row["score"]) == (2, 1, 0.5)
        assert row["details"] == DETAILS
        assert (row["is_correct"], row["num_tokens"]) == (row["sample"] == 0, 3)
        assert row["answer"] == "7"  # of the last turn
    assert run(tmp_path / "a", [True, False]).rows == result.rows


def test_scores_of_conversations_are_summed_up_with_intervals(tmp_path: Path) -> None:
    result = run(tmp_path / "a", [True, False])
    record = result.summary()
    assert list(record["conversations"]) == ["score", "match"]
    assert record["counts"] == {"n": 2}  # n is no share, why no number
    assert record["partial_details"] == {}
    value, low, high = record["conversations"]["match"]
    assert low < value == 0.25 < high
    assert (record["turns_mean"], record["tool_errors_mean"]) == (2, 1)
    table = as_markdown([result], "t")
    assert "| match       |  25.0 % [" in table
    assert "| turns       |" in table


def test_details_are_shares_or_counts_by_their_type() -> None:
    found: list[dict[str, float | int | str]] = [
        {"calls": 0, "extra": 0, "right": 1.0, "reward": 0.5, "lost": 0.0, "why": ""},
        {"calls": 1, "extra": 1, "right": 0.0, "reward": 3.0, "why": "x"},
        {"calls": 1, "extra": 4, "right": 0.0, "reward": 0.5, "lost": 1.0, "why": ""},
    ]
    rollouts = [rollout(p, 0, details=details) for p, details in zip(PROMPTS, found, strict=True)]
    result = run_benchmark(benchmark(), lambda *_: rollouts, 1)
    record = result.summary()
    assert list(record["conversations"]) == ["score", "right"]
    assert record["conversations"]["right"][0] == pytest.approx(1 / 3)
    assert record["counts"] == pytest.approx({"calls": 2 / 3, "extra": 5 / 3, "reward": 4 / 3})
    assert record["partial_details"] == {"lost": 2}
    rows = [line.split("|")[1:3] for line in as_markdown([result], "t").splitlines()[6:]]
    table = {name.strip(): value.strip() for name, value in rows}
    assert (table["calls"], table["extra"], table["reward"]) == ("0.67", "1.67", "1.33")
    assert table["lost"] == "2 of 3 conversations have it"
    assert table["right"].startswith("33.3 % [")


def test_conversations_have_no_vote() -> None:
    found = score([[True, False]], [["1", "2"]], None)
    assert found.mean_at_k is not None
    assert found.maj_at_k is None


def test_rows_of_single_answers_have_no_such_keys(tmp_path: Path) -> None:
    answers = [Rollout(p, 0, (1,), (1,), text="7") for p in PROMPTS]
    result = run_benchmark(benchmark(), lambda *_: answers, 1)
    assert {row["completion"] for row in result.rows} == {"7"}
    assert not {"turns", "tool_errors", "score", "details"} & result.rows[0].keys()


def test_samples_of_a_run_are_transcripts() -> None:
    found = run_benchmark(benchmark(), lambda *_: [rollout(p, 0) for p in PROMPTS], 1)
    components: Any = SimpleNamespace(tokenizer=tiny_tokenizer())
    samples = [_sample(components, 4, one) for one in found.rollouts]
    assert [sample["completion"] for sample in samples] == [TRANSCRIPT] * 3


def test_evaluations_of_conversations_are_compared(tmp_path: Path) -> None:
    run(tmp_path / "a", [True, False], max_turns=8)
    run(tmp_path / "b", [True, True], max_turns=8)
    (difference,) = compare_evaluations([tmp_path / "a", tmp_path / "b"]).differences
    assert difference.interval.value == pytest.approx(0.5)


@pytest.mark.parametrize("limits", [{}, {"max_turns": 9}])
def test_conversations_of_other_limits_are_not_paired(
    tmp_path: Path, limits: dict[str, int]
) -> None:
    run(tmp_path / "a", [True], max_turns=8)
    run(tmp_path / "b", [True], **limits)
    comparison = compare_evaluations([tmp_path / "a", tmp_path / "b"])
    assert comparison.differences == ()
    assert comparison.notes == ("b measured b otherwise (max_turns): no paired difference.",)
