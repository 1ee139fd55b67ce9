"""A run in several processes of this machine, which start, stop and end together.

    python -m tutelage.commands.launch 2 train configs/examples/ledger.toml

runs `tutelage train configs/examples/ledger.toml` in two processes. torchrun starts them too, but
ends a run that Ctrl-C stopped with a traceback of its own and exit code 1.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType

from tutelage.errors import ConfigError, RunError, TutelageError

_PERIOD_S = 0.05
_GRACE_S = 15.0
"""Seconds that processes get to end by themselves after one of them failed."""


@contextmanager
def rendezvous() -> Iterator[dict[str, str]]:
    """The environment in which processes of this machine find each other, as torchrun sets it.

    The store listens on a port that the system chose, and keeps it, so that no other
    process takes it before it is used.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # they are clients, and start no store of their own
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    del store


@contextmanager
def started(
    command: Sequence[str], count: int, store: Mapping[str, str]
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """`count` processes of one command, none of which outlives the block.

    Args:
        command: the same in every process; variables such as `RANK` tell them apart.
        count: of processes.
        store: what `rendezvous` gives.
    """
    with ExitStack() as stack:
        common = os.environ | dict(store)
        common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        processes = []
        for rank in range(count):
            names = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # Sessions of their own: a terminal's Ctrl-C reaches them once, through `launch`.
            process = subprocess.Popen(command, env=common | names, start_new_session=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        yield processes


def launch(command: Sequence[str], count: int) -> int:
    """Run a command in several processes; SIGINT and SIGTERM reach all of them.

    Args:
        command: the same in every process.
        count: of processes.

    Returns:
        The exit code of the first that failed; else 130 if any was interrupted; else 0.

    Raises:
        RunError: fewer than one process, or one of them was ended by a signal.
    """
    if count < 1:
        raise RunError(f"the number of processes must be 1 or more, got {count}.")
    with _signals() as arrived, rendezvous() as store, started(command, count, store) as processes:
        while (codes := [process.poll() for process in processes]).count(None):
            _pass_on(arrived, processes)
            failed = [rank for rank, code in enumerate(codes) if code not in (None, 0, 130)]
            if failed:
                _report(failed, codes, store)
                _give_time(arrived, processes)
                return _common_code(failed[0], [process.poll() for process in processes])
            time.sleep(_PERIOD_S)
    return next((_explained(rank, code) for rank, code in enumerate(codes) if code), 0)


def _report(failed: Sequence[int], codes: Sequence[int | None], store: Mapping[str, str]) -> None:
    """Let the other processes know which one a signal ended, which it could not write itself."""
    killed = [rank for rank in failed if (codes[rank] or 0) < 0]
    if not killed or len(codes) < 2:
        return
    from tutelage.setup.common_store import ANSWER_S, address_of
    from tutelage.train.peer_store import PeerStore

    for rank in killed:
        environment = {**store, "RANK": str(rank), "WORLD_SIZE": str(len(codes))}
        address = address_of(environment)
        with suppress(RuntimeError, ValueError):  # it holds the store itself: nobody else ended it
            if address is not None:
                own = PeerStore(address, ANSWER_S)
                own.report_killed(rank, f"was ended by {_name(codes[rank])}")


def _common_code(first: int, codes: Sequence[int | None]) -> int:
    """The exit code of all: where a signal ended one, that of those which have said so."""
    if (codes[first] or 0) < 0 and 2 in codes:
        return 2
    return _explained(first, codes[first])


def _pass_on(arrived: list[int], processes: Sequence[subprocess.Popen[bytes]]) -> None:
    while arrived:
        number = arrived.pop(0)
        for process in processes:
            process.send_signal(number)


def _give_time(arrived: list[int], processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Without one of them the others wait for ever, unless they end for the same reason."""
    deadline = time.monotonic() + _GRACE_S
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        _pass_on(arrived, processes)
        time.sleep(_PERIOD_S)


def _explained(rank: int, code: int | None) -> int:
    """The exit code of a process; an error for one that a signal ended."""
    if code is not None and code >= 0:
        return code
    raise RunError(
        f"process {rank} was ended by {_name(code)}, and the others with it. Start the same "
        "command again: a run continues from its last checkpoint."
    )


def _name(code: int | None) -> str:
    """Of the signal that ended a process."""
    return signal.Signals(-(code or 0)).name


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Inside, SIGINT and SIGTERM only add themselves to this list, also before a process is there.

    One that came while a process was being started would otherwise miss it, or end this one.
    """
    arrived: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        arrived.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def num_processes() -> int:
    """How many processes the launcher started for this command; 1 without a launcher.

    Raises:
        ConfigError: a variable by which launchers tell this is no number.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    for name in ("WORLD_SIZE", *(("RANK", "MASTER_PORT") if count != "1" else ())):
        value = os.environ.get(name, "0")
        if not value.isdecimal():
            raise ConfigError(
                f"the environment variable {name} must be a number, got {value!r}. Unset it, or "
                "start the processes by torchrun."
            )
    return int(count)


def print_once(line: str) -> None:
    """Print an error, once for all processes of one terminal or log that end for that reason."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from tutelage.setup.common_store import is_first_to_print

        if not is_first_to_print(line):
            return
    print(f"tutelage: {line}", file=sys.stderr)


def main(arguments: Sequence[str]) -> int:
    """`N COMMAND …`: run a command of tutelage in N processes; returns the exit code."""
    try:
        if not arguments or not arguments[0].isdecimal():
            raise RunError(
                f"the first argument must be a number of processes, got {list(arguments[:1])}. "
                "Example: python -m tutelage.commands.launch 2 train configs/examples/ledger.toml"
            )
        command = [sys.executable, "-m", "tutelage", *arguments[1:]]
        return launch(command, int(arguments[0]))
    except TutelageError as error:
        print(f"tutelage: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
