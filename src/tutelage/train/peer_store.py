"""Heartbeats of the processes of a run, in the store that they have in common."""

from __future__ import annotations

from dataclasses import replace

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from tutelage.errors import RunError
from tutelage.setup.common_store import Address, CommonStore
from tutelage.train.heartbeat import State

DONE = "done"
"""What process 0 says at last, in place of a line about one that is lost."""
_SERVERS: list[TCPStore] = []
"""Stores that live in this process: they serve until it ends, so that the others can print once."""


class PeerStore(CommonStore):
    """Heartbeats of all processes.

    Args:
        address: of the store.
        timeout_s: seconds that an answer may take.
        number: of runs that the process had before.
        place: tells a run from others whose processes are given the same port; a launcher's store
            is of one run.
    """

    def __init__(
        self, address: Address, timeout_s: float, number: int = 0, place: str = ""
    ) -> None:
        super().__init__(address, timeout_s)
        run = f"peers {number} {place if address.is_in_process_0 else ''}"
        self._keys = [address.key(f"{run}/{rank}") for rank in range(address.count)]
        self._line = address.key(f"{run}/line")

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

    def agreed(self, line: str) -> str:
        """What the first process said that found one lost, or process 0 at the end: `DONE`.

        Args:
            line: what this one would say.

        Raises:
            RuntimeError: the store did not answer.
        """
        return bytes(self.answer(lambda client: client.compare_set(self._line, "", line))).decode()

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


def first_line(error: BaseException) -> str:
    """Of its text; its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
