"""What is said of a process that is lost, and how an error that follows from it is recognized."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from tutelage.train.heartbeat import Lost, State

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def line_of(lost: Lost, state: State, here: str, limit_s: float, left: Callable[[], str]) -> str:
    """One line about a lost process.

    Args:
        lost: which, and how.
        state: its last heartbeat.
        here: host of this process; another one is named.
        limit_s: longest silence.
        left: says what to do.
    """
    where = f" on {state.host}" if state.host not in ("", here) else ""
    limit = f"process_timeout_s = {limit_s:g} s"
    what = {
        "killed": f"{lost.line}.",
        "gone": f"(pid {state.pid}) is gone: it was killed or it crashed.",
        "silent": f"has been silent for longer than {limit}.",
        "late": f"has not started within {limit}.",
        "error": f"ended: {lost.line}",
        "interrupted": "was interrupted.",
    }
    if lost.kind == "lost":
        return lost.line
    if lost.kind == "launcher":
        return f"{lost.line} {left()}"
    line = f"process {lost.rank}{where} {what[lost.kind]}"
    return line if lost.kind == "error" else f"{line} {left()}"


def left_in(folder: Path) -> str:
    """From which checkpoint of a run's folder the same command continues."""
    try:
        found = [match for name in os.listdir(folder) if (match := _CHECKPOINT.fullmatch(name))]
    except OSError:  # no folder yet
        found = []
    if not found:
        return "The same command starts anew: there is no checkpoint yet."
    newest = max(found, key=lambda match: int(match.group(1)))
    return f"The same command continues from {newest.group()}."


def first_line(error: BaseException) -> str:
    """Of its text; its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
