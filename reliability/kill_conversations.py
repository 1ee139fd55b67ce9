"""SIGKILL between the turns of conversations, or anywhere else in a run on the task of tool calls.

As `kill`, with the embedded models of the ledger by tool calls: their conversations have up to
eight turns, and a point lies before and after every answer of their environments.
"""

from __future__ import annotations

from typing import Any

from . import kill
from .record import Outcome

CHANGES: dict[str, Any] = {
    "student": {"model": "package:tutelage/assets/ledger-tools-overconfident"},
    "teacher": {"model": "package:tutelage/assets/ledger-tools-teacher"},
    "data": {"kind": "ledger_tools"},
    "sampling": {"num_samples": 2, "max_new_tokens": 128},
    "num_steps": 4,
}


def run(size: int) -> Outcome:
    """`size` runs that were killed at least once."""
    return kill.run(size, "kill_conversations", **CHANGES)
