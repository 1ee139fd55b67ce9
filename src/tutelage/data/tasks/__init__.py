"""Tasks: streams of prompts that are pure functions of their counters, and graders."""

from __future__ import annotations

from typing import Protocol

from tutelage.data.tasks.coins import CoinsTask
from tutelage.data.tasks.ledger import LedgerTask
from tutelage.data.types import Prompt

__all__ = ["CoinsTask", "LedgerTask", "Task"]


class Task(Protocol):
    """Where prompts come from and how completions are graded."""

    @property
    def name(self) -> str:
        """Name of the task in configurations, logs and reports."""

    def prompts(self, step: int, num_prompts: int, seed: int) -> list[Prompt]:
        """Training prompts of one step: a pure function of its arguments.

        Prompt i of a step does not depend on `num_prompts`, so a larger batch extends a smaller.
        """

    def held_out(self, num_prompts: int, seed: int = 0) -> list[Prompt]:
        """Evaluation prompts, which `prompts` never gives, whatever the seeds."""

    def grade(self, prompt: Prompt, text: str, is_truncated: bool = False) -> bool | None:
        """Whether a decoded completion (no special tokens) is right; None if it can't be graded.

        One that was cut off (`is_truncated`) is right only if it had finished its answer.
        """
