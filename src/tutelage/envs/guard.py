"""Runs the code of tools and environments: whatever it does, the rollouts of the step go on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

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
    except (Exception, SystemExit) as error:
        return Failure(f"{type(error).__name__}: {' '.join(str(error).split())}"[:400])


class _Worker:
    """A thread that runs one function after the other; one that hangs is left behind."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._answered: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while (function := self._asked.get()) is not None:
            self._answered.put(attempt(function))

    def run(self, function: Callable[[], T], seconds: float) -> T | Failure:
        self._asked.put(function)
        try:
            found: T | Failure = self._answered.get(timeout=seconds)
        except queue.Empty:
            return Failure(f"no answer within {seconds:g} s", is_timeout=True)
        return found

    def end(self) -> None:
        self._asked.put(None)


def attempt_all(functions: Sequence[Callable[[], T]], seconds: float) -> list[T | Failure]:
    """The results of functions, or how each failed.

    They run one after the other, so that the limit of each is its own: beside others it would
    depend on what these take. A function that takes longer than `seconds` is a failure; its thread
    goes on by itself, so what it works on must not be used again.
    """
    results: list[T | Failure] = []
    if not functions:
        return results
    worker = _Worker()
    for function in functions:
        found = worker.run(function, seconds)
        results.append(found)
        if isinstance(found, Failure) and found.is_timeout:
            worker.end()
            worker = _Worker()
    worker.end()
    return results
