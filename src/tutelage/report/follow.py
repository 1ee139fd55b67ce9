"""A page that follows runs: written whenever their files have grown, until they have ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tutelage.errors import RunError

LOGS = ("manifest.json", "metrics.jsonl", "evaluation.jsonl", "samples.jsonl", "tokens.jsonl")
RELOAD_S = 5
"""How often the page loads itself again, and how often the runs' files are looked at."""


def follow(
    runs: Sequence[Path],
    write: Callable[[int | None], Path],
    log: Callable[[str], None] = print,
    wait: Callable[[float], None] = time.sleep,
) -> Path:
    """Write a page about runs while they train, and once more when their students are there.

    Args:
        runs: run folders, perhaps before their first step.
        write: writes the page and returns its path, given the seconds after which the page loads
            itself again; None for a page that does not.
        log: receives one line while there is nothing to show, one when the page is there, and one
            when all runs have ended.
        wait: pauses for some seconds.

    Returns:
        The path of the page, which no longer reloads itself.

    Raises:
        RunError: a folder is not there, holds a malformed line, or the page cannot be written.
    """
    for run in runs:
        if not run.is_dir():
            raise RunError(f"{run} is not a folder. Name the output folder of a training run.")
    one, some = ("the run", "the run has") if len(runs) == 1 else ("the runs", "the runs have")
    seen: list[list[tuple[int, int]]] = []
    has_page = is_told = False
    while not all(map(has_ended, runs)):
        found = [[_state(run / name) for name in LOGS] for run in runs]
        if found != seen and all(size for states in found for size, _ in states[:2]):
            page = write(RELOAD_S)
            if not has_page:
                log(f"{page} follows {one}; Ctrl-C stops that and leaves {one} alone")
            has_page, seen = True, found
        elif not has_page and not is_told:
            log(f"waiting for the first step of {one}")
            is_told = True
        wait(RELOAD_S)
    log(f"{some} ended")
    return write(None)


def has_ended(run: Path) -> bool:
    """Whether the student was exported after the last step, which a continued run undoes."""
    student, metrics = run / "student", run / "metrics.jsonl"
    return (
        student.is_dir()
        and metrics.is_file()
        and student.stat().st_mtime_ns >= metrics.stat().st_mtime_ns
    )


def _state(path: Path) -> tuple[int, int]:
    """Size and time of change; zeros where there is no file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_size, found.st_mtime_ns
