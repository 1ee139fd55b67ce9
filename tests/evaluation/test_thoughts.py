"""A thought that the chat template opened: what is cut off inside of it is no answer, anywhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tutelage.data.prompts import FileTask, Grader
from tutelage.data.types import Prompt, Rollout
from tutelage.evaluation.benchmark import Benchmark, Progress, grade_rollouts, run_benchmark
from tutelage.evaluation.scores import voting_of
from tutelage.grading.answer import opened_thought
from tutelage.train.grades import grade_step

GUESS = r"First guess: \boxed{5}. No wait,"
DONE = "so five</think>\n\n" + r"\boxed{5}"
PROMPT = Prompt("p", "2+3", "5")


@pytest.mark.parametrize(
    ("prompt", "mark"),
    [
        ("<|im_start|>assistant\n<think>\n", "<think>\n"),
        ("Assistant: <think>", "<think>"),
        ("<seed:think>", "<seed:think>"),
        ("assistant<|channel|>analysis", "<|channel|>analysis"),
        ("assistant<|channel|>final", ""),
        ("<|inner_prefix|>", "<|inner_prefix|>"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),
        ("Write your reasoning between <think> and </think>.", ""),
        ("Write your reasoning after <think>.\nAssistant:", ""),
        ("<think>" + "x" * 200, ""),
        ("", ""),
    ],
)
def test_only_a_mark_at_the_end_of_the_prompt_opens_a_thought(prompt: str, mark: str) -> None:
    assert opened_thought(prompt) == mark


def rollouts(*texts: str, thought: str = "<think>\n") -> list[Rollout]:
    return [
        Rollout(PROMPT, i, (1,), (2,), text is GUESS, text=text, thought=thought)
        for i, text in enumerate(texts)
    ]


@pytest.mark.parametrize("grader", ["number", "math"])
def test_in_the_grades_of_a_step(grader: Grader) -> None:
    drawn = rollouts(GUESS, DONE)
    task = FileTask("t", (PROMPT,), grader)
    ranks: Any = SimpleNamespace(by_completion=lambda values, share: values)
    grades = grade_step(task, drawn, [0, 1], ranks)
    assert (grades.verdicts, grades.rewards) == ([False, True], [0.0, 1.0])
    # Control: without the mark the guess would count.
    assert grade_rollouts(task.grade, rollouts(GUESS, thought="")) == [True]


@pytest.mark.parametrize("grader", ["number", "math"])
def test_in_benchmarks_the_guess_does_not_vote_and_the_text_is_kept_as_written(
    grader: Grader,
) -> None:
    def complete(benchmark: Any, prompts: Any, progress: Progress) -> list[Rollout]:
        return rollouts(GUESS, DONE)

    task = FileTask("t", (PROMPT,), grader)
    benchmark = Benchmark("b", (PROMPT,), task.grade, 8, grader, voting_of(grader))
    rows = run_benchmark(benchmark, complete, 2, 1).rows
    assert [row["is_correct"] for row in rows] == [False, True]
    assert [row["answer"] for row in rows] == [None, "5"]
    assert [row["completion"] for row in rows] == [GUESS, DONE]


def test_the_exact_grader_compares_what_follows_the_thought() -> None:
    grade = FileTask("t", (PROMPT,), "exact").grade
    assert grade(PROMPT, "<think>\nhm</think>\n\n5", False)
    assert not grade(PROMPT, "<think>\n5", False)
