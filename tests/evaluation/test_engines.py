"""`tutelage eval` of a run folder samples with the engine of the run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tutelage.data.types import Rollout
from tutelage.evaluation import evaluate as evaluation
from tutelage.evaluation.evaluate import evaluate
from tutelage.evaluation.request import EvaluationRequest
from tutelage.rollout.request import RolloutRequest

PROBLEMS = [{"id": str(i), "prompt": "x", "answer": "1"} for i in range(3)]


class Engine:
    """Answers 1 where it is vLLM, 2 where it is transformers."""

    def __init__(self, text: str, *options: Any) -> None:
        self.text = text
        self.options = options
        self.is_closed = False

    def sample(self, request: RolloutRequest) -> list[Rollout]:
        numbers = range(request.sampling.num_samples)
        return [Rollout(p, s, (1,), (1,), text=self.text) for p in request.prompts for s in numbers]

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize(
    ("engine", "device", "text", "warns"),
    [
        ({"kind": "vllm", "max_model_len": 99}, "cuda", "1", False),
        ({"kind": "vllm"}, "cpu", "2", True),
        ({"kind": "vllm_server", "url": "http://h/v1"}, "cuda", "2", True),
        ({"kind": "transformers"}, "cuda", "2", False),
        (None, "cuda", "2", False),
    ],
)
def test_the_engine_of_the_run_samples_where_it_can(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: dict[str, Any] | None,
    device: str,
    text: str,
    warns: bool,
) -> None:
    run, problems, out = tmp_path / "run", tmp_path / "p.jsonl", tmp_path / "out"
    (run / "student").mkdir(parents=True)
    config = {} if engine is None else {"engine": engine}
    (run / "manifest.json").write_text(json.dumps({"config": config}))
    problems.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    tokenizer = SimpleNamespace(chat_template=None)
    model = SimpleNamespace(device=torch.device(device), config=SimpleNamespace(to_dict=dict))
    made: list[Engine] = []

    def make(answer: str) -> Any:
        def build(*options: Any) -> Engine:
            made.append(Engine(answer, *options))
            return made[-1]

        return build

    monkeypatch.setattr(evaluation, "load_tokenizer", lambda source: tokenizer)
    monkeypatch.setattr(evaluation, "load_model", lambda *_: model)
    monkeypatch.setattr(evaluation, "_content_digest", lambda source: None)
    monkeypatch.setattr(evaluation, "_has_vllm", lambda: True)
    monkeypatch.setattr(evaluation, "VLLMSampler", make("1"))
    monkeypatch.setattr(evaluation, "TransformersSampler", make("2"))
    lines: list[str] = []
    request = EvaluationRequest(str(run), str(problems), num_samples=2, out=str(out))
    (result,) = evaluate(request, log=lines.append).results
    assert {row["completion"] for row in result.rows} == {text}
    assert [made[0].is_closed, len(made)] == [True, 1]
    assert any("transformers samples instead" in line for line in lines) == warns
    settings = json.loads((out / "settings.json").read_text())
    assert settings.get("engine") == ("vllm" if text == "1" else None)
    if text == "1":
        assert 99 in made[0].options
