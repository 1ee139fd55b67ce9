"""SIGKILL anywhere in a run that trains on rewards alone, whose steps read no teacher.

As `kill`, with the embedded student, which is right often enough that its rewards differ.
"""

from __future__ import annotations

from typing import Any

from . import kill
from .record import Outcome

CHANGES: dict[str, Any] = {
    "student": {"model": "package:tutelage/assets/ledger-overconfident"},
    "teacher": {"model": "package:tutelage/assets/ledger-teacher"},
    "data": {"kind": "ledger", "num_items": 2},
    "sampling": {"num_samples": 4, "max_new_tokens": 24},
    "objective": {"kind": "grpo", "distillation_weight": 0.0},
    "num_steps": 4,
}


def run(size: int) -> Outcome:
    """`size` runs that were killed at least once."""
    return kill.run(size, "kill_grpo", **CHANGES)
