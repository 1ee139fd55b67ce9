"""A run's maj@k votes as its grader reads answers, wherever the run is measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tutelage.data.prompts import FileTask
from tutelage.data.types import Prompt, Rollout
from tutelage.run import inspect
from tutelage.run.config import Config, EvaluationConfig
from tutelage.run.inspect import Inspection, evaluate_model
from tutelage.run.measure import _evaluate

pytest.importorskip("math_verify")
ANSWERS = (r"\boxed{2\sqrt{3}}", r"\boxed{\sqrt{12}}", r"\boxed{5}")
"""Twice the same wrong formula, which no number tells, and once the right answer."""
POOL = (Prompt("a", "q", "5"), Prompt("b", "r", "5"))


@pytest.fixture(autouse=True)
def _sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(model: Any, tokenizer: Any, prompts: Any, *_: Any, **__: Any) -> list[Rollout]:
        return [
            Rollout(prompt, i, (1,), (2,), text=text)
            for prompt in prompts
            for i, text in enumerate(ANSWERS)
        ]

    monkeypatch.setattr("tutelage.evaluation.evaluate.sample", sample)


@pytest.mark.parametrize(("grader", "expected"), [("math", 0.0), ("number", 1 / 3)])
def test_equal_formulas_are_one_vote_where_the_grader_reads_formulas(
    grader: Any, expected: float
) -> None:
    task = FileTask("t", POOL, grader, num_held_out=1)
    config = Config("s", "t", evaluation=EvaluationConfig(num_samples=len(ANSWERS)))
    parts: Any = SimpleNamespace(task=task, tokenizer=None, enable_thinking=None)
    found = _evaluate(config, parts, None)
    assert found.maj_at_k is not None
    assert found.maj_at_k.value == pytest.approx(expected)


@pytest.mark.parametrize(("grader", "expected"), [("math", 0.0), ("number", 1 / 3)])
def test_a_model_on_a_file_of_prompts_votes_alike(
    grader: Any, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(inspect, name, lambda *_, **__: None)
    monkeypatch.setattr(inspect, "load_prompts", lambda *_, **__: list(POOL))
    asked = Inspection("m", prompts="file", grader=grader, num_samples=len(ANSWERS))
    found = evaluate_model(asked)
    assert found.maj_at_k is not None
    assert found.maj_at_k.value == pytest.approx(expected)
