"""SIGKILL while rollouts and the teacher's states are stored, or anywhere else in such a run.

As `kill`, with completions that the initial student samples before the first step, and hidden
states of the teacher beside them, after which its head alone is used.
"""

from __future__ import annotations

from typing import Any

from . import kill
from .record import Outcome

CHANGES: dict[str, Any] = {
    "rollouts": {"source": "stored", "teacher_states": "float32"},
    "recording": {"every": 0},
}


def run(size: int) -> Outcome:
    """`size` runs that were killed at least once."""
    return kill.run(size, "kill_stored", **CHANGES)
