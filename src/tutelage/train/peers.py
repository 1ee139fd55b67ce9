"""The other processes of a run: one that is gone or silent ends all, in one line.

Every process has a thread that writes a heartbeat each second and reads those of the others, so
that work of any length is no silence. Processes of the same machine are looked for among the
system's processes as well, which shows at once that one was killed.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import count as counter
from pathlib import Path
from types import TracebackType

from tutelage.errors import LostProcessError, RunError, TutelageError
from tutelage.models.sharding import is_of_connection
from tutelage.setup.common_store import (
    ANSWER_S,
    Address,
    Asking,
    address_of,
    is_first_to_print,
)
from tutelage.train.heartbeat import End, Lost, State, Watch, is_gone, own_state
from tutelage.train.lost import first_line, left_in, line_of
from tutelage.train.peer_store import PeerStore, run_name

PERIOD_S = 1.0
"""Seconds between two heartbeats."""
ERROR_GRACE_S = 3.0
"""Seconds that a process gets to end by itself after another one failed: often for one reason."""
_END_S = 3.0
"""Seconds that processes get to end: a main thread, which may be in a call that never returns, and
the others, for which the process that has the store stays."""
_DONE_S = 30.0
"""The same where that process ended properly, which the others have to read in its store."""
_ASK_S = 10.0
"""Seconds to find out which process broke a connection."""
_ASKED_SILENCE_S = 5.0
"""Longest silence once a connection is broken."""
_REFUSED_S = 2.0
"""Seconds of refused connections after which what has the store is gone."""
_LEAST_ANSWER_S = 1.0
"""Least seconds that the store has to answer."""
_RUNS = counter()


class Peers:
    """The processes of a command, of which this is one; for a single process it does nothing.

    A context manager: inside, from `watch` or `meet` on, a thread watches the others. If one is
    lost, the main thread ends with `LostProcessError`, or, where it cannot, the process with exit
    code 2. Process 0 writes files to the last: the others leave the block properly after it has.

    Args:
        left: called when a process is lost; says what to do in one sentence.
        limit_s: longest silence, `process_timeout_s`.
        environment: names and values that the launcher set.
        place: tells a run from others whose processes are given the same port.
    """

    def __init__(
        self,
        left: Callable[[], str],
        limit_s: float,
        environment: Mapping[str, str] = os.environ,
        place: str = "",
    ) -> None:
        self._to_do, self._limit_s, self._place = left, limit_s, place
        self._lock = threading.Condition()
        self._wake = threading.Event()
        self._is_closing = self._is_closed = False
        self._is_asked = self._is_waiting = self._is_unwinding = self._was_interrupted = False
        self._lost: BaseException | None = None
        self._own = own_state()
        self._written: End = ""
        self._thread: threading.Thread | None = None
        address = address_of(environment)
        if address is not None:
            self._prepare(address)

    def _prepare(self, address: Address) -> None:
        self._watch = Watch(address.rank, address.count)
        self._answer_s = min(max(self._limit_s / 4, _LEAST_ANSWER_S), ANSWER_S)
        # A launcher's store is of one run; at a port of process 0 there may be that of another run.
        name = run_name(next(_RUNS), self._place if address.is_in_process_0 else "")
        self._store = PeerStore(address, name, self._answer_s)
        # Every process reads every heartbeat: of many processes, less often.
        self._period_s = PERIOD_S * max(1, address.count / 64)
        self._gone = [False] * address.count
        self._states: list[State] | None = None
        self._has_reached = False
        self._refused_s = 0.0
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)

    # --- of the main thread -----------------------------------------------------------------------

    def __enter__(self) -> Peers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is None or self._thread.ident is None:
            return
        try:
            with self.told():
                if error is None and self._store.address.rank:
                    self._wait_for_main()
            self.note(error)
        except KeyboardInterrupt:
            raise (self._lost or KeyboardInterrupt()) from None
        finally:
            self._close()

    def watch(self) -> None:
        """Begin to watch, if not yet, inside the block, which an interrupt by the thread ends.

        Raises:
            RunError: this process has the store, and its port cannot be used.
        """
        if self._thread is None or self._thread.ident is not None:
            return
        if self._store.address.is_owner:
            self._store.serve()
        self._thread.start()

    def is_lost(self) -> bool:
        """Whether a process was lost."""
        return self._lost is not None

    def meet(self) -> None:
        """Watch, and wait until every process has started.

        Raises:
            LostProcessError: one did not, or ended.
            RunError: as `watch`.
        """
        if self._thread is None:
            return
        self.watch()
        with self._lock:
            while self._lost is None and not self._watch.has_started():
                self._lock.wait(PERIOD_S)
            if self._lost is not None:
                raise self._lost

    def note(self, error: BaseException | None) -> None:
        """Write how this process ends, as soon as that is certain.

        Args:
            error: which ends it; None if it ends properly.

        Raises:
            LostProcessError: the error comes from the loss of another process.
            RunError: a connection to another process broke, and all of them are there.
            KeyboardInterrupt: another process was interrupted for good.
        """
        if isinstance(error, KeyboardInterrupt) and self._lost is not None:
            raise self._lost from None  # it may come late
        if self._thread is None or self._written:
            return
        self._begin_to_unwind()
        if self._lost is None and error is not None and is_of_connection(error):
            self._ask()
        if error is not None and self._lost is not None and not isinstance(error, TutelageError):
            error.with_traceback(None)  # its frames hold the models, and those the process group
            raise self._lost from None
        if error is None:
            self._write("done", "")
        elif isinstance(error, KeyboardInterrupt):
            self._write("interrupted", "")
        elif is_of_connection(error):
            line = f"the connection of the processes broke: {first_line(error)}. {self._left()}"
            self._write("error", line)
            error.with_traceback(None)
            raise RunError(line) from None
        else:
            is_ours = isinstance(error, TutelageError)
            line = " ".join(str(error).split())
            self._write(
                "error", line if is_ours else f"{type(error).__name__}: {first_line(error)}."
            )

    @contextmanager
    def told(self) -> Iterator[None]:
        """A block whose error the other processes get to know at once."""
        with ExitStack() as stack:
            stack.push(lambda _, error, __: None if error is None else self.note(error))
            yield

    def _wait_for_main(self) -> None:
        """Wait until process 0 has ended properly.

        Raises:
            LostProcessError: some process did not.
            KeyboardInterrupt: it was interrupted.
        """
        with self._lock:
            self._is_waiting = True
            self._wake.set()
            self._lock.wait_for(lambda: self._lost is not None or self._is_over())
            if self._lost is not None:
                raise self._lost

    def _is_over(self) -> bool:
        """Whether process 0 ended properly: all is written, and nobody is needed."""
        return self._watch.states[0].end == "done"

    def _begin_to_unwind(self) -> None:
        """From here on the thread does not interrupt; an interrupt that it has sent arrives."""
        try:
            with self._lock:
                self._is_unwinding = True
                self._lock.notify_all()
            if self._was_interrupted:
                time.sleep(0.01)
        except KeyboardInterrupt:
            if not self.is_lost():
                raise

    def _ask(self) -> None:
        """Wait until the thread has found who is lost."""
        with self._lock:
            self._is_asked = True
            self._wake.set()
            self._lock.wait_for(lambda: self._lost is not None, _ASK_S)

    def _write(self, end: End, line: str) -> None:
        with self._lock:
            if not self._own.end:
                self._own = replace(self._own, end=end, line=line)
            self._wake.set()
            self._lock.wait_for(lambda: self._written != "", 2 * self._answer_s)

    def _close(self) -> None:
        """End the thread; the process that has the store waits until no other needs it."""
        with self._lock:
            self._is_closing = True
            self._wake.set()
            self._lock.wait_for(lambda: self._is_closed, _DONE_S + 2 * self._answer_s)

    # --- of the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        last = time.monotonic()
        end = float("inf")
        while True:
            self._wake.clear()
            self._beat()
            now = time.monotonic()
            self._look(now - last)
            last = now
            if self._is_closing:
                is_done = self._own.end == "done"
                end = min(end, now + (min(self._limit_s, _DONE_S) if is_done else _END_S))
                if now >= end or self._may_close():
                    break
            elif self._lost is not None:
                end = min(end, now + _END_S)
                if now >= end:
                    self._exit()
            is_hurried = self._is_closing or self._is_asked or self._is_waiting
            is_hurried |= self._lost is not None
            self._wake.wait(self._period_s / 10 if is_hurried else self._period_s)
        with self._lock:
            self._is_closed = True
            self._lock.notify_all()

    def _beat(self) -> None:
        """Write a heartbeat and read all."""
        with self._lock:
            self._own = replace(self._own, beat=self._own.beat + 1)
            own = self._own
        # before the states are read: a process writes that it ends, then ends
        gone = [is_gone(state) for state in self._watch.states]
        states: list[State] | None = None
        try:
            states = self._store.exchange(own)
            self._has_reached = True
        except (RuntimeError, ValueError):
            pass  # nothing new was heard; who is gone is seen, and who is silent is counted
        self._gone, self._states = gone, states
        if states is not None and own.end:
            with self._lock:
                self._written = own.end
                self._lock.notify_all()

    def _look(self, elapsed_s: float) -> None:
        """Judge what was heard."""
        is_refused = (
            self._states is None and self._has_reached and not self._store.address.is_open()
        )
        self._refused_s = self._refused_s + elapsed_s if is_refused else 0.0
        # A pause of this process, or of the machine, is no silence of the others.
        awake_s = min(elapsed_s, 2 * self._period_s + 2 * self._answer_s)
        with self._lock:
            self._watch.note(self._states, awake_s)
            self._lock.notify_all()
        if self._lost is not None or self._own.end or self._is_over():
            return
        limit_s = min(self._limit_s, _ASKED_SILENCE_S) if self._is_asked else self._limit_s
        lost = self._lost_store(limit_s) or self._watch.lost(self._gone, limit_s)
        if lost is not None:
            self._lose(lost)

    def _lost_store(self, limit_s: float) -> Lost | None:
        """What has the store, if that is gone or was never there."""
        is_gone = self._refused_s >= _REFUSED_S
        if is_gone or (not self._has_reached and self._watch.silent_s[0] >= limit_s):
            address = self._store.address
            if not address.is_in_process_0:
                what = "is gone" if is_gone else "does not answer"
                return Lost(0, "launcher", f"the launcher at {address.host}:{address.port} {what}.")
            return Lost(0, "gone" if is_gone else "late")
        return None

    def _lose(self, lost: Lost) -> None:
        if lost.kind == "gone" and not self._store.address.is_in_process_0:
            # its launcher may know by what
            time.sleep(PERIOD_S / 4)
            self._beat()
            self._watch.note(self._states, 0)
            lost = self._watch.lost(self._gone, self._limit_s) or lost
        is_own_doing = lost.kind in ("error", "interrupted") and not self._is_asked
        if is_own_doing and self._waits_for(ERROR_GRACE_S):
            return
        line = self._line(lost)
        error: BaseException = LostProcessError(line)
        if lost.kind == "interrupted":
            error = KeyboardInterrupt()
        else:
            is_first_to_print(line, self._store)  # while the store is there
        with self._lock:
            self._own = replace(self._own, end="lost", line=line)
        self._beat()
        with self._lock:
            self._lost = error
            self._lock.notify_all()
            if not self._is_unwinding:
                self._is_unwinding = self._was_interrupted = True
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def _waits_for(self, seconds: float) -> bool:
        """Whether the main thread began to end by itself within some seconds."""
        with self._lock:
            is_over = self._lock.wait_for(lambda: self._is_unwinding, seconds)
            return is_over and not self._is_asked

    def _line(self, lost: Lost) -> str:
        state = self._watch.states[lost.rank]
        return line_of(lost, state, self._own.host, self._limit_s, self._left)

    def _left(self) -> str:
        try:
            return Asking().ask(self._to_do, self._answer_s)
        except RuntimeError:  # a file system that does not answer
            return "The same command continues from the newest checkpoint, if there is one."

    def _may_close(self) -> bool:
        if self._store.is_reached and self._own.end and not self._written:
            return False
        is_needed = self._store.address.is_owner and self._own.beat > 0
        return not is_needed or self._watch.have_ended(self._gone, self._limit_s)

    def _exit(self) -> None:
        """End the process whose main thread does not end."""
        error = self._lost
        with self._lock:
            if self._is_closing:
                return
            if isinstance(error, LostProcessError):
                if is_first_to_print(str(error)):
                    os.write(2, f"tutelage: {error}\n".encode())
                os._exit(2)
            os._exit(130)


def peers_of(folder: Path, limit_s: float, environment: Mapping[str, str] = os.environ) -> Peers:
    """The processes of the run in a folder, whose newest checkpoint is named.

    Args:
        folder: of the run.
        limit_s: longest silence, `process_timeout_s`.
        environment: names and values that the launcher set.
    """
    return Peers(partial(left_in, folder), limit_s, environment, str(folder))
