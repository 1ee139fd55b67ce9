"""Runs whose teacher is a server that tells the likeliest ids of each token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tiny import tiny_config
from tiny_runs import metrics_of, run
from tutelage.commands.check import check
from tutelage.commands.dry_run import dry_run
from tutelage.errors import ConfigError, ModelError
from tutelage.models.load import load_model, load_tokenizer
from tutelage.models.tokenizers import vocabulary_size
from tutelage.train.score_request import ScoreRequest
from tutelage.train.snapshot import score_for_page
from tutelage.train.token_scores import score
from vllm_stub import FakeVLLM, serving

K = 8
TOPK = {"kind": "topk", "k": K}


@pytest.fixture
def server(tiny_models: Path) -> Iterator[FakeVLLM]:
    folder = str(tiny_models / "teacher")
    num_ids = vocabulary_size(load_tokenizer(folder))
    with serving(load_model(folder, "float32"), frozenset(), num_ids) as fake:
        yield fake


def teacher_of(server: FakeVLLM) -> dict[str, Any]:
    return {"kind": "logprob_server", "url": server.url, "served_name": "student",
            "num_logprobs": K}  # fmt: skip


@pytest.mark.parametrize(
    "objective",
    [
        TOPK,
        {"kind": "tropd", "k": 4},
        {"kind": "eopd", "estimator": "sampled", "fkl": "topk_tail", "k": 4, "threshold": 0.8},
    ],
)
def test_a_run_learns_what_it_does_from_the_whole_teacher(
    server: FakeVLLM, tiny_models: Path, tmp_path: Path, objective: dict[str, Any]
) -> None:
    ways: dict[str, Any] = {"objective": objective, "num_steps": 2}
    if objective["kind"] == "tropd":
        ways["weighting"] = {"kind": "ida"}
    run(tiny_models, tmp_path / "served", teacher=teacher_of(server), **ways)
    run(tiny_models, tmp_path / "local", **ways)
    served, local = (metrics_of(tmp_path / name) for name in ("served", "local"))
    is_exact = objective["kind"] != "eopd"  # EOPD's gate opens later at a bound of the entropy
    for ours, theirs in zip(served, local, strict=True):
        if is_exact:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert 0 < ours["reverse_kl_nats"] <= theirs["reverse_kl_nats"] + 1e-6
        assert 0 < ours["teacher_tail_mass"] < 1
        assert ("undecided_gate_share" in ours) == (not is_exact)


def test_it_is_checked_and_tried_before(
    server: FakeVLLM, tiny_models: Path, tmp_path: Path
) -> None:
    teacher = teacher_of(server) | {"model": str(tiny_models / "teacher")}
    config = tiny_config(tiny_models, tmp_path / "run", teacher=teacher, objective=TOPK)
    lines = "\n".join(check(config, "tiny"))
    assert f"token ids are sent to {server.url}" in lines
    assert "divergences that are logged are lower bounds" in lines
    assert "without a server of log-probabilities" in "\n".join(dry_run(config))


def test_a_server_of_another_model_is_one_line(
    server: FakeVLLM, tiny_models: Path, tmp_path: Path
) -> None:
    teacher = teacher_of(server) | {"served_name": "other"}
    with pytest.raises(ModelError, match=r"serves 'student', not 'other'"):
        run(tiny_models, tmp_path / "run", teacher=teacher, objective=TOPK)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r'objective.kind must be topk, .*, grpo or opsa .* got kl\. Use kind = "topk"'),
        ({"objective": {"kind": "tropd"}}, "objective.k must be at most teacher.num_logprobs = 8"),
        ({"objective": TOPK | {"k": 9}}, "objective.k must be at most teacher.num_logprobs = 8"),
        ({"objective": TOPK | {"support": "student"}}, "objective.support must be teacher"),
        ({"objective": {"kind": "eopd"}}, "objective.estimator must be sampled"),
        ({"objective": {"kind": "grpo", "distillation_weight": 1.0}}, "distillation_weight must"),
        (
            {"objective": TOPK, "selection": {"rule": "gradient_norm"}},
            "selection.rule must be another than teachability",
        ),
        ({"objective": TOPK, "evaluation": {"teacher": True}}, "evaluation.teacher must be false"),
    ],
)
def test_what_needs_every_id_is_refused(
    tiny_models: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    teacher = {"kind": "logprob_server", "model": "m", "url": "http://h:1", "num_logprobs": K}
    with pytest.raises(ConfigError, match=message):
        tiny_config(tiny_models, tmp_path, teacher=teacher, **change)


def test_rules_that_need_every_id_are_not_scored(tiny_models: Path, tmp_path: Path) -> None:
    teacher = {"kind": "logprob_server", "model": "m", "url": "http://127.0.0.1:9"}
    config = tiny_config(tiny_models, tmp_path, teacher=teacher, objective=TOPK)
    request = ScoreRequest(rules=("entropy", "gradient_norm"))
    for function in (score, score_for_page):
        with pytest.raises(ConfigError, match="--rules gradient_norm needs every id of the teach"):
            function(config, request)
