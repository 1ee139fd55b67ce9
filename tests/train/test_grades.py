"""Grades of a step's completions: a verdict and a reward for each."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tutelage.data.prompts import FileTask
from tutelage.data.types import Conversation, Outcome, Prompt, Rollout
from tutelage.train.grades import grade_step

PROMPT = Prompt("a", "1 + 1?", "2")


def talk(score: float, is_success: bool) -> Rollout:
    outcome = Outcome(score, is_success)
    found = Conversation((), 1, 0, 0, outcome)
    return Rollout(PROMPT, 0, (1,), (2,), text="2", conversation=found)


def test_a_conversation_has_the_environment_s_score_and_verdict() -> None:
    """The reward is neither the verdict nor what the grader says of the text."""
    task = FileTask("t", (PROMPT,), "number")
    ranks: Any = SimpleNamespace(by_completion=lambda values, share: values)
    answer = Rollout(PROMPT, 0, (1,), (2,), text="2")
    found = grade_step(task, [talk(0.25, False), talk(0.5, True), answer], [0, 1, 2], ranks)
    assert found.rewards == [0.25, 0.5, 1.0]
    assert found.verdicts == [False, True, True]
