"""Processes that compare formulas, killed when they exceed their time or memory.

A worker is a program of its own (`_worker.py`) behind two pipes that carry JSON lines, so
callers need no main guard, may be threads, and never wait for a library that hangs. Workers start
when the first formula needs one, are reused, and end with the interpreter.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from tutelage.errors import MissingExtraError, TutelageError
from tutelage.grading.child import Child

T = TypeVar("T")

TIME_LIMIT_S = 5.0
"""Wall-clock seconds, with the wait for a free worker, after which a comparison is given up."""
COMPARE_LIMIT_S = 3.0
"""Seconds of it for the comparison itself; then its worker is killed. The start of a worker has
`child.START_LIMIT_S` of its own."""
_LEAST_S = 1.0
"""Seconds that a comparison has after any wait."""
MAX_WORKERS = max(2, min(16, 2 * (os.cpu_count() or 1)))
"""Workers at once; further callers wait for one."""

AT_ONCE = max(2, min(16, os.cpu_count() or 1))
"""Comparisons that `in_parallel` makes at the same time."""

_PROGRAM = Path(__file__).with_name("_worker.py")


class GraderError(TutelageError, RuntimeError):
    """The process that compares formulas does not start."""


class Worker(Child):
    """A process that compares; used by one thread at a time."""

    def __init__(self) -> None:
        super().__init__(_PROGRAM)

    def ask(self, request: dict[str, Any], called: float) -> dict[str, Any] | None:
        """The reply to a request; None when the worker failed or ran out of time, and is dead."""
        if not self.has_started():
            raise GraderError(
                f"the grader's process did not start, got {_installed()}. Install what "
                "the project's extra 'math' asks for and check that memory is left."
            )
        left = min(COMPARE_LIMIT_S, called + TIME_LIMIT_S - time.monotonic())
        deadline = time.monotonic() + max(left, _LEAST_S)
        return self.request({**request, "alarm_s": int(TIME_LIMIT_S) + 2}, deadline)


def _installed() -> str:
    found = []
    for name in ("math-verify", "latex2sympy2_extended", "antlr4-python3-runtime"):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


class Pool:
    """Idle workers, and counts of what could not be decided."""

    def __init__(self) -> None:
        self._idle: list[Worker] = []
        self._parents: list[Worker] = []
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(MAX_WORKERS)
        self.undecided: Counter[str] = Counter()

    def equal(self, kind: str, prediction: str, gold: str) -> bool:
        """Whether two formulas are equal; what cannot be decided in time is not, and is counted."""
        with self._slots:
            called = time.monotonic()
            worker = self._take()
            with ExitStack() as on_error:
                on_error.callback(worker.kill)
                reply = worker.ask({"kind": kind, "prediction": prediction, "gold": gold}, called)
                on_error.pop_all()
            # The next worker starts while this thread goes on.
            with self._lock:
                self._idle.append(worker if reply else Worker())
        reason = reply["reason"] if reply else "killed"
        if reason:
            self.note(reason.split()[0])
        return bool(reply and reply["equal"])

    def note(self, reason: str) -> None:
        """Count a comparison that could not be decided."""
        with self._lock:
            self.undecided[reason] += 1

    def _take(self) -> Worker:
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.is_alive:
                    return worker
                worker.kill()
        return Worker()

    def close(self) -> None:
        """End all idle workers."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.kill()

    def forget(self) -> None:
        """After a fork: the workers are the parent's, and are kept only not to be collected."""
        self._parents = self._idle
        self._idle = []
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(MAX_WORKERS)


_pool = Pool()
atexit.register(_pool.close)
os.register_at_fork(after_in_child=_pool.forget)


def formulas_equal(kind: str, prediction: str, gold: str) -> bool:
    """Whether two formulas, read by math-verify's parser, are equal; decided in a worker.

    Args:
        kind: ``value`` for expressions, ``relation`` for equations and inequalities.
        prediction: Tidy LaTeX.
        gold: Tidy LaTeX.

    Raises:
        MissingExtraError: math-verify is not installed.
        GraderError: No worker can be started.
    """
    if find_spec("math_verify") is None:
        raise MissingExtraError("math-verify[antlr4-13-2]", "math", "Comparing formulas")
    return _pool.equal(kind, prediction, gold)


def in_parallel(work: Callable[..., T], *arguments: Iterable[Any]) -> list[T]:
    """`map` by several threads, for work that mostly waits for the processes that compare."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(work, *arguments))


def note_undecided(reason: str) -> None:
    """Count a comparison that was not even asked for, because a formula is hostile or unknown."""
    _pool.note(reason)


def undecided() -> dict[str, int]:
    """Comparisons so far that could not be decided and counted as wrong, by reason."""
    return dict(_pool.undecided)


def close_workers() -> None:
    """End the worker processes; the next comparison starts new ones."""
    _pool.close()
