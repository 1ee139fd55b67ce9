"""vLLM really gives a teacher's hidden states here; `make test-vllm` makes the environment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vllm: make test-vllm")

from test_vllm import running

from tiny import tiny_config
from tutelage.config.sampling import SamplingConfig
from tutelage.config.teachers import HiddenServerTeacher
from tutelage.data.batch import Batch, collate
from tutelage.data.tasks import LedgerTask
from tutelage.errors import ModelError
from tutelage.models.head_model import load_head_model
from tutelage.models.load import load_model, load_tokenizer
from tutelage.models.teacher import Teacher
from tutelage.rollout.request import RolloutRequest
from tutelage.rollout.sampler import TransformersSampler
from tutelage.setup.served_teacher import served_teacher
from tutelage.teachers.hidden import ServedTeacher
from tutelage.train.loop import train

pytestmark = pytest.mark.filterwarnings("ignore")
TEACHER = "package:tutelage/assets/ledger-teacher"
STUDENT = "package:tutelage/assets/ledger-overconfident"
POOLING = ("--runner", "pooling", "--convert", "embed", "--pooler-config")


def pooler(**changes: Any) -> str:
    return json.dumps(
        {"task": "token_embed", "tok_pooling_type": "ALL", "use_activation": False} | changes
    )


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("pooling")
    with running(TEACHER, folder, *POOLING, pooler(), "--served-model-name", TEACHER) as address:
        yield address


@pytest.fixture(scope="module")
def batch() -> Batch:
    model, tokenizer = load_model(TEACHER), load_tokenizer(TEACHER)
    config, prompts = (
        SamplingConfig(max_new_tokens=32, num_samples=2),
        LedgerTask(5).prompts(0, 4, 0),
    )
    return collate(TransformersSampler(model, tokenizer, 8).sample(
        RolloutRequest(prompts, config, (1,))
    ), 0)  # fmt: skip


def served(url: str, **changes: Any) -> ServedTeacher:
    settings = HiddenServerTeacher("hidden_server", TEACHER, url, server="vllm", **changes)
    head = load_head_model(TEACHER, "float32")
    local = Teacher(load_model(TEACHER), 38)
    return served_teacher(settings, head, local.vocab_size, None, local.store)


def test_hidden_states_are_those_of_transformers(url: str, batch: Batch) -> None:
    local = Teacher(load_model(TEACHER), 38)
    with local.on_device():
        expected = local.forward(batch).hidden
    teacher = served(url)
    assert TEACHER in teacher.source.connect()[0]
    with teacher.on_device():
        found = teacher.forward(batch).hidden
    assert float((found - expected).abs().max()) < 1e-4
    half = served(url, payload="bfloat16")
    with half.on_device():
        half.forward(batch)
    gap = half.checks()["teacher_payload_gap"]
    assert gap is not None
    assert 0 < gap < 4e-3


def test_a_run_with_vllm_is_close_to_a_local_one(url: str, tmp_path: Path) -> None:
    lines: list[list[dict[str, Any]]] = []
    for name, teacher in (
        ("local", {"model": TEACHER}),
        ("vllm", {"kind": "hidden_server", "model": TEACHER, "url": url, "server": "vllm"}),
    ):
        steps: list[dict[str, Any]] = []
        tables = {"student": {"model": STUDENT}, "teacher": teacher, "num_steps": 2}
        config = tiny_config(tmp_path, tmp_path / name, **tables)
        train(config, log=lambda _: None, on_step=steps.append)
        lines.append(steps)
    for ours, theirs in zip(*lines, strict=True):
        assert theirs["reverse_kl_nats"] == pytest.approx(ours["reverse_kl_nats"], abs=1e-4)
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-3)


def test_a_server_of_another_model_is_refused(url: str, batch: Batch) -> None:
    with pytest.raises(ModelError, match=r"set teacher\.served_name"):
        served(url, served_name="another").source.connect()
    teacher = served(url)
    source, hidden = teacher.source, teacher.source.hidden
    # what a server of other weights, or one that mixes rows up, would give
    source.hidden = lambda batch, payload: hidden(batch, payload).roll(1, 0)  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="are not final ones of"):
        teacher.forward(batch)


def test_log_probabilities_of_the_same_model_prove_hidden_states(
    url: str, batch: Batch, tmp_path: Path
) -> None:
    options = ("--logprobs-mode", "raw_logprobs", "--served-model-name", TEACHER)
    with running(TEACHER, tmp_path, *options) as other:
        teacher = served(url, logprob_url=other)
        with teacher.on_device():
            teacher.forward(batch)
        teacher = served(url, logprob_url=other)
        hidden = teacher.source.hidden
        teacher.source.hidden = lambda batch, payload: hidden(batch, payload).roll(1, 0)  # type: ignore[method-assign]
        with pytest.raises(ModelError, match="give other log-probabilities than the"):
            teacher.forward(batch)
