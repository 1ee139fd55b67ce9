"""A page that follows a run: written whenever the run's files have grown, until it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tutelage.errors import RunError
from tutelage.report.run_page import write_report

LOGS = ("manifest.json", "metrics.jsonl", "evaluation.jsonl", "samples.jsonl", "tokens.jsonl")
RELOAD_S = 5
"""How often the page loads itself again, and how often the run's files are looked at."""


def follow(
    run: Path,
    out: Path | None = None,
    log: Callable[[str], None] = print,
    wait: Callable[[float], None] = time.sleep,
) -> Path:
    """Write the report of a run while it trains, and once more when its student is there.

    Args:
        run: run folder, perhaps before its first step.
        out: as for `write_report`.
        log: receives one line when the page is there, and one when the run has ended.
        wait: pauses for some seconds.

    Returns:
        The path of the page, which no longer reloads itself.

    Raises:
        RunError: the folder is not there, holds a malformed line, or the page cannot be written.
    """
    if not run.is_dir():
        raise RunError(f"{run} is not a folder. Name the output folder of a training run.")
    seen: list[tuple[int, int]] = []
    has_page = False
    while not has_ended(run):
        found = [_state(run / name) for name in LOGS]
        if found != seen and all(size for size, _ in found[:2]):
            page = write_report(run, out, RELOAD_S)
            if not has_page:
                log(f"{page} follows the run; Ctrl-C stops that and leaves the run alone")
            has_page, seen = True, found
        wait(RELOAD_S)
    log("the run has ended")
    return write_report(run, out)


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
