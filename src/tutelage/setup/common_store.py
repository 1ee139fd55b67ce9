"""The key-value store by which the processes of a command find each other.

It is in the launcher (torchrun's agent, `tutelage.commands.launch`), or in process 0 where each
process was started by itself.
"""

from __future__ import annotations

import math
import os
import platform
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import TypeVar

from torch.distributed import TCPStore  # type: ignore[attr-defined]

Answer = TypeVar("Answer")
ANSWER_S = 5.0
"""Most seconds that an answer may take."""
_PROBE_S = 1.0
"""Seconds in which a connection is accepted or refused."""
_RETRY_S = 1.0
"""Seconds after which a broken connection is made anew: the other end may be about to be gone."""
_FIRST: dict[str, bool] = {}
"""Lines that were to be printed, and whether by this process."""


@dataclass(frozen=True)
class Address:
    """Where the store is, and who this process is in it."""

    rank: int
    count: int
    host: str
    port: int
    is_in_process_0: bool
    """Else it is in a launcher."""
    attempt: str = "0"
    """How often a launcher has started the processes again; they find its old store."""

    @property
    def is_owner(self) -> bool:
        """Whether this process has the store."""
        return self.is_in_process_0 and self.rank == 0

    def key(self, name: str) -> str:
        """Name of a value, which no earlier attempt has set."""
        return f"tutelage/{self.attempt}/{name}"

    def is_open(self) -> bool:
        """Whether something listens there; True if that cannot be known, since it is slow."""
        try:
            socket.create_connection((self.host, self.port), _PROBE_S).close()
        except TimeoutError:
            return True
        except OSError:
            return False
        return True

    def connect(self, timeout_s: float = 300.0) -> TCPStore:
        """A client of the store.

        Raises:
            RuntimeError: nothing listens there, or it does not answer.
        """
        if not self.is_open():  # torch would try for long, and print a page
            raise RuntimeError(f"nothing listens at {self.host}:{self.port}")
        timeout = timedelta(seconds=timeout_s)
        place = (self.host, self.port)
        return TCPStore(*place, is_master=False, wait_for_workers=False, timeout=timeout)


def address_of(environment: Mapping[str, str] = os.environ) -> Address | None:
    """The store of a command; None for a single process.

    Args:
        environment: names and values that the launcher set.
    """
    numbers = [environment.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
    host = environment.get("MASTER_ADDR", "")
    if not host or not all(number.isdecimal() for number in numbers):
        return None
    rank, count, port = map(int, numbers)
    if count < 2 or rank >= count:  # what is wrong here, torch says
        return None
    is_in_process_0 = environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Address(rank, count, host, port, is_in_process_0, attempt)


class Asking:
    """Questions to what may never answer, each in a thread of its own, one at a time."""

    def __init__(self) -> None:
        self._pending: threading.Thread | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether the last question was not answered in time."""
        return self._pending is not None

    def ask(self, question: Callable[[], Answer], limit_s: float) -> Answer:
        """The answer to a question.

        Raises:
            RuntimeError: there is none in time, or not yet to the question before.
        """
        if self._pending is not None:
            self._pending.join(limit_s)
            if self._pending.is_alive():
                raise RuntimeError("the question before is not answered")
        found: queue.SimpleQueue[tuple[Answer | None, Exception | None]] = queue.SimpleQueue()

        def work() -> None:
            try:
                found.put((question(), None))
            except (OSError, RuntimeError, ValueError) as error:
                found.put((None, error))

        self._pending = threading.Thread(target=work, name="asking", daemon=True)
        self._pending.start()
        try:
            answer, error = found.get(timeout=limit_s)
        except queue.Empty:
            raise RuntimeError("there is no answer in time") from None
        self._pending = None
        if error is not None:
            raise error
        return answer  # type: ignore[return-value]


class CommonStore:
    """A client whose questions take limited time.

    torch's, when its own time is over, waits without a limit for the store to take that in, which
    one that is stopped never does.

    Args:
        address: of the store.
        timeout_s: seconds that an answer may take.
    """

    def __init__(self, address: Address, timeout_s: float) -> None:
        self.address, self._timeout_s = address, timeout_s
        self._asking = Asking()
        self._broken_at = -math.inf
        self._client: TCPStore | None = None

    @property
    def is_reached(self) -> bool:
        """Whether the store answered the last time."""
        return self._client is not None and not self._asking.is_waiting

    def answer(self, question: Callable[[TCPStore], Answer]) -> Answer:
        """What the store answers; after an error, the next call connects anew.

        Raises:
            RuntimeError: it did not answer.
        """

        def ask() -> Answer:
            try:
                return question(self._connected())
            except RuntimeError:
                if self._client is not None:
                    self._client, self._broken_at = None, time.monotonic()
                raise

        return self._asking.ask(ask, self._timeout_s)

    def _connected(self) -> TCPStore:
        if self._client is None:
            if time.monotonic() - self._broken_at < _RETRY_S:
                raise RuntimeError("the connection broke a moment ago")
            client = self.address.connect(self._timeout_s)
            self._prepare(client)
            self._client = client
        return self._client

    def _prepare(self, client: TCPStore) -> None:
        """What a new connection begins with."""


def is_first_to_print(line: str, store: CommonStore | None = None) -> bool:
    """Whether no other process has printed this line to where this process prints.

    Processes of one terminal or one log print it once; true if the store cannot be reached. Who
    asks again, when the store may be gone, gets the same answer.

    Args:
        line: that is to be printed.
        store: a client that has been used; else one is made.
    """
    if line not in _FIRST:
        _FIRST[line] = _is_first(line, store)
    return _FIRST[line]


def _is_first(line: str, store: CommonStore | None) -> bool:
    address = address_of() if store is None else store.address
    if address is None or (store is not None and not store.is_reached):
        return True
    key = address.key(f"printed/{sha256(f'{_output()} {line}'.encode()).hexdigest()}")
    try:
        return (store or CommonStore(address, ANSWER_S)).answer(lambda s: s.add(key, 1)) == 1
    except RuntimeError:
        return True


def _output() -> str:
    """Names the file, pipe or terminal behind standard error."""
    host = platform.node()
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # closed, or replaced by something else
        return f"{host} {os.getpid()}"
    return f"{host} {found.st_dev} {found.st_ino}"
