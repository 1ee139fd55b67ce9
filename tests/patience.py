"""No test depends on how fast the machine is: nothing gives up, or speaks, because it is slow."""

from __future__ import annotations

import time
from collections.abc import Callable
from subprocess import Popen
from typing import Any

from tutelage.commands import progress
from tutelage.grading import child
from tutelage.grading import pool as grading_pool
from tutelage.setup import common_store
from tutelage.train import peers

HANG_S = 1800.0
"""Only what would never end takes so long."""


def unhurried() -> None:
    """In this process the limits of working code are out of reach.

    A test of a limit sets one of its own, for work that would never end.
    """
    child.START_LIMIT_S = HANG_S
    grading_pool.TIME_LIMIT_S = grading_pool.COMPARE_LIMIT_S = HANG_S
    common_store.ANSWER_S = HANG_S
    progress.DELAY_S = HANG_S
    peers.ERROR_GRACE_S = HANG_S


def wait_until(is_so: Callable[[], bool], process: Popen[Any]) -> None:
    """Until it is so; the process must not end before."""
    end = time.monotonic() + HANG_S
    while not is_so():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.02)
