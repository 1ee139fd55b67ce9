"""A run's maj@k votes as its grader reads answers, wherever the run is measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tutelage.config.models import StudentConfig, TeacherConfig
from tutelage.config.schema import Config, EvaluationConfig
from tutelage.data.prompts import FileTask
from tutelage.data.types import Prompt, Rollout
from tutelage.evaluation import evaluate as evaluation
from tutelage.evaluation import problems
from tutelage.evaluation.evaluate import evaluate
from tutelage.evaluation.measure import _evaluate
from tutelage.evaluation.request import EvaluationRequest
from tutelage.rollout.request import RolloutRequest
from tutelage.rollout.sampler import TransformersSampler
from tutelage.setup.phases import no_phases

pytest.importorskip("math_verify")
ANSWERS = (r"\boxed{2\sqrt{3}}", r"\boxed{\sqrt{12}}", r"\boxed{5}")
"""Twice the same wrong formula, which no number tells, and once the right answer."""
POOL = (Prompt("a", "q", "5"), Prompt("b", "r", "5"))


@pytest.fixture(autouse=True)
def _sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(self: TransformersSampler, request: RolloutRequest) -> list[Rollout]:
        return [
            Rollout(prompt, i, (1,), (2,), text=text)
            for prompt in request.prompts
            for i, text in enumerate(ANSWERS)
        ]

    monkeypatch.setattr(TransformersSampler, "sample", sample)


@pytest.mark.parametrize(("grader", "expected"), [("math", 0.0), ("number", 1 / 3)])
def test_equal_formulas_are_one_vote_where_the_grader_reads_formulas(
    grader: Any, expected: float
) -> None:
    task = FileTask("t", POOL, grader, num_held_out=1)
    config = Config(
        StudentConfig("s"),
        TeacherConfig("t"),
        evaluation=EvaluationConfig(num_samples=len(ANSWERS)),
    )
    components: Any = SimpleNamespace(task=task, tokenizer=None, enable_thinking=None)
    sampler = TransformersSampler(components, components, 1)
    found = _evaluate(config, components, sampler, "student", no_phases)
    assert found.scores.maj_at_k is not None
    assert found.scores.maj_at_k.value == pytest.approx(expected)


@pytest.mark.parametrize(("grader", "expected"), [("math", 0.0), ("number", 1 / 3)])
def test_a_model_on_a_file_of_prompts_votes_alike(
    grader: Any, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "load_model", lambda *_, **__: torch.nn.Linear(1, 1))
    monkeypatch.setattr(evaluation, "_content_digest", lambda source: None)
    plain = SimpleNamespace(chat_template=None)
    monkeypatch.setattr(evaluation, "load_tokenizer", lambda *_, **__: plain)
    monkeypatch.setattr(problems, "load_prompts", lambda *_, **__: list(POOL))
    asked = EvaluationRequest("m", prompts="file", grader=grader, num_samples=len(ANSWERS))
    scores = evaluate(asked).results[0].scores
    assert scores.maj_at_k is not None
    assert scores.maj_at_k.value == pytest.approx(expected)
