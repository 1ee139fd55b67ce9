"""A program in a process of its own, asked over pipes and killed when it exceeds its time."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from tutelage.errors import RunError

START_LIMIT_S = 60.0
"""Seconds a program may take to start on a busy machine; normally it takes one at most."""

_PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV", "PYTHONHOME")


class Child:
    """One process that carries JSON lines; used by one thread at a time.

    Args:
        program: Python file. It writes a line when it is ready and one for every line it reads. It
            gets this process's import path and none of its secrets.
        python: Its interpreter; None for this process's.
        variables: Its environment variables, instead of that path and what `PATH` and the like say.
        errors: Where its standard error goes; None drops it.
    """

    def __init__(
        self,
        program: Path,
        python: str | None = None,
        variables: Mapping[str, str] | None = None,
        errors: IO[bytes] | None = None,
    ) -> None:
        if variables is None:
            kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
            path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
            variables = {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [python or sys.executable, "-P", str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors or subprocess.DEVNULL,
            # A Ctrl-C at the terminal is the caller's to handle: an answer may still be asked for.
            process_group=0,
            env={**variables, "PYTHONHASHSEED": "0"},
            bufsize=0,
        )
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RunError("a child process has no pipes, got none. Report this as a bug.")
        os.set_blocking(stdin.fileno(), False)
        self._stdin, self._stdout = stdin, stdout
        self._received = b""
        self._is_ready = False

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def has_started(self) -> bool:
        """Whether the program is ready; waits for it once. One that does not start is killed."""
        if not self._is_ready:
            self._is_ready = self._receive(time.monotonic() + START_LIMIT_S) is not None
            if not self._is_ready:
                self.kill()
        return self._is_ready

    def request(self, value: dict[str, Any], deadline: float) -> dict[str, Any] | None:
        """The reply; None when the process failed or ran out of time, and is dead.

        Args:
            value: Request, as JSON.
            deadline: Moment of `time.monotonic` at which the process is killed.
        """
        is_sent = self._send(json.dumps(value).encode() + b"\n", deadline)
        reply = self._receive(deadline) if is_sent else None
        if reply is None:
            self.kill()
        return reply

    def _send(self, line: bytes, deadline: float) -> bool:
        """Whether the process took the line; one that is stopped leaves the pipe full."""
        left = memoryview(line)
        poll = select.poll()
        poll.register(self._stdin, select.POLLOUT)
        try:
            while left and poll.poll(max(deadline - time.monotonic(), 0) * 1000):
                left = left[self._stdin.write(left) or 0 :]  # as much as the pipe holds
        except OSError:
            return False
        return not left

    def _receive(self, deadline: float) -> dict[str, Any] | None:
        poll = select.poll()
        poll.register(self._stdout, select.POLLIN | select.POLLHUP)
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                return None
            chunk = self._stdout.read(65536)
            if not chunk:
                return None
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            return None  # no JSON, so no reply
        return reply if isinstance(reply, dict) else None

    def finish(self, seconds: float) -> None:
        """End the process's input and give it so long to end by itself."""
        self._stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def stop(self) -> None:
        """End the process at once; who waits for a reply of it, in any thread, gets none."""
        self._process.kill()
        self._process.wait()

    def kill(self) -> None:
        """End the process at once and close its pipes."""
        self.stop()
        self._stdin.close()
        self._stdout.close()
