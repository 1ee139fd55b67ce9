"""Heartbeats of the processes of a run, in the store that they have in common."""

from __future__ import annotations

from dataclasses import replace

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from tutelage.errors import RunError
from tutelage.setup.common_store import Address, CommonStore
from tutelage.train.heartbeat import State
from tutelage.train.lost import first_line

_SERVERS: list[TCPStore] = []
"""Stores that live in this process: they serve until it ends, so that the others can print once."""


def run_name(number: int = 0, place: str = "") -> str:
    """A name among the runs that may use one store.

    Args:
        number: of runs that the process had before.
        place: what tells the run from those of other processes; "" where the store has no others.
    """
    return f"{number} {place}".strip()


class PeerStore(CommonStore):
    """Heartbeats of all processes.

    Args:
        address: of the store.
        run: its `run_name`.
        timeout_s: seconds that an answer may take.
    """

    def __init__(self, address: Address, run: str, timeout_s: float) -> None:
        super().__init__(address, timeout_s)
        self._keys = [address.key(f"peers {run}/{rank}") for rank in range(address.count)]

    def serve(self) -> None:
        """Be the store, in the process that has it.

        Raises:
            RunError: the port cannot be used.
        """
        host, port = self.address.host, self.address.port
        try:  # torch's own rendezvous finds it in this process, and takes it
            server = TCPStore(host, port, is_master=True, wait_for_workers=False, multi_tenant=True)
        except DistError as error:
            raise RunError(
                f"MASTER_PORT {port} of MASTER_ADDR {host!r} cannot be used: {first_line(error)}. "
                "Choose another port in every process."
            ) from None
        _SERVERS.append(server)

    def exchange(self, own: State) -> list[State]:
        """Write this process's heartbeat, and read all.

        Raises:
            RuntimeError: the store did not answer.
            ValueError: it holds something else.
        """

        def both(client: TCPStore) -> list[bytes]:
            client.set(self._keys[self.address.rank], own.to_json())
            found: list[bytes] = client.multi_get(self._keys)
            return found

        return [State.from_json(text) for text in self.answer(both)]

    def report_killed(self, rank: int, line: str) -> None:
        """Write that a process was ended, unless it wrote by itself how it ended.

        Raises:
            RuntimeError: the store did not answer.
            ValueError: it holds something else.
        """
        key = self._keys[rank]
        found = State.from_json(self.answer(lambda client: client.get(key)))
        if not found.end:
            text = replace(found, end="killed", line=line).to_json()
            self.answer(lambda client: client.set(key, text))

    def _prepare(self, client: TCPStore) -> None:
        for key in self._keys:  # so that reading one never waits for its process
            client.compare_set(key, "", State().to_json())
