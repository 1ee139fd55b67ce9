"""A child process that does not read, stops or dies costs its deadline and no more.

Deadlines that are to be met are out of reach, those that end what would go on for ever are short.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from patience import HANG_S
from tutelage.grading.child import Child

LARGE = {"text": "x" * (1 << 21)}
"""Larger than any pipe's buffer."""
SOON_S = 0.3
READY = "import signal, sys\nprint('{}', flush=True)\n"
PROGRAMS = {
    "never reads": "signal.pause()",
    "reads a little": "sys.stdin.read(5)\nsignal.pause()",
    "closes its input": "sys.stdin.close()\nsignal.pause()",
    "is gone": "",
}
ECHO = "for line in sys.stdin: print(line, end='', flush=True)"


def start(folder: Path, body: str) -> Child:
    program = folder / "program.py"
    program.write_text(READY + body)
    child = Child(program)
    assert child.has_started()
    return child


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[Child]:
    child = start(tmp_path, ECHO)
    yield child
    if child.is_alive:
        child.kill()


def test_a_message_larger_than_the_pipe_arrives(echo: Child) -> None:
    for _ in range(3):
        assert echo.request(LARGE, time.monotonic() + HANG_S) == LARGE
    assert echo.is_alive


@pytest.mark.parametrize("body", PROGRAMS.values(), ids=PROGRAMS)
def test_one_that_does_not_read_is_killed_at_the_deadline(tmp_path: Path, body: str) -> None:
    child = start(tmp_path, body)
    assert child.request(LARGE, time.monotonic() + SOON_S) is None
    assert not child.is_alive


def test_one_that_is_stopped_is_killed_at_the_deadline(echo: Child) -> None:
    os.kill(echo.pid, signal.SIGSTOP)
    assert echo.request(LARGE, time.monotonic() + SOON_S) is None
    assert not echo.is_alive


def test_without_a_deadline_the_sender_would_wait(tmp_path: Path) -> None:
    """The negative control: the same message in one blocking write."""
    child = start(tmp_path, PROGRAMS["never reads"])
    os.set_blocking(child._stdin.fileno(), True)
    sender = threading.Thread(
        target=child.request, args=(LARGE, time.monotonic() + SOON_S), daemon=True
    )
    sender.start()
    sender.join(1.0)  # three times its deadline, and it would wait for ever
    assert sender.is_alive()
    os.kill(child.pid, signal.SIGKILL)
    sender.join(HANG_S)
    assert not sender.is_alive()
