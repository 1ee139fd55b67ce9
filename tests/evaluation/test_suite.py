"""An evaluation in chunks: cut off anywhere it continues to the same bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tutelage.data.types import Prompt, Rollout
from tutelage.errors import DataError, RunError
from tutelage.evaluation.benchmark import Benchmark, Progress, Result, run_benchmark
from tutelage.evaluation.folder import EvaluationFolder
from tutelage.evaluation.scores import Voting
from tutelage.evaluation.tables import as_markdown, summarize

NUM_SAMPLES = 3


def answer(prompt: Prompt, sample: int) -> str:
    return f"\\boxed{{{(len(prompt.id) * 7 + sample) % 4}}}"


class Model:
    """Completions that depend on the batch they are drawn in, as those of a real model may."""

    def __init__(self, dies_at: int = 10**9) -> None:
        self.num_calls = 0
        self.dies_at = dies_at

    def __call__(
        self, benchmark: Benchmark, prompts: Sequence[Prompt], progress: Progress
    ) -> list[Rollout]:
        self.num_calls += 1
        if self.num_calls == self.dies_at:
            raise KeyboardInterrupt
        batch = "+".join(prompt.id for prompt in prompts)
        return [
            Rollout(
                p,
                s,
                (),
                (0,) * (benchmark.max_new_tokens - s),
                s == 2,
                text=f"{batch} {answer(p, s)}",
            )
            for p in prompts
            for s in range(NUM_SAMPLES)
        ]


def benchmark() -> Benchmark:
    prompts = tuple(Prompt("p" * (1 + i % 5) + str(i), "x" * (20 - i), "1") for i in range(11))
    return Benchmark("b", prompts, lambda p, text, _: f"{{{p.answer}}}" in text, 50)


def run(folder: Path | None, model: Model, settings: dict[str, Any] | None = None) -> Result:
    if folder is None:
        return run_benchmark(benchmark(), model, NUM_SAMPLES, 4)
    with EvaluationFolder(folder, settings or {"seed": 1}) as saved:
        return run_benchmark(benchmark(), model, NUM_SAMPLES, 4, saved)


@pytest.fixture
def whole(tmp_path: Path) -> tuple[Result, bytes]:
    """An evaluation that nothing interrupted, and its rows."""
    result = run(tmp_path / "whole", Model())
    return result, (tmp_path / "whole" / "rows.jsonl").read_bytes()


def test_rows_are_in_the_order_of_the_problems_and_complete(whole: tuple[Result, bytes]) -> None:
    result, content = whole
    ids = [(p.id, s) for p in benchmark().prompts for s in range(NUM_SAMPLES)]
    assert [(row["prompt_id"], row["sample"]) for row in result.rows] == ids
    rows = [json.loads(line) for line in content.splitlines()]
    assert sorted(map(json.dumps, rows)) == sorted(map(json.dumps, result.rows))
    assert result.rows == run(None, Model()).rows
    assert result.scores.mean_at_k is not None
    right = [f"{{{1}}}" in row["completion"] for row in rows]
    assert 0 < sum(right) < len(right)
    assert result.scores.mean_at_k.value == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("dies_at", [1, 2, 3])
def test_interrupted_it_continues_to_the_same_bytes(
    tmp_path: Path, whole: tuple[Result, bytes], dies_at: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Model(dies_at))
    model = Model()
    result = run(tmp_path / "cut", model)
    assert model.num_calls == 3 - (dies_at - 1)
    assert (tmp_path / "cut" / "rows.jsonl").read_bytes() == whole[1]
    assert result == whole[0]
    again = Model(dies_at=1)
    assert run(tmp_path / "cut", again) == whole[0]


def test_cut_after_any_byte_it_continues_to_the_same_bytes(
    tmp_path: Path, whole: tuple[Result, bytes]
) -> None:
    content = whole[1]
    for size in range(0, len(content), 97):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / "rows.jsonl").write_bytes(content[:size])
        assert run(folder, Model()) == whole[0]
        assert (folder / "rows.jsonl").read_bytes() == content


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path, Model())
    before = (tmp_path / "rows.jsonl").read_bytes()
    with pytest.raises(RunError, match=r"seed differ \(seed was 1, is 2\)"):
        run(tmp_path, Model(), {"seed": 2})
    assert (tmp_path / "rows.jsonl").read_bytes() == before


def test_the_date_of_the_first_start_is_kept(tmp_path: Path) -> None:
    with EvaluationFolder(tmp_path, {"seed": 1}) as first:
        began = first.started
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"seed": 1, "started": "2001-02-03T04:05:06"}))
    with EvaluationFolder(tmp_path, {"seed": 1}) as again:
        assert again.started == datetime(2001, 2, 3, 4, 5, 6) != began
    path.write_text(json.dumps({"seed": 1}))  # of an earlier version
    with EvaluationFolder(tmp_path, {"seed": 1}) as earlier:
        assert earlier.started is None
    path.write_text(json.dumps({"seed": 1, "started": "soon"}))
    with pytest.raises(RunError, match="must hold a date as 'started', got 'soon'"):
        EvaluationFolder(tmp_path, {"seed": 1}).__enter__()


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    run(tmp_path, Model())
    path = tmp_path / "rows.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], b'{"benchmark": 1}\n', *lines[5:]]))
    with pytest.raises(RunError, match=r"rows\.jsonl, line 5 is damaged"):
        run(tmp_path, Model())


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with EvaluationFolder(tmp_path, {}), pytest.raises(RunError, match="in use"):
        EvaluationFolder(tmp_path, {}).__enter__()
    with EvaluationFolder(tmp_path, {}):
        pass


@pytest.mark.parametrize("fault", ["missing", "twice", "swapped"])
def test_no_gap_is_ever_filled(tmp_path: Path, fault: str) -> None:
    def complete(
        benchmark: Benchmark, prompts: Sequence[Prompt], progress: Progress
    ) -> list[Rollout]:
        drawn = Model()(benchmark, prompts, progress)
        faulty = {"missing": drawn[:-1], "twice": [*drawn, drawn[0]], "swapped": drawn[::-1]}
        return faulty[fault]

    with (
        EvaluationFolder(tmp_path, {}) as saved,
        pytest.raises(DataError, match="Nothing of this chunk was saved"),
    ):
        run_benchmark(benchmark(), complete, NUM_SAMPLES, 4, saved)
    assert (tmp_path / "rows.jsonl").read_bytes() == b""


def test_the_grader_knows_which_completions_were_cut_off() -> None:
    lenient = benchmark()
    strict = replace(
        lenient,
        grade=lambda p, text, is_truncated: not is_truncated and lenient.grade(p, text, False),
        voting=Voting(lambda text, is_truncated: None if is_truncated else text),
    )
    of = {b: run_benchmark(b, Model(), NUM_SAMPLES, 4) for b in (lenient, strict)}
    assert any(row["is_correct"] and row["is_truncated"] for row in of[lenient].rows)
    assert not any(row["is_correct"] and row["is_truncated"] for row in of[strict].rows)
    assert {row["answer"] for row in of[strict].rows if row["is_truncated"]} == {None}
    assert of[strict].summary()["truncated_share"] == pytest.approx(1 / 3)


def test_tables(whole: tuple[Result, bytes]) -> None:
    result = whole[0]
    one = summarize([result], {"model": "m"})
    assert one["mean_at_k"] == result.summary()["mean_at_k"]
    two = summarize([result, result], {"model": "m"})
    assert two["benchmarks"]["b"]["maj_at_k"] == two["maj_at_k"]
    lines = as_markdown([result, result], "title").splitlines()
    header = "| | problems | mean@3 | pass@3 | maj@3 | cut off | tokens |"
    assert " ".join(lines[2].split()) == header
    assert len({len(line) for line in lines[2:]}) == 1
    assert "33.3 %" in lines[4]
    assert lines[6].startswith("| average")
