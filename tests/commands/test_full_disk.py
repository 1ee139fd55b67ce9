"""A full disk, whatever is being written: one line that says where, why and what to do."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from calling import LEDGER, STUDENT, TEACHER, TINY, call, read_jsonl, succeed, write_jsonl

from tutelage.cli import main
from tutelage.evaluation.folder import ROWS
from tutelage.train.checkpoint import list_checkpoints
from tutelage.train.token_scores import Scores

REASON = os.strerror(errno.ENOSPC)
SMALL = (*TINY, "num_steps=1", "prompts_per_step=1", "sampling.max_new_tokens=4")
FEW = ("--num-prompts", "2", "--num-samples", "1", "--max-new-tokens", "4")


def fail(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, REASON)


def fail_on(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, of which this call and all after it find a full disk."""
    calls = []

    def counting(*arguments: Any, **named: Any) -> Any:
        calls.append(None)
        return fail() if len(calls) >= number else function(*arguments, **named)

    return counting


def refused(*command: object) -> str:
    """The one line with which a command ends."""
    outcome = call(*command)
    assert outcome.code == 2
    *before, line = outcome.err.splitlines()
    assert not any(text.startswith("tutelage:") or "Traceback" in text for text in before)
    assert line.startswith("tutelage: ")
    assert line.count(REASON) == 1
    assert line.lower().count("free some space and start the same command again.") == 1
    assert line.endswith("start the same command again.")
    return line


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    succeed("train", LEDGER, *SMALL, f"out={out}")
    return out


PLACES: dict[str, tuple[str, int]] = {
    "manifest": ("tutelage.setup.run_folder.write_atomically", 1),
    "log": ("tutelage.files.log.sync", 1),
    "checkpoint": ("tutelage.train.checkpoint.save_file", 1),
    "model of a checkpoint": ("tutelage.files.atomic.sync_tree", 1),
    "export": ("tutelage.files.atomic.sync_tree", 3),
}


@pytest.mark.parametrize("place", PLACES)
def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    name, number = PLACES[place]
    module, _, attribute = name.rpartition(".")
    with monkeypatch.context() as patch:
        owner = importlib.import_module(module)
        patch.setattr(owner, attribute, fail_on(number, getattr(owner, attribute)))
        line = refused("train", LEDGER, *SMALL, f"out={tmp_path / 'run'}")
    assert str(tmp_path) in line
    assert len(list_checkpoints(tmp_path / "run")) == (place == "export")


def test_an_evaluation_keeps_what_it_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = write_jsonl(tmp_path / "p.jsonl", {"prompt": "2+2=", "answer": "4"})
    for number in (1, 5, 6):  # the settings, the samples, the summary; folders count too
        out = tmp_path / f"evaluation-{number}"
        command = ("eval", TEACHER, "--suite", problems, *FEW[2:], "--out", out)
        with monkeypatch.context() as patch:
            patch.setattr("tutelage.files.atomic.os.fsync", fail_on(number, os.fsync))
            assert str(out) in refused(*command)
        succeed(*command)
        assert len(read_jsonl(out / ROWS)) == 1


def test_scores_leave_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rows = tmp_path / "tokens.jsonl", Scores.rows

    def some(scores: Scores) -> Iterator[dict[str, Any]]:
        yield next(rows(scores))
        fail()

    command = ("score", LEDGER, "--num-prompts", 1, "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(Scores, "rows", some)
        assert str(out) in refused(*command)
    assert not out.exists()
    succeed(*command)


@pytest.mark.parametrize("options", [("--out", "page.html"), ("--figures", "plots")])
def test_reports(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, str]
) -> None:
    monkeypatch.setattr("tutelage.files.atomic.os.fsync", fail)
    refused("report", run, options[0], tmp_path / options[1])


def test_standard_output(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code = main(["sample", STUDENT, *FEW])
    assert code == 2
    *_, last = capfd.readouterr().err.splitlines()  # after what tells of progress
    assert last == (
        f"tutelage: the output cannot be written: {REASON}. "
        "Free some space and start the same command again."
    )


def test_a_file_without_a_name_is_not_called_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed write does not say of which file."""
    monkeypatch.setattr("tutelage.commands.check.dry_run", fail)
    line = refused("check", "--dry-run", LEDGER)
    assert line.startswith("tutelage: a file, perhaps a temporary one in ")
    assert "output" not in line


def test_other_failures_are_still_seen(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    """The negative control: an error that no disk explains is a defect and not one line."""

    def broken(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("tutelage.commands.report.write_report", broken)
    with pytest.raises(OSError, match="Bad file descriptor"):
        call("report", run)
