"""What the processes of a run write about themselves, which one is lost, and what is said of it."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias, get_args

End: TypeAlias = Literal["", "done", "error", "interrupted", "lost", "killed"]
"""How a process ended: not yet, properly, by its own error, by Ctrl-C, because another was lost, or
by a signal that its launcher saw."""
Kind: TypeAlias = Literal[
    "killed", "lost", "gone", "error", "interrupted", "silent", "late", "launcher"
]
"""How a process is lost, causes before what follows from them: a signal that its launcher saw; its
end for another that was lost; its end without a message; by its own error, or by Ctrl-C; silence;
no start; or what has the store is gone."""
_KINDS: tuple[Kind, ...] = get_args(Kind)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class State:
    """The last heartbeat of a process."""

    beat: int = 0
    """Heartbeats so far; 0: it has not started."""
    host: str = ""
    namespace: str = ""
    """Boot and process namespace, in which `pid` has a meaning."""
    pid: int = 0
    started: str = ""
    """When the process started, in the system's ticks: another one may get its `pid`."""
    end: End = ""
    line: str = ""
    """Why it ended."""

    def to_json(self) -> str:
        """As it is written."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> State:
        """What was written.

        Raises:
            ValueError: that is no heartbeat.
        """
        values, types = json.loads(text), {k: type(v) for k, v in asdict(cls()).items()}
        is_right = isinstance(values, dict) and {k: type(v) for k, v in values.items()} == types
        if not is_right or values["end"] not in get_args(End):
            raise ValueError(f"no heartbeat: {text[:80]!r}")
        return cls(**values)


def own_state() -> State:
    """Of this process, before its first heartbeat."""
    pid = os.getpid()
    return State(0, platform.node(), _namespace(), pid, _stat(pid)[1])


@cache
def _namespace() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux, where processes of one machine are seen by their heartbeats alone
        return ""


def _stat(pid: int) -> tuple[str, str]:
    """State and start time of a process of this machine; empty if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return "", ""
    fields = text.rpartition(")")[2].split()  # its name may hold anything
    return fields[0], fields[19]


def is_gone(state: State) -> bool:
    """Whether a process of this machine has ended; False for one of another machine."""
    if not state.pid or not state.namespace or state.namespace != _namespace():
        return False
    try:
        found, started = _stat(state.pid)
    except OSError:  # the system does not tell
        return False
    return found in ("", "Z", "X") or started != state.started


@dataclass(frozen=True)
class Lost:
    """A process without which the run cannot go on."""

    rank: int
    kind: Kind
    line: str = ""
    """What it, or its launcher, wrote."""

    def text(self, state: State, here: str, limit_s: float, left: Callable[[], str]) -> str:
        """One line about it.

        Args:
            state: its last heartbeat.
            here: host of this process; another one is named.
            limit_s: longest silence.
            left: says what to do.
        """
        where = f" on {state.host}" if state.host not in ("", here) else ""
        limit = f"process_timeout_s = {limit_s:g} s"
        process = f"process {self.rank}{where}"
        if self.kind == "lost":
            return self.line
        if self.kind == "error":
            return f"{process} ended: {self.line}"
        what = {
            "launcher": self.line,
            "killed": f"{process} {self.line}.",
            "gone": f"{process} (pid {state.pid}) is gone: it was killed or it crashed.",
            "silent": f"{process} has been silent for longer than {limit}.",
            "late": f"{process} has not started within {limit}.",
            "interrupted": f"{process} was interrupted.",
        }
        return f"{what[self.kind]} {left()}"


class Watch:
    """Judges the heartbeats of a run.

    Args:
        rank: of this process.
        count: of processes.
    """

    def __init__(self, rank: int, count: int) -> None:
        self.rank = rank
        self.states = [State()] * count
        self.silent_s = [0.0] * count
        """For how long each has had no new heartbeat, in time that this process was awake."""

    def note(self, states: Sequence[State] | None, elapsed_s: float) -> None:
        """Take in the newest states.

        Args:
            states: of all processes; None if they could not be had.
            elapsed_s: seconds since the last call in which this process was awake.
        """
        for rank, old in enumerate(self.states):
            is_new = states is not None and states[rank] != old
            self.silent_s[rank] = 0.0 if is_new else self.silent_s[rank] + elapsed_s
        if states is not None:
            self.states = list(states)

    def lost(self, gone: Sequence[bool], limit_s: float) -> Lost | None:
        """The process that others have to end for; causes come before what follows from them.

        Args:
            gone: which processes were seen to have ended, before the states were read.
            limit_s: longest silence.
        """
        found = []
        for rank, state in enumerate(self.states):
            kind: Kind | None = None
            if state.end:
                kind = None if state.end == "done" else state.end
            elif gone[rank]:
                kind = "gone"
            elif self.silent_s[rank] >= limit_s:
                kind = "silent" if state.beat else "late"
            if kind is not None and rank != self.rank:
                found.append(Lost(rank, kind, state.line))
        return min(found, key=lambda lost: _KINDS.index(lost.kind), default=None)

    def has_started(self) -> bool:
        """Whether every process has."""
        return all(state.beat for state in self.states)

    def have_ended(self, gone: Sequence[bool], limit_s: float) -> bool:
        """Whether no other process will read a heartbeat any more."""
        triples = zip(self.states, gone, self.silent_s, strict=True)
        ended = [bool(state.end) or is_out or s >= limit_s for state, is_out, s in triples]
        return all(has for rank, has in enumerate(ended) if rank != self.rank)


def left_in(folder: Path) -> str:
    """From which checkpoint of a run's folder the same command continues."""
    try:
        found = [match for name in os.listdir(folder) if (match := _CHECKPOINT.fullmatch(name))]
    except OSError:  # no folder yet
        found = []
    if not found:
        return "The same command starts anew: there is no checkpoint yet."
    newest = max(found, key=lambda match: int(match.group(1)))
    return f"The same command continues from {newest.group()}."
