"""Runs the code of tools and environments: whatever it does, the rollouts of the step go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """What went wrong in code that is not ours."""

    reason: str
    is_timeout: bool = False


def attempt(function: Callable[[], T]) -> T | Failure:
    """The result of a function, or how it failed."""
    try:
        return function()
    except Exception as error:
        return Failure(f"{type(error).__name__}: {' '.join(str(error).split())}"[:400])


class _Running(threading.Thread, Generic[T]):
    """A function in a thread that nobody has to wait for."""

    def __init__(self, function: Callable[[], T]) -> None:
        super().__init__(daemon=True)
        self.function = function
        self.result: T | Failure | None = None

    def run(self) -> None:
        self.result = attempt(self.function)


_AT_ONCE = 64
"""Threads at the same time."""


def attempt_all(functions: Sequence[Callable[[], T]], seconds: float) -> list[T | Failure]:
    """The results of functions, or how each failed; at most 64 run at the same time.

    A function that takes longer than `seconds` is a failure; its thread goes on by itself, so what
    it works on must not be used again.
    """
    results: list[T | Failure] = []
    for start in range(0, len(functions), _AT_ONCE):
        results += _attempt_together(functions[start : start + _AT_ONCE], seconds)
    return results


def _attempt_together(functions: Sequence[Callable[[], T]], seconds: float) -> list[T | Failure]:
    running = [_Running(function) for function in functions]
    for thread in running:
        thread.start()
    end = time.monotonic() + seconds
    results: list[T | Failure] = []
    for thread in running:
        thread.join(max(0.0, end - time.monotonic()))
        if thread.is_alive() or thread.result is None:
            results.append(Failure(f"no answer within {seconds:g} s", is_timeout=True))
        else:
            results.append(thread.result)
    return results
