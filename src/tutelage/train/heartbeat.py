"""What the processes of a run write about themselves, and which of them is judged to be lost."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias

End: TypeAlias = Literal["", "done", "error", "interrupted", "lost", "killed"]
"""How a process ended: not yet, properly, by its own error, by Ctrl-C, because another was lost, or
by a signal that its launcher saw."""
Kind: TypeAlias = Literal[
    "killed", "gone", "lost", "error", "interrupted", "silent", "late", "launcher"
]
"""How a process is lost: a signal that its launcher saw; ended without a message; ended for another
that was lost; ended by its own error, or by Ctrl-C; stopped; never started; or what has the store
is gone."""
ENDS = ("", "done", "error", "interrupted", "lost", "killed")


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
        values = json.loads(text)
        defaults = asdict(cls())
        is_right = isinstance(values, dict) and values.keys() == defaults.keys()
        if not is_right or any(type(values[key]) is not type(defaults[key]) for key in defaults):
            raise ValueError(f"no heartbeat: {text[:80]!r}")
        if values["end"] not in ENDS:
            raise ValueError(f"unknown end: {values['end']!r}")
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
        others = [rank for rank in range(len(self.states)) if rank != self.rank]
        ends = {rank: self.states[rank].end for rank in others}
        written = self._first(others, ("killed", "lost"))
        if written is not None:
            return written
        for rank in others:
            if gone[rank] and not ends[rank]:
                return Lost(rank, "gone")
        written = self._first(others, ("error", "interrupted"))
        if written is not None:
            return written
        for rank in others:
            if not ends[rank] and self.silent_s[rank] >= limit_s:
                return Lost(rank, "silent" if self.states[rank].beat else "late")
        return None

    def _first(self, ranks: Sequence[int], kinds: Sequence[Kind]) -> Lost | None:
        pairs = ((kind, rank) for kind in kinds for rank in ranks)
        found = ((k, rank, self.states[rank]) for k, rank in pairs if self.states[rank].end == k)
        return next((Lost(rank, kind, state.line) for kind, rank, state in found), None)

    def has_started(self) -> bool:
        """Whether every process has."""
        return all(state.beat for state in self.states)

    def have_ended(self, gone: Sequence[bool], limit_s: float) -> bool:
        """Whether no other process will read a heartbeat any more."""
        triples = zip(self.states, gone, self.silent_s, strict=True)
        ended = [bool(state.end) or is_out or s >= limit_s for state, is_out, s in triples]
        return all(has for rank, has in enumerate(ended) if rank != self.rank)
