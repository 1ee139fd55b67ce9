"""The key-value store that the processes of a run have in common, with a connection of its own.

It is the one by which torch's processes find each other: in the launcher (torchrun's agent,
`tutelage.commands.launch`), or in process 0 where each process was started by itself.
"""

from __future__ import annotations

import math
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from hashlib import sha256
from typing import TypeVar

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tutelage.train.heartbeat import State, own_state

Answer = TypeVar("Answer")
_PROBE_S = 1.0
"""Seconds in which a connection is accepted or refused."""
_RETRY_S = 1.0
"""Seconds after which a broken connection is made anew: the other end may be about to be gone."""
_SERVERS: list[TCPStore] = []
"""Stores that live in this process: they serve until it ends, so that the others can print once."""


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


def address_of(environment: Mapping[str, str]) -> Address | None:
    """The store of a run; None for one of a single process.

    Args:
        environment: names and values, such as `os.environ`.
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


class PeerStore:
    """Heartbeats of all processes, and which lines were printed.

    Args:
        address: of the store.
        run: names the run among those that may use the store.
        timeout_s: seconds that an answer may take.
    """

    def __init__(self, address: Address, run: str, timeout_s: float) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._pending: threading.Thread | None = None
        self._broken_at = -math.inf
        prefix = f"tutelage/peers/{address.attempt}/{run}"
        self._keys = [f"{prefix}/{rank}" for rank in range(address.count)]
        self._client: TCPStore | None = None

    @property
    def is_reached(self) -> bool:
        """Whether the store answered the last time."""
        return self._client is not None and self._pending is None

    def is_gone(self) -> bool:
        """Whether nothing listens at the store's address."""
        return not is_open(self.address.host, self.address.port)

    def serve(self) -> None:
        """Be the store, in the process that has it.

        Raises:
            RuntimeError: the port is in use.
        """
        place = (self.address.host, self.address.port)
        # torch's own rendezvous finds it in this process, and takes it
        server = TCPStore(*place, is_master=True, wait_for_workers=False, multi_tenant=True)
        _SERVERS.append(server)

    def exchange(self, own: State) -> list[State]:
        """Write this process's heartbeat, and read all.

        Raises:
            RuntimeError: the store did not answer; the next call connects anew.
            ValueError: it holds something else.
        """

        def both(client: TCPStore) -> list[bytes]:
            client.set(self._keys[self.address.rank], own.to_json())
            found: list[bytes] = client.multi_get(self._keys)
            return found

        return [State.from_json(text) for text in self._answer(both)]

    def report_killed(self, rank: int, line: str) -> None:
        """Write that a process was ended, unless it wrote by itself how it ended.

        Raises:
            RuntimeError: the store did not answer.
            ValueError: it holds something else.
        """
        key = self._keys[rank]
        found = State.from_json(self._answer(lambda client: client.get(key)))
        if not found.end:
            text = replace(found, end="killed", line=line).to_json()
            self._answer(lambda client: client.set(key, text))

    def is_first_to_print(self, line: str) -> bool:
        """Whether no process has printed this line to where this process prints.

        Processes of one terminal or one log print it once; true if the store cannot be reached.
        """
        if not self.is_reached:
            return True
        digest = sha256(f"{_output()} {line}".encode()).hexdigest()
        try:
            return self._answer(lambda client: client.add(f"tutelage/printed/{digest}", 1)) == 1
        except RuntimeError:
            return True

    def _answer(self, question: Callable[[TCPStore], Answer]) -> Answer:
        """What the store answers, in limited time.

        A client whose time is over waits, without a limit, for the store to take that in, which one
        that is stopped never does: a question has a thread of its own, and no other is asked until
        that has ended.

        Raises:
            RuntimeError: it did not answer.
        """
        if self._pending is not None:
            self._pending.join(self._timeout_s)
            if self._pending.is_alive():
                raise RuntimeError("the store has not answered the question before")
        found: queue.SimpleQueue[Answer | RuntimeError] = queue.SimpleQueue()

        def ask() -> None:
            try:
                found.put(question(self._connected()))
            except RuntimeError as error:
                if self._client is not None:
                    self._client, self._broken_at = None, time.monotonic()
                found.put(error)

        self._pending = threading.Thread(target=ask, name="peers-store", daemon=True)
        self._pending.start()
        try:
            answer = found.get(timeout=self._timeout_s)
        except queue.Empty:
            raise RuntimeError("the store did not answer in time") from None
        self._pending = None
        if isinstance(answer, RuntimeError):
            raise answer
        return answer

    def _connected(self) -> TCPStore:
        if self._client is None:
            place = (self.address.host, self.address.port)
            is_early = time.monotonic() - self._broken_at < _RETRY_S
            if is_early or not is_open(*place):  # torch would try for long, and print a page
                raise RuntimeError(f"nothing listens at {place}")
            timeout = timedelta(seconds=self._timeout_s)
            client = TCPStore(*place, is_master=False, timeout=timeout)
            for key in self._keys:  # so that reading one never waits for its process
                client.compare_set(key, "", State().to_json())
            self._client = client
        return self._client


def is_open(host: str, port: int) -> bool:
    """Whether something listens there; True if that cannot be known, since it is slow."""
    try:
        socket.create_connection((host, port), _PROBE_S).close()
    except TimeoutError:
        return True
    except OSError:
        return False
    return True


def _output() -> str:
    """Names the file, pipe or terminal behind standard error."""
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # closed, or replaced by something else
        return f"{own_state().host} {os.getpid()}"
    return f"{own_state().host} {found.st_dev} {found.st_ino}"
