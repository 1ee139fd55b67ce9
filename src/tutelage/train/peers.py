"""The other processes of a run: one that is gone or silent ends all, in one line.

Every process has a thread that writes a heartbeat each second and reads those of the others, so
that work of any length is no silence. Processes of the same machine are looked for among the
system's processes as well, which shows at once that one was killed.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import count as counter
from pathlib import Path
from types import TracebackType

from tutelage.errors import LostProcessError, RunError, TutelageError
from tutelage.models.sharding import is_of_connection
from tutelage.setup.common_store import ANSWER_S, Asking, address_of, is_first_to_print
from tutelage.train.heartbeat import End, Lost, State, Watch, is_gone, left_in, own_state
from tutelage.train.peer_store import DONE, PeerStore, first_line

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
        self._to_do, self._limit_s = left, limit_s
        self._lock = threading.Condition()
        self._wake = threading.Event()
        self._is_hurried = self._is_asked = self._is_unwinding = self._is_closing = False
        self._is_finishing = self._is_settled = False
        self._lost: BaseException | None = None
        self._own, self._is_written = own_state(), False
        self._thread: threading.Thread | None = None
        address = address_of(environment)
        if address is None:
            return
        self._watch = Watch(address.rank, address.count)
        self._answer_s = min(max(limit_s / 4, _LEAST_ANSWER_S), ANSWER_S)
        self._store = PeerStore(address, self._answer_s, next(_RUNS), place)
        # Every process reads every heartbeat: of many processes, less often.
        self._period_s = PERIOD_S * max(1, address.count / 64)
        self._gone = [False] * address.count
        self._has_reached, self._refused_s = False, 0.0
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
                if error is None and self._watch.rank:
                    self._wait(lambda: self._is_over() or self.is_lost())
                    self._raise_lost()
            self.note(error)
        except KeyboardInterrupt:
            raise (self._lost or KeyboardInterrupt()) from None
        finally:
            self._close(self._thread)

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
            self._lock.wait_for(lambda: self._watch.has_started() or self.is_lost())
        self._raise_lost()

    def note(self, error: BaseException | None) -> None:
        """Write how this process ends, as soon as that is certain.

        Args:
            error: which ends it; None if it ends properly.

        Raises:
            LostProcessError: the error comes from the loss of another process.
            RunError: a connection to another process broke, and all of them are there.
            KeyboardInterrupt: another process was interrupted for good.
        """
        if isinstance(error, KeyboardInterrupt):
            self._raise_lost()  # it may come late
        if self._thread is None or self._thread.ident is None:
            return
        if self._is_written and not self.is_lost():
            return
        self._begin_to_unwind()
        is_broken = error is not None and is_of_connection(error)
        if is_broken and not self.is_lost():
            self._is_asked = True
            self._wait(self.is_lost, _ASK_S)
        if error is not None and not isinstance(error, TutelageError):
            if self.is_lost() or is_broken:
                error.with_traceback(None)  # its frames hold models, and those the process group
            self._raise_lost()
        if error is None:
            self._finish()
        elif isinstance(error, KeyboardInterrupt):
            self._write("interrupted")
        elif is_broken:
            line = f"the connection of the processes broke: {first_line(error)}. {self._left()}"
            self._write("error", line)
            raise RunError(line) from None
        elif isinstance(error, TutelageError):
            self._write("error", " ".join(str(error).split()))
        else:
            self._write("error", f"{type(error).__name__}: {first_line(error)}.")

    @contextmanager
    def told(self) -> Iterator[None]:
        """A block whose error the other processes get to know at once."""
        with ExitStack() as stack:
            stack.push(lambda _, error, __: None if error is None else self.note(error))
            yield

    def _is_over(self) -> bool:
        """Whether process 0 ended properly: all is written, and nobody is needed."""
        return self._is_settled or self._watch.states[0].end == "done"

    def _raise_lost(self) -> None:
        if self._lost is not None:
            raise self._lost from None

    def _begin_to_unwind(self) -> None:
        """From here on the thread does not interrupt; an interrupt that it has sent arrives."""
        try:
            with self._lock:
                self._is_unwinding = True
                self._lock.notify_all()
            if self.is_lost():
                time.sleep(0.01)
        except KeyboardInterrupt:
            if not self.is_lost():
                raise

    def _finish(self) -> None:
        if self._watch.rank:
            return self._write("done")
        self._is_finishing = True
        self._wait(lambda: self._is_written or self.is_lost(), 2 * self._answer_s)
        return self._raise_lost()

    def _write(self, end: End, line: str = "") -> None:
        with self._lock:
            if not self._own.end:
                self._own = replace(self._own, end=end, line=line)
        self._wait(lambda: self._is_written, 2 * self._answer_s)

    def _wait(self, condition: Callable[[], bool], limit_s: float | None = None) -> None:
        """Wait for what the thread hears, which does so at short intervals from now on."""
        with self._lock:
            self._is_hurried = True
            self._wake.set()
            self._lock.wait_for(condition, limit_s)

    def _close(self, thread: threading.Thread) -> None:
        """End the thread; the process that has the store waits until no other needs it."""
        with self._lock:
            self._is_hurried = self._is_closing = True
            self._wake.set()
        thread.join(_DONE_S + 2 * self._answer_s)

    # --- of the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        self._heard_at, end = time.monotonic(), math.inf
        while True:
            self._wake.clear()
            if self._is_finishing and not (self.is_lost() or self._own.end):
                self._settle()
            self._beat()
            if not (self.is_lost() or self._own.end or self._is_over()):
                self._judge()
            now = time.monotonic()
            if self._is_closing or self.is_lost():
                is_done = self._own.end == "done"
                end = min(end, now + (min(self._limit_s, _DONE_S) if is_done else _END_S))
            if self._is_closing and (now >= end or self._may_close()):
                return
            if now >= end:
                self._exit()
            self._wake.wait(self._period_s / 10 if self._is_hurried else self._period_s)

    def _beat(self) -> None:
        """Write a heartbeat and read all."""
        with self._lock:
            own = self._own = replace(self._own, beat=self._own.beat + 1)
        # before the states are read: a process writes that it ends, then ends
        self._gone = [is_gone(state) for state in self._watch.states]
        states: list[State] | None = None
        try:
            states = self._store.exchange(own)
            self._has_reached = True
        except (RuntimeError, ValueError):
            pass  # nothing new was heard; who is gone is seen, and who is silent is counted
        is_refused = states is None and self._has_reached and not self._store.address.is_open()
        elapsed_s = time.monotonic() - self._heard_at
        self._heard_at += elapsed_s
        self._refused_s = self._refused_s + elapsed_s if is_refused else 0.0
        with self._lock:
            # A pause of this process, or of the machine, is no silence of the others.
            self._watch.note(states, min(elapsed_s, 2 * self._period_s + 2 * self._answer_s))
            self._is_written |= states is not None and own.end != ""
            self._lock.notify_all()

    def _judge(self) -> None:
        """End for a process that is lost, if one is."""
        limit_s = min(self._limit_s, _ASKED_SILENCE_S) if self._is_asked else self._limit_s
        lost = self._lost_store(limit_s) or self._watch.lost(self._gone, limit_s)
        if lost is not None and lost.kind == "gone" and not self._store.address.is_in_process_0:
            # its launcher may know by what
            time.sleep(PERIOD_S / 4)
            self._beat()
            lost = self._watch.lost(self._gone, limit_s) or lost
        if lost is not None and not self._ends_itself(lost):
            self._end_for(lost)

    def _lost_store(self, limit_s: float) -> Lost | None:
        """What has the store, if that is gone or was never there."""
        is_gone = self._refused_s >= _REFUSED_S
        if not is_gone and (self._has_reached or self._watch.silent_s[0] < limit_s):
            return None
        address = self._store.address
        if address.is_in_process_0:
            return Lost(0, "gone" if is_gone else "late")
        what = "is gone" if is_gone else "does not answer"
        return Lost(0, "launcher", f"the launcher at {address.host}:{address.port} {what}.")

    def _ends_itself(self, lost: Lost) -> bool:
        """Whether the main thread ends by what ended another process, without waiting for it."""
        if self._is_hurried or lost.kind not in ("error", "interrupted"):
            return False
        with self._lock:
            is_so = self._lock.wait_for(lambda: self._is_unwinding, ERROR_GRACE_S)
            return is_so and not self._is_asked

    def _end_for(self, lost: Lost) -> None:
        state = self._watch.states[lost.rank]
        line = lost.text(state, self._own.host, self._limit_s, self._left)
        with suppress(RuntimeError):  # others may have found it by something else
            line = self._store.agreed(line) if self._store.is_reached else line
        if line == DONE:  # before it was lost
            self._is_settled = True
        else:
            self._lose(
                KeyboardInterrupt() if lost.kind == "interrupted" else LostProcessError(line), line
            )

    def _settle(self) -> None:
        """End properly, unless others have ended already for a process that is lost."""
        try:
            line = self._store.agreed(DONE)
        except RuntimeError:  # none of them hears anything any more
            line = DONE
        if line == DONE:
            with self._lock:
                self._own = replace(self._own, end="done")
        else:
            self._lose(LostProcessError(line), line)

    def _lose(self, error: BaseException, line: str) -> None:
        """Have the main thread end by an error."""
        if isinstance(error, LostProcessError):
            is_first_to_print(line, self._store)  # while the store is there
        with self._lock:
            self._own = replace(self._own, end="lost", line=line)
            self._lost, self._is_hurried = error, True
            self._wake.set()
            self._lock.notify_all()
            if not self._is_unwinding:
                self._is_unwinding = True
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def _left(self) -> str:
        try:
            return Asking().ask(self._to_do, self._answer_s)
        except RuntimeError:  # a file system that does not answer
            return "The same command continues from the newest checkpoint, if there is one."

    def _may_close(self) -> bool:
        if self._store.is_reached and self._own.end and not self._is_written:
            return False
        return not self._store.address.is_owner or self._watch.have_ended(self._gone, self._limit_s)

    def _exit(self) -> None:
        """End the process whose main thread does not end."""
        with self._lock:
            if self._is_closing:
                return
            if not isinstance(self._lost, LostProcessError):
                os._exit(130)
            if is_first_to_print(str(self._lost)):
                os.write(2, f"tutelage: {self._lost}\n".encode())
            os._exit(2)


def peers_of(folder: Path, limit_s: float, environment: Mapping[str, str] = os.environ) -> Peers:
    """The processes of the run in a folder, whose newest checkpoint is named.

    Args:
        folder: of the run.
        limit_s: longest silence, `process_timeout_s`.
        environment: names and values that the launcher set.
    """
    return Peers(partial(left_in, folder), limit_s, environment, str(folder))
