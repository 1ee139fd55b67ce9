"""Several processes of one command: how they stop, fail, and say a thing once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from tutelage.cli import main
from tutelage.commands.launch import is_first_to_print, launch, rendezvous
from tutelage.errors import RunError

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


def test_a_line_is_said_by_the_first_process_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [is_first_to_print("alone") for _ in range(2)] == [True, True]
    with rendezvous() as common:
        for name, value in (common | {"WORLD_SIZE": "2"}).items():
            monkeypatch.setenv(name, value)
        assert [is_first_to_print(line) for line in ("a", "a", "b", "b")] == [
            True,
            False,
            True,
            False,
        ]


@pytest.mark.parametrize("command", [["check", "x.toml"], ["report", "x"], ["compare", "x"]])
def test_commands_that_share_nothing_are_refused_in_several_processes(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with rendezvous() as common:
        for name, value in (common | {"WORLD_SIZE": "2"}).items():
            monkeypatch.setenv(name, value)
        assert main(command) == 2
        first = capsys.readouterr().err
        assert main(command) == 2  # the other process
    assert f"`tutelage {command[0]}` works in one process, got 2." in first
    assert ("`tutelage check --processes 2` plans" in first) == (command[0] == "check")
    assert first.count("\n") == 1
    assert capsys.readouterr().err == ""
