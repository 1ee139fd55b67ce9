"""Commands besides `train` in several processes: they share their work out, and one speaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from tutelage.commands.launch import num_processes
from tutelage.commands.progress import PhaseReporter
from tutelage.models.device import find_device
from tutelage.setup.launcher import launcher_warning, open_processes
from tutelage.setup.phases import PhaseCallback, no_log, no_phases
from tutelage.setup.shares import Shares
from tutelage.train.signals import Stop, StoppedError, listening


@dataclass(frozen=True)
class Sharing:
    """How this process takes part in a command."""

    shares: Shares
    on_phase: PhaseCallback
    log: Callable[[str], None]


@contextmanager
def sharing(device: str) -> Iterator[Sharing]:
    """The processes that a launcher started, or this one alone.

    A signal to one of several interrupts all; alone, it interrupts as it does any program.

    Args:
        device: as `find_device` takes it.

    Raises:
        KeyboardInterrupt: one of several processes was interrupted.
    """
    with PhaseReporter() as reporter:
        if warning := launcher_warning(num_processes()):
            reporter.log(f"warning: {warning}")
        if num_processes() == 1:
            yield Sharing(Shares(), reporter, reporter.log)
            return
        stop = Stop(may_interrupt=False)
        interruptible = partial(stop.interruptible, is_agreed=True)
        try:
            with open_processes(find_device(device)) as (count, index), listening(stop):
                shares = Shares(count, index, StoppedError, interruptible)
                if shares.is_main:
                    yield Sharing(shares, reporter, reporter.log)
                else:
                    yield Sharing(shares, no_phases, no_log)
        except StoppedError:
            raise KeyboardInterrupt from None
