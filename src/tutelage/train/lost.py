"""What is said of a process that is lost, and how an error that follows from it is recognized."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tutelage.train.heartbeat import Lost, State

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def line_of(lost: Lost, state: State, here: str, limit_s: float, left: str) -> str:
    """One line about a lost process.

    Args:
        lost: which, and how.
        state: its last heartbeat.
        here: host of this process; another one is named.
        limit_s: longest silence.
        left: from where the same command continues.
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
        return f"{lost.line} {left}"
    line = f"process {lost.rank}{where} {what[lost.kind]}"
    return line if lost.kind == "error" else f"{line} {left}"


def left_in(folder: Path, known: str) -> str:
    """From where the same command continues.

    Args:
        folder: of the run.
        known: name of a checkpoint that the process that writes them has seen; "" for none.
    """
    newest = max(newest_in(folder), known, key=_step)
    if newest:
        return f"The same command continues from {newest}."
    return "The same command starts anew: there is no checkpoint yet."


def newest_in(folder: Path) -> str:
    """Name of the newest checkpoint that this process sees; "" for none."""
    try:
        names = [name for name in os.listdir(folder) if _CHECKPOINT.fullmatch(name)]
    except OSError:  # no folder yet, or one of another machine
        return ""
    return max(names, key=_step, default="")


def _step(name: str) -> int:
    found = _CHECKPOINT.fullmatch(name)
    return int(found.group(1)) if found else -1


def first_line(error: BaseException) -> str:
    """Of its text; its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
