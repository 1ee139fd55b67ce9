"""Commands besides `train` in several processes: they share their work out, and one speaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from tutelage.commands.launch import num_processes
from tutelage.commands.progress import PhaseReporter
from tutelage.models.device import find_device
from tutelage.setup.launcher import Processes, launcher_warning
from tutelage.setup.phases import PhaseCallback, no_log, no_phases
from tutelage.setup.shares import Shares
from tutelage.train.distributed import Leaving
from tutelage.train.peers import Peers
from tutelage.train.signals import Stop, StoppedError, listening


@dataclass(frozen=True)
class Sharing:
    """How this process takes part in a command."""

    shares: Shares
    on_phase: PhaseCallback
    log: Callable[[str], None]


@contextmanager
def sharing(device: str, limit_s: float = 600, is_saved: bool = False) -> Iterator[Sharing]:
    """The processes that a launcher started, or this one alone.

    A signal to one of several interrupts all; alone, it interrupts as it does any program.

    Args:
        device: as `find_device` takes it.
        limit_s: longest silence of a process, see `process_timeout_s`.
        is_saved: whether the same command continues where one was ended.

    Raises:
        LostProcessError: one of several processes is gone or silent.
        KeyboardInterrupt: one of several processes was interrupted.
    """
    with PhaseReporter() as reporter:
        if warning := launcher_warning(num_processes()):
            reporter.log(f"warning: {warning}")
        if num_processes() == 1:
            yield Sharing(Shares(), reporter, reporter.log)
            return
        left = "The same command continues." if is_saved else "Start the same command again."
        with Peers(lambda: left, limit_s) as peers:
            peers.meet()
            with _together(find_device(device), peers, reporter) as found:
                yield found


@contextmanager
def _together(device: torch.device, peers: Peers, reporter: PhaseReporter) -> Iterator[Sharing]:
    processes, stop = Processes(device), Stop(False, peers.is_lost)
    interruptible = partial(stop.interruptible, is_agreed=True)
    shares = Shares(processes.num_processes, processes.index, StoppedError, interruptible)
    try:
        with Leaving(processes), listening(stop):
            if shares.is_main:
                yield Sharing(shares, reporter, reporter.log)
            else:
                yield Sharing(shares, no_phases, no_log)
    except StoppedError:
        raise KeyboardInterrupt from None
