"""Work that the processes of a command share out by index, and how its results come together.

Item i is the work of process i modulo their number. Results are gathered by the main process alone,
which writes files; what ends the work of one process ends that of all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from functools import cache, partial
from typing import Any, TypeVar

import torch

from tutelage.errors import RunError, TutelageError
from tutelage.setup.common_store import Address, address_of
from tutelage.setup.phases import PhaseCallback, counting

T = TypeVar("T")
_NUMBERS = itertools.count()
"""Shares are made in the same order in every process: a number names them in all."""


_FAILURES = (TutelageError, RuntimeError, OSError, ValueError, MemoryError)


def on_cpu(value: T) -> T:
    """A value that is to be pickled for other processes.

    A tensor of a device would be pickled with the name of this process's device, and be opened
    there by all of them.

    Raises:
        ValueError: it has a tensor that is not on the CPU, in whatever dicts, lists, tuples
            and dataclasses.
    """
    found: list[Any] = [value]
    while found:
        each = found.pop()
        if isinstance(each, torch.Tensor) and each.device.type != "cpu":
            raise ValueError(f"a tensor for other processes is on {each.device}. Use .cpu().")
        if isinstance(each, Mapping):
            found += each.values()
        elif isinstance(each, list | tuple | set):
            found += each
        elif is_dataclass(each):
            found += (getattr(each, field.name) for field in fields(each))
    return value


class NoInterruption(BaseException):
    """Raised by nothing: the work of shares that no signal interrupts."""


class Shares:
    """The processes that share work. Every process has to call the same methods in the same order.

    Args:
        count: of processes.
        index: of this one; 0 is the main process.
        interruption: what a signal raises inside `interruptible`.
        interruptible: gives a context around work that a signal may end at once.
    """

    def __init__(
        self,
        count: int = 1,
        index: int = 0,
        interruption: type[BaseException] = NoInterruption,
        interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.count, self.index = count, index
        self._interruption, self._interruptible = interruption, interruptible
        self._may_interrupt = True
        self._number = next(_NUMBERS)
        self._num_phases = 0
        self._show_others: Callable[[], None] | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process gathers what the others found, and writes files."""
        return self.index == 0

    def mine(self, count: int) -> range:
        """Which of `count` items are this process's; none where there are fewer than processes."""
        return range(self.index, count, self.count)

    def collect(self, found: Mapping[int, T]) -> list[T]:
        """What all processes found, by index, in the main process; nothing in the others.

        Args:
            found: this process's results by the indices of their items; tensors are on the CPU.
        """
        if self.count == 1:
            return [found[i] for i in sorted(found)]
        parts: list[Any] | None = [None] * self.count if self.is_main else None
        torch.distributed.gather_object(on_cpu(dict(found)), parts)
        merged: dict[int, T] = {}
        for part in parts or []:
            merged |= part
        return [merged[i] for i in sorted(merged)]

    def told(self, value: T) -> T:
        """The main process's value, in every process."""
        if self.count == 1:
            return value
        values: list[Any] = [on_cpu(value) if self.is_main else None]
        torch.distributed.broadcast_object_list(values)
        told: T = values[0]
        return told

    def max(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over processes, in every process."""
        return [max(column) for column in zip(*self.gathered(list(values)), strict=True)]

    @contextmanager
    def uninterrupted(self, is_so: bool = True) -> Iterator[None]:
        """Inside, `apart` is interrupted when its work is done: the processes wait for each other
        in it, whatever `apart` says."""
        before, self._may_interrupt = self._may_interrupt, not is_so
        try:
            yield
        finally:
            self._may_interrupt = before

    def apart(self, work: Callable[[], T]) -> T:
        """Work in which no process waits for another.

        Raises:
            TutelageError: it failed in one process; all raise the same.
            interruption: a signal came in one process; all raise it, the others as soon as they
                have finished something (`progress`) or all.
        """
        kept: list[T] = []
        self.gathered_of(lambda: kept.append(work()))
        return kept[0]

    def gathered_of(self, work: Callable[[], T]) -> list[T]:
        """`apart`; what the work returned in each process, in every process."""
        if self.count == 1:
            return [work()]
        error: BaseException | None = None
        found: Any = None
        try:
            if self._may_interrupt:
                with self._interruptible():
                    found = on_cpu(work())
            else:
                found = on_cpu(work())
                with self._interruptible():
                    pass
        except self._interruption as interruption:
            error = interruption
            _store().set(self._key("interrupted"), "")
        except _FAILURES as failure:
            error = failure
        return self._agree(error, found)

    def in_main(self, work: Callable[[], T]) -> T | None:
        """`apart` for work of the main process; None in the others."""
        return self.apart(lambda: work() if self.is_main else None)

    def check(self) -> None:
        """Before a step that all processes take together, which no signal may end in one alone.

        Raises:
            interruption: a signal came in one process; all raise it.
        """
        if self.count > 1:
            self.apart(lambda: None)

    def progress(self, on_phase: PhaseCallback, text: str, total: int) -> Callable[[int], None]:
        """Begins a phase, as `counting` does; the main process shows what all have finished.

        The result is called with the number of things that this process just finished.

        Raises:
            interruption: by the result, inside `apart`: a signal came in another process.
        """
        if self.count == 1:
            return counting(on_phase, text, total)
        self._num_phases += 1
        name, store = self._key(f"phase {self._num_phases}"), _store()
        on_phase(text, 0, total)
        shown = 0

        def show(count: int) -> None:
            nonlocal shown
            done = store.add(name, count)
            if done > shown:
                shown = done
                on_phase(text, done, total)
            if done >= total:
                self._show_others = None

        def progress(count: int) -> None:
            if self._may_interrupt and store.check([self._key("interrupted")]):
                raise self._interruption
            show(count)

        self._show_others = partial(show, 0) if self.is_main else None
        return progress

    def _agree(self, error: BaseException | None, found: T) -> list[T]:
        """Every process ends its work by the first error of any, if there was one; or all have
        what each found."""
        text = None
        if isinstance(error, TutelageError):
            text = str(error)
        elif isinstance(error, Exception):
            said = str(error).strip().split("\n")[0]
            text = f"process {self.index} failed: {type(error).__name__}: {said[:200]}"
        told = self.gathered((isinstance(error, self._interruption), text, found))
        failed = [text for _, text, _ in told if text is not None]
        if failed:
            raise error if isinstance(error, Exception) else RunError(failed[0])
        if any(is_interrupted for is_interrupted, _, _ in told):
            raise error or self._interruption()
        if self._show_others is not None:
            self._show_others()
        return [found for _, _, found in told]

    def gathered(self, value: T) -> list[T]:
        """Every process's value, in every process."""
        values: list[Any] = [value] * self.count
        if self.count > 1:
            torch.distributed.all_gather_object(values, on_cpu(value))
        return values

    def _key(self, name: str) -> str:
        return _address().key(f"shares {self._number}/{name}")


def _address() -> Address:
    address = address_of()
    if address is None:
        raise RuntimeError("several processes need RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT")
    return address


@cache
def _store() -> Any:
    """What the processes tell each other without waiting: the store where they found each other."""
    return _address().connect()


ALONE = Shares()
"""One process, whose share is all of the work."""
