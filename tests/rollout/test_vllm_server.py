"""A vLLM server over HTTP: what it is asked, and which of its replies are believed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from tiny import tiny_config
from tutelage.config.sampling import SamplingConfig
from tutelage.data.tasks import LedgerTask
from tutelage.errors import ModelError, RunError
from tutelage.models.load import load_model, load_tokenizer
from tutelage.models.tokenizers import stop_ids, vocabulary_size
from tutelage.rollout.replica_sampler import ReplicaSampler
from tutelage.rollout.request import RolloutRequest
from tutelage.train.loop import train
from vllm_stub import Change, FakeVLLM, sampler_of, serving

PROMPTS = LedgerTask(1).prompts(0, 3, 0)
CONFIG = SamplingConfig(max_new_tokens=6, num_samples=2)
STATED = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
    "stop": None,
    "ignore_eos": True,
    "n": 1,
}
"""What no server may fill in from its own defaults."""


@pytest.fixture(scope="module")
def student(tiny_models: Path) -> PreTrainedModel:
    return load_model(str(tiny_models / "student"), "float32")


@pytest.fixture
def server(student: PreTrainedModel, tiny_models: Path) -> Iterator[FakeVLLM]:
    tokenizer = load_tokenizer(str(tiny_models / "student"))
    with serving(student, stop_ids(student, tokenizer), vocabulary_size(tokenizer)) as fake:
        yield fake


@pytest.fixture
def sampler(
    server: FakeVLLM, student: PreTrainedModel, tiny_models: Path, tmp_path: Path
) -> ReplicaSampler:
    tokenizer = load_tokenizer(str(tiny_models / "student"))
    return sampler_of(student, tokenizer, [server.url], tmp_path / "weights")


def test_weights_are_read_before_completions_are_asked_for(
    sampler: ReplicaSampler, server: FakeVLLM, tmp_path: Path
) -> None:
    rollouts = sampler.sample(RolloutRequest(PROMPTS, CONFIG, (0,)))
    assert [(r.prompt.id, r.sample) for r in rollouts] == [
        (p.id, s) for p in PROMPTS for s in (0, 1)
    ]
    paths = [path for path, _ in server.asked]
    assert paths[:3] == ["/v1/models", "/collective_rpc", "/reset_prefix_cache"]
    assert set(paths[3:]) == {"/v1/completions"}
    assert len({body["seed"] for path, body in server.asked if path == "/v1/completions"}) == 6
    for path, body in server.asked:
        if path == "/v1/completions":
            assert {**body, **STATED} == body
    for rollout in rollouts:
        assert rollout.is_truncated == (rollout.completion_ids[-1] not in server.stops)
    sampler.close()
    assert not list((tmp_path / "weights").iterdir())


def choice_of(reply: dict[str, Any]) -> dict[str, Any]:
    choice: dict[str, Any] = reply["choices"][0]
    return choice


def logprobs_of(reply: dict[str, Any]) -> list[float]:
    logprobs: list[float] = choice_of(reply)["logprobs"]["token_logprobs"]
    return logprobs


SPOILT: dict[str, Change] = {
    "no choices": lambda r: r["choices"].clear(),
    "two choices": lambda r: r["choices"].append(choice_of(r)),
    "no tokens": lambda r: choice_of(r).update(token_ids=[]),
    "a token less": lambda r: choice_of(r)["token_ids"].pop(),
    "a log-probability less": lambda r: logprobs_of(r).pop(),
    "a negative token": lambda r: choice_of(r)["token_ids"].__setitem__(0, -1),
    "tokens as text": lambda r: choice_of(r).update(token_ids=["5"]),
    "tokens as floats": lambda r: choice_of(r).update(token_ids=[5.0]),
    "a probability above 1": lambda r: choice_of(r)["logprobs"]["token_logprobs"].__setitem__(
        0, 1.0
    ),
    "not a number": lambda r: choice_of(r)["logprobs"]["token_logprobs"].__setitem__(
        0, float("nan")
    ),
    "another prompt": lambda r: choice_of(r)["prompt_token_ids"].append(5),
    "another reason": lambda r: choice_of(r).update(finish_reason="abort"),
    "no reason": lambda r: choice_of(r).pop("finish_reason"),
    "the wrong end": lambda r: choice_of(r).update(
        finish_reason={"stop": "length", "length": "stop"}[choice_of(r)["finish_reason"]]
    ),
    "another object": lambda r: r.update(object="error"),
}


@pytest.mark.parametrize("change", SPOILT.values(), ids=SPOILT)
def test_a_reply_that_is_not_what_was_asked_for_is_an_error(
    change: Change, sampler: ReplicaSampler, server: FakeVLLM
) -> None:
    server.change = change
    with pytest.raises(ModelError, match="no usable reply in 2 tries") as caught:
        sampler.sample(RolloutRequest(PROMPTS[:1], CONFIG, (0,)))
    assert "\n" not in str(caught.value)


def test_an_id_beyond_the_tokenizer_fails_the_batch_at_once(
    sampler: ReplicaSampler, server: FakeVLLM
) -> None:
    server.change = lambda r: choice_of(r)["token_ids"].__setitem__(0, 10**6)
    with pytest.raises(ModelError, match=r"id 1000000, .* end at \d+: .*padded") as caught:
        sampler.sample(RolloutRequest(PROMPTS[:1], SamplingConfig(max_new_tokens=6), (0,)))
    assert "\n" not in str(caught.value)
    assert [path for path, _ in server.asked].count("/v1/completions") == 1


def test_requests_carry_no_vocabulary_and_the_tokenizer_is_listed_once(
    server: FakeVLLM,
    student: PreTrainedModel,
    tiny_models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = load_tokenizer(str(tiny_models / "student"))
    listed = []
    vocabulary = tokenizer.get_vocab()
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: listed.append(1) or vocabulary)
    sampler = sampler_of(student, tokenizer, [server.url], tmp_path / "w")
    for step in range(2):
        sampler.sample(RolloutRequest(PROMPTS, CONFIG, (step,)))
    assert len(listed) <= 1
    bodies = [body for path, body in server.asked if path == "/v1/completions"]
    assert len(bodies) == 12
    assert all(body.get("allowed_token_ids") is None for body in bodies)
    assert max(len(json.dumps({**body, "prompt": []})) for body in bodies) < 1000


def run(server: FakeVLLM, models: Path, out: Path) -> list[dict[str, Any]]:
    engine = {"kind": "vllm_server", "urls": [server.url], "folder": str(out / "weights")}
    steps: list[dict[str, Any]] = []
    optimizer = {"learning_rate": 1e-2, "schedule": "constant"}
    config = tiny_config(models, out, engine=engine, optimizer=optimizer)
    train(config, log=lambda _: None, on_step=steps.append)
    return steps


def test_a_run_trains_on_what_the_server_writes(
    server: FakeVLLM, tiny_models: Path, tmp_path: Path
) -> None:
    steps = run(server, tiny_models, tmp_path)
    assert len(steps) == 4
    assert all(step["engine_logprob_gap_nats"] < 1e-6 for step in steps)


def test_a_run_stops_when_the_server_keeps_its_weights(
    server: FakeVLLM, tiny_models: Path, tmp_path: Path
) -> None:
    server.reads_weights = False
    with pytest.raises(RunError, match="step 2 are not the student's"):
        run(server, tiny_models, tmp_path)
