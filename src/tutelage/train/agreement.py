"""Work that every process of a run, or its main process alone, does at one point of the run.

An error in one process is the same error in all of them, so that none waits for one that has ended.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator

from tutelage.errors import RunError, explained_write
from tutelage.files.atomic import temporary_beside
from tutelage.setup.shares import Shares

T = TypeVar("T")
_NUM_LOOKS = 20
_PERIOD_S = 0.5
"""A file system that hosts share may show them a new file after a while."""


def in_all(accelerator: Accelerator, work: Callable[[], T]) -> list[T]:
    """Call a function in every process, and wait for all.

    Args:
        accelerator: the processes.
        work: waits for no other process.

    Returns:
        What it returned in each process, in the order of processes.

    Raises:
        TutelageError: it failed in some process; as `Shares.apart`.
    """
    return Shares(accelerator.num_processes, accelerator.process_index).gathered_of(work)


def in_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Call a function in the main process, and wait for it in every process.

    Returns:
        What it returned, in every process.

    Raises:
        TutelageError: it failed there.
    """
    found = in_all(accelerator, lambda: work() if accelerator.is_main_process else None)
    value: T = found[0]  # type: ignore[assignment]
    return value


def require_shared(accelerator: Accelerator, folder: Path) -> None:
    """Refuse a run folder that some process does not share with the main process.

    Raises:
        RunError: it is another folder, or none, on the host of a process.
    """
    if accelerator.num_processes == 1:
        return

    def mark() -> tuple[str, str]:
        place = temporary_beside(folder / "shared")
        with explained_write(place, "Checkpoints are untouched."):
            place.touch()
        return place.name, platform.node()

    def look() -> None:
        for _ in range(_NUM_LOOKS):
            if (folder / name).exists():
                return
            time.sleep(_PERIOD_S)
        raise RunError(
            f"run folder {folder} of process 0 on {host} is not there for process "
            f"{accelerator.process_index} on {platform.node()}. Choose an out=FOLDER on a file "
            "system that all hosts share."
        )

    name, host = in_main(accelerator, mark)
    try:
        in_all(accelerator, look)
    finally:
        if accelerator.is_main_process:
            (folder / name).unlink(missing_ok=True)
