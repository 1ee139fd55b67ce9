"""Where a command says what it is doing while nothing else is to be seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Watch(Protocol):
    """Receives each phase as it begins, and counts within it; an empty text ends the last one."""

    def __call__(self, text: str, done: int = 0, total: int = 0) -> None:
        """The phase, and how much of it is done where that is known (`total` above 0)."""


def unwatched(text: str, done: int = 0, total: int = 0) -> None:
    """Nobody watches."""


def unsaid(text: str) -> None:
    """Where a line that a user should see goes if nobody asked for such lines."""


def counting(watch: Watch, text: str, total: int) -> Callable[[int], None]:
    """Begins a phase; the result is called with the number of things that were just finished."""
    done = 0
    watch(text, 0, total)

    def progress(count: int) -> None:
        nonlocal done
        done += count
        watch(text, done, total)

    return progress
