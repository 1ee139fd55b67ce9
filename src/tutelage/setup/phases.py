"""How a long operation reports its phases and its lines of text to a caller that shows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class PhaseCallback(Protocol):
    """Receives each phase as it begins, and counts within it; an empty text ends the last one."""

    def __call__(self, text: str, done: int = 0, total: int = 0) -> None:
        """The phase, and how much of it is done where that is known (`total` above 0)."""


def no_phases(text: str, done: int = 0, total: int = 0) -> None:
    """A `PhaseCallback` that ignores its calls."""


def no_log(text: str) -> None:
    """A log function that drops its lines."""


def counting(on_phase: PhaseCallback, text: str, total: int) -> Callable[[int], None]:
    """Begins a phase; the result is called with the number of things that were just finished."""
    done = 0
    on_phase(text, 0, total)

    def progress(count: int) -> None:
        nonlocal done
        done += count
        on_phase(text, done, total)

    return progress
