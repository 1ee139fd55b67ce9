"""Several processes of one command: how they stop, fail, and say a thing once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tutelage.cli import main
from tutelage.commands.launch import launch, rendezvous
from tutelage.errors import RunError
from tutelage.setup import common_store
from tutelage.setup.common_store import is_first_to_print

STOPPABLE = """
import os, signal, sys, time
def stop(*_):
    os.write(1, b"saved\\n")
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
os.write(1, b"ready\\n")
while True:
    time.sleep(0.01)
"""


def test_control_c_reaches_every_process_once_and_ends_without_a_traceback() -> None:
    program = "import sys\nfrom tutelage.commands.launch import launch\n"
    program += f"sys.exit(launch([sys.executable, '-c', {STOPPABLE!r}], 2))"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    finally:
        process.terminate()  # not killed: it would leave its processes behind
        process.wait()
    assert (process.returncode, out, err) == (130, "saved\n" * 2, "")


def test_a_signal_before_the_processes_are_there_reaches_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It comes while the first is being started."""
    start = subprocess.Popen
    reading, writing = os.pipe()

    def interrupted(*command: Any, **options: Any) -> Any:
        process = start(*command, **options, stdout=writing)
        assert os.read(reading, 6) == b"ready\n"
        if options["env"]["RANK"] == "0":
            signal.raise_signal(signal.SIGINT)
        return process

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    assert launch([sys.executable, "-c", STOPPABLE], 2) == 130
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"saved\n" * 2


@pytest.mark.parametrize(
    ("program", "code"),
    [("", 0), ("import sys; sys.exit(2)", 2),
     ("import os, sys; sys.exit(3 if os.environ['RANK'] == '1' else 0)", 3)],
)  # fmt: skip
def test_the_exit_code_is_that_of_the_first_that_failed(program: str, code: int) -> None:
    assert launch([sys.executable, "-c", program], 2) == code


def test_a_process_that_was_killed_is_spoken_for() -> None:
    program = "import os; os.kill(os.getpid(), 9 * int(os.environ['RANK']))"
    with pytest.raises(RunError, match=r"process 1 was ended by SIGKILL") as caught:
        launch([sys.executable, "-c", program], 2)
    assert "\n" not in str(caught.value)


def test_no_process_at_all_is_refused() -> None:
    with pytest.raises(RunError, match="must be 1 or more, got 0"):
        launch([sys.executable, "-c", ""], 0)


@pytest.fixture(name="two")
def _two(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Be one of two processes; a call is the next one, with other variables if these are given."""

    def become(**changes: str) -> None:
        monkeypatch.setattr(common_store, "_FIRST", {})
        for name, value in changes.items():
            monkeypatch.setenv(name, value)

    with rendezvous() as common:
        become(**common, WORLD_SIZE="2", RANK="0")
        yield become


def first(*lines: str) -> list[bool]:
    return [is_first_to_print(line) for line in lines]


def test_a_line_is_said_by_the_first_process_that_has_it(two: Callable[..., None]) -> None:
    assert first("a", "b", "a") == [True, True, True]
    two()
    assert first("a", "c", "a") == [False, True, False]


def test_processes_that_were_started_again_say_it_again(two: Callable[..., None]) -> None:
    """Their launcher keeps its store."""
    assert first("a")[0]
    two(TORCHELASTIC_RESTART_COUNT="1")
    assert first("a")[0]


def test_a_line_is_said_once_in_each_log(
    two: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert first("a")[0]
    two()
    with tempfile.TemporaryFile("w") as log:
        monkeypatch.setattr(sys, "stderr", log)
        assert first("a")[0]
        two()
        assert not first("a")[0]


def test_a_line_is_said_when_the_store_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common_store, "_FIRST", {})
    with rendezvous() as common:
        names = common | {"WORLD_SIZE": "2", "RANK": "0"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert first("a")[0]


@pytest.mark.parametrize(
    ("name", "value"), [("WORLD_SIZE", "x"), ("WORLD_SIZE", ""), ("RANK", "-1"),
                        ("MASTER_PORT", "tcp://h:1")]
)  # fmt: skip
def test_variables_of_a_launcher_that_are_no_numbers_are_refused(
    name: str, value: str, two: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    two(**{name: value})
    for command in (["report", "x"], ["eval", "x"]):
        assert main(command) == 2
        assert capsys.readouterr().err == (
            f"tutelage: the environment variable {name} must be a number, got {value!r}. Unset "
            "it, or start the processes by torchrun.\n"
        )


@pytest.mark.parametrize("command", [["check", "x.toml"], ["report", "x"], ["compare", "x"]])
def test_commands_that_share_nothing_are_refused_in_several_processes(
    command: list[str], two: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    first = capsys.readouterr().err
    two()
    assert main(command) == 2
    assert f"`tutelage {command[0]}` works in one process, got 2." in first
    assert ("`tutelage check --processes 2` plans" in first) == (command[0] == "check")
    assert first.count("\n") == 1
    assert capsys.readouterr().err == ""
