"""Signals: the first asks a run to stop and save, the second ends it at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedError(BaseException):
    """Work that leaves no trace was given up because a signal asked to stop.

    No `Exception`, like KeyboardInterrupt: who explains bad files must not take it for one.
    """


class Stop:
    """Becomes true when a signal asks the run to stop.

    Args:
        may_interrupt: whether work may be given up half-way; several processes must instead finish
            the step together.
        is_over: whether another process is lost, so that a signal ends the run at once.
    """

    def __init__(
        self, may_interrupt: bool = True, is_over: Callable[[], bool] = lambda: False
    ) -> None:
        self.is_set = False
        self.may_interrupt = may_interrupt
        self._is_over = is_over
        self._is_inside = False

    def __bool__(self) -> bool:
        return self.is_set

    def ask(self) -> None:
        """Ask to stop.

        Raises:
            StoppedError: inside `interruptible`.
            KeyboardInterrupt: it was asked before, or a process is lost.
        """
        if self.is_set or self._is_over():
            raise KeyboardInterrupt
        self.is_set = True
        if self._is_inside:
            raise StoppedError

    @contextmanager
    def interruptible(self, is_agreed: bool = False) -> Iterator[None]:
        """Around long work that changes nothing which is kept: a signal ends it at once.

        Args:
            is_agreed: several processes end it together, though `may_interrupt` is False.

        Raises:
            StoppedError: the run is to stop.
        """
        self._is_inside = self.may_interrupt or is_agreed
        try:
            if self.is_set and self._is_inside:
                raise StoppedError
            yield
        finally:
            self._is_inside = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Around what processes do together: a signal inside `interruptible` ends it afterwards.

        Raises:
            StoppedError: the run is to stop.
        """
        was_inside, self._is_inside = self._is_inside, False
        try:
            yield
        finally:
            self._is_inside = was_inside
        if was_inside and self.is_set:
            raise StoppedError


@contextmanager
def listening(stop: Stop) -> Iterator[None]:
    """SIGINT and SIGTERM ask `stop`."""

    def ask(_number: int, _frame: FrameType | None) -> None:
        stop.ask()  # nothing is printed here: the signal may have come while something was

    old = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
