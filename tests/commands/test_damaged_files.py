"""Whatever a file of a run or evaluation holds instead: one line and exit code 2, or it works."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from calling import LEDGER, TINY, Outcome, call

from tutelage.config.parse import load_config
from tutelage.errors import RunError
from tutelage.evaluation.folder import EvaluationFolder
from tutelage.setup.run_folder import RunFolder
from tutelage.train.checkpoint import newest_checkpoint
from tutelage.train.model_card import model_card

OTHER = ["{}", "[]", "null", "3", '"a"', "", '{"a', "[" * 100_000, "\x00\xff", "{}\n[]\n"]
"""Other values than the file's, cut off, nested beyond measure, and no text at all."""
RUN_FILES = ["manifest.json", "metrics.jsonl", "evaluation.jsonl", "evaluation_rows.jsonl",
             "samples.jsonl", "tokens.jsonl"]  # fmt: skip
CONFIG = load_config(LEDGER)


def variants(path: Path) -> list[bytes]:
    """Other contents: those of `OTHER`, and the file's own with a key gone or of another type."""
    found = [text.encode("latin-1") for text in OTHER]
    try:
        first = json.loads(path.read_text().splitlines()[0] if path.suffix == ".jsonl" else
                           path.read_text())  # fmt: skip
    except ValueError:
        return found
    for number, key in enumerate(first):
        value = ({}, None, "x", [1])[number % 4]
        changed = ({k: v for k, v in first.items() if k != key}, first | {key: value})
        found.append((json.dumps(changed[number % 2]) + "\n").encode())
    return found


def is_explained(outcome: Outcome) -> bool:
    """Exit code 0, or 2 with one line of our own at the end and no traceback."""
    if outcome.code == 0:
        return True
    lines = outcome.err.strip().splitlines()
    return (
        outcome.code == 2 and lines[-1].startswith("tutelage: ") and "Traceback" not in outcome.err
    )


@pytest.fixture
def run(trained: tuple[Path, Outcome], tmp_path: Path) -> Path:
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name", RUN_FILES)
def test_files_of_a_run_that_is_compared(run: Path, name: str) -> None:
    path = run / name
    for content in variants(path) if path.exists() else []:
        path.write_bytes(content)
        outcome = call("compare", run, run, "--json")
        assert is_explained(outcome), (content[:80], outcome.err[-300:])


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluation.jsonl"])
def test_logs_of_a_run_that_is_continued(run: Path, name: str) -> None:
    folder = RunFolder(run)
    for content in variants(run / name):
        (run / name).write_bytes(content)
        try:
            folder.rewind(3)
            for row in folder.read(name):
                assert {"step", "num_skipped_updates"} <= row.keys() or "mean_at_k" in row
            folder.has_evaluation(3)
            model_card(CONFIG, folder.read("evaluation.jsonl"), {"commit": None, "versions": {}})
        except RunError as error:
            assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("content", OTHER)
@pytest.mark.parametrize("name", ["checkpoint-000003/state.json", "lock"])
def test_seals_and_locks(run: Path, name: str, content: str) -> None:
    (run / name).write_bytes(content.encode("latin-1"))
    folder = RunFolder(run)
    folder.open()
    with suppress(RunError):
        newest_checkpoint(run, lambda _: None)
    folder.close()


@pytest.mark.parametrize("content", ["{}", "[]", '{"config": {}}', '{"config": {"seed": "a"}}'])
def test_a_manifest_of_no_run_is_one_line_everywhere(run: Path, content: str) -> None:
    (run / "manifest.json").write_text(content)
    for command in (
        ("train", LEDGER, *TINY, f"out={run}"),
        ("check", LEDGER, *TINY, f"out={run}"),
        ("eval", run, "--suite", "held-out"),
    ):
        outcome = call(*command)
        assert outcome.code == 2, command
        assert is_explained(outcome), outcome.err[-300:]
        assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("name", ["settings.json", "rows.jsonl"])
def test_files_of_an_evaluation(tmp_path: Path, name: str) -> None:
    settings = {"model": "m", "num_samples": 1, "benchmarks": {"b": {"num_problems": 1}}}
    row = {"benchmark": "b", "prompt_id": "p", "sample": 0, "is_correct": True, "answer": "1",
           "is_truncated": False, "num_tokens": 3, "gold": "1", "completion": "1"}  # fmt: skip
    with EvaluationFolder(tmp_path, settings) as folder:
        folder.append([row])
    for content in variants(tmp_path / name):
        (tmp_path / name).write_bytes(content)
        try:
            with EvaluationFolder(tmp_path, settings) as folder:
                for found in folder.find("b", ["p"], 1) or []:
                    assert found.keys() >= row.keys() - {"gold"}
        except RunError as error:
            assert "\n" not in str(error)  # noqa: PT017
        outcome = call("compare", tmp_path, tmp_path)
        assert is_explained(outcome), (content[:80], outcome.err[-300:])
