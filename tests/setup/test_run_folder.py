"""The run folder: one writer at a time, logs without torn or repeated steps."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
from datetime import datetime
from importlib import metadata
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tutelage import __version__
from tutelage.errors import RunError, explained_write
from tutelage.files.atomic import write_atomically
from tutelage.setup.run_folder import RunFolder, environment, started_at


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.open()
    return folder


def logged_steps(folder: RunFolder) -> list[int]:
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_a_second_writer_is_refused_until_the_first_closes(folder: RunFolder) -> None:
    with pytest.raises(RunError, match=f"in use by process {os.getpid()} on") as caught:
        RunFolder(folder.path).open()
    assert "\n" not in str(caught.value)
    folder.close()
    second = RunFolder(folder.path)
    second.open()
    second.close()


@pytest.fixture
def unlocked(tmp_path: Path) -> Path:
    """A run folder that no process has open."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize("text", ["", '{"pid": 12', "12", "{}"])
def test_a_lock_without_a_readable_owner_is_taken_over(unlocked: Path, text: str) -> None:
    (unlocked / "lock").write_text(text)
    RunFolder(unlocked).open()
    assert json.loads((unlocked / "lock").read_text())["pid"] == os.getpid()


def test_the_lock_of_a_killed_process_is_taken_over(unlocked: Path) -> None:
    """Also where its number lives on in another process, as it does in containers."""
    child = os.fork()
    if child == 0:
        RunFolder(unlocked).open()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert json.loads((unlocked / "lock").read_text())["pid"] == child
    owner = {"pid": os.getpid(), "host": platform.node()}
    (unlocked / "lock").write_text(json.dumps(owner))
    RunFolder(unlocked).open()


def test_the_lock_of_a_living_process_is_respected(unlocked: Path) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        RunFolder(unlocked).open()
        os.write(write, b"1")
        signal.pause()
    os.read(read, 1)
    try:
        with pytest.raises(RunError, match=f"in use by process {child} on"):
            RunFolder(unlocked).open()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_the_lock_of_another_machine_is_respected(unlocked: Path) -> None:
    (unlocked / "lock").write_text(json.dumps({"pid": 2**22 + 1, "host": "elsewhere"}))
    with pytest.raises(RunError, match=r"on elsewhere\. Wait for it, or delete"):
        RunFolder(unlocked).open()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be written.*Choose another with out=FOLDER") as e:
        RunFolder(tmp_path / "file" / "run").open()
    assert "\n" not in str(e.value)


def test_a_run_that_could_not_begin_leaves_no_folder(tmp_path: Path) -> None:
    empty, used, there = (RunFolder(tmp_path / name) for name in ("empty", "used", "there"))
    there.path.mkdir()  # somebody else's
    for folder in (empty, used, there):
        folder.open()
    (used.path / "note").touch()
    for folder in (empty, used, there):
        folder.close()
    assert [folder.path.exists() for folder in (empty, used, there)] == [False, True, True]


def test_run_folders_are_private(folder: RunFolder) -> None:
    assert folder.path.stat().st_mode & 0o077 == 0
    assert (folder.path / "lock").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_json_are_refused_and_leave_no_line(
    folder: RunFolder, value: float
) -> None:
    folder.append("metrics.jsonl", [{"step": 1}])
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.append("metrics.jsonl", [{"step": 2}, {"step": 3, "loss": value}])
    assert logged_steps(folder) == [1]


@given(steps=st.lists(st.integers(0, 9), max_size=12), cut=st.integers(-1, 10), tear=st.booleans())
def test_rewinding_keeps_whole_lines_up_to_a_step(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], cut: int, tear: bool
) -> None:
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    folder.append("metrics.jsonl", [{"step": step} for step in steps])
    if tear:
        with (folder.path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 0, "lo')
    folder.rewind(cut)
    assert logged_steps(folder) == [step for step in steps if step <= cut]


@pytest.mark.parametrize(
    "torn", ['{"step": 1', '{"step": 1}', "nonsense\n", '{"loss": 1}\n', "3\n"]
)
def test_lines_that_no_whole_record_ends_are_dropped(folder: RunFolder, torn: str) -> None:
    folder.append("metrics.jsonl", [{"step": 1}])
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    folder.rewind(5)
    assert logged_steps(folder) == [1]
    folder.append("metrics.jsonl", [{"step": 2}])
    assert logged_steps(folder) == [1, 2]


def test_the_manifest_is_read_back_or_refused(folder: RunFolder) -> None:
    assert folder.read_manifest() is None
    folder.write_manifest({"config": {"seed": 1}})
    assert folder.read_manifest() == {"config": {"seed": 1}}
    path = folder.path / "manifest.json"
    for torn in ('{"fing', "", "\xff", "[" * 100_000):
        path.write_text(torn, encoding="latin-1")
        with pytest.raises(RunError, match=r"manifest\.json cannot be read.*Choose another out"):
            folder.read_manifest()
    for other in ("{}", "[]", "null", "3", '"a"', '{"config": []}', '{"config": null}'):
        path.write_text(other)
        with pytest.raises(RunError, match=r"manifest\.json holds no configuration of a run"):
            folder.read_manifest()


@pytest.mark.parametrize("date", [5, "yesterday", [], "2001-02-30"])
def test_a_run_s_date_is_a_date(date: object) -> None:
    assert started_at(None) is None
    assert started_at({}) is None
    assert started_at({"started": "2001-02-03T04:05:06"}) == datetime(2001, 2, 3, 4, 5, 6)
    with pytest.raises(RunError, match="the date at which the run began"):
        started_at({"started": date})


def test_a_source_tree_without_an_installation_has_versions_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    versions = environment()["versions"]
    assert versions["tutelage"] == __version__
    assert versions["torch"] is None


def test_the_environment_names_what_sums_are_rounded_by(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment()["hardware"]["variables"] == {}
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    found = environment()["hardware"]
    assert found["variables"] == {"ONEDNN_MAX_CPU_ISA": "SSE41"}
    assert found["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert found["torch_threads"] == torch.get_num_threads()


def test_replacing_a_file_leaves_no_temporary_one(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.json", "1")
    write_atomically(tmp_path / "a.json", "2")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "2")]


def test_a_lock_that_cannot_be_removed_hides_no_other_error(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", broken)
        folder.close()
    assert (folder.path / "lock").exists()
    RunFolder(folder.path).open()  # nobody holds it


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "Free some space and start"), (errno.EACCES, "Make it writable and start")],
)
def test_a_failed_write_says_what_helps(tmp_path: Path, number: int, advice: str) -> None:
    with (
        pytest.raises(RunError, match=f"Kept. {advice} the same command again") as caught,
        explained_write(tmp_path / "x", "Kept."),
    ):
        raise OSError(number, "reason")
    assert str(caught.value).startswith(f"{tmp_path / 'x'} cannot be written: reason.")
