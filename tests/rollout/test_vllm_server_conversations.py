"""Conversations over a vLLM server: what it is asked in every turn, and who waits for whom."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from talking import Talk, agent

from tutelage.config.conversations import LedgerToolsData
from tutelage.config.sampling import SamplingConfig
from tutelage.data.types import Prompt, Rollout, Turn
from tutelage.envs.environment import Reply
from tutelage.errors import ModelError
from tutelage.models.tiny import tiny_tokenizer
from tutelage.models.tokenizers import stop_ids
from tutelage.rollout.replica_sampler import ReplicaSampler
from tutelage.rollout.request import Agent, RolloutRequest
from vllm_stub import FakeVLLM, sampler_of, serving

TOKENIZER = tiny_tokenizer()
PROMPTS = [Prompt(letter, letter) for letter in "abcd"]
CONFIG = SamplingConfig(max_new_tokens=40, num_samples=2)


@pytest.fixture(scope="module")
def model(make_qwen3: Callable[..., Any]) -> Any:
    """A model of which one token in ten ends a turn."""
    model = make_qwen3(len(TOKENIZER))
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, *range(0, 256, 11)]
    return model


@pytest.fixture
def server(model: Any) -> Iterator[FakeVLLM]:
    with serving(model, stop_ids(model, TOKENIZER), len(TOKENIZER)) as fake:
        yield fake


@pytest.fixture
def sampler(server: FakeVLLM, model: Any, tmp_path: Path) -> ReplicaSampler:
    return sampler_of(model, TOKENIZER, [server.url], tmp_path / "weights")


def sample(sampler: ReplicaSampler, who: Agent, config: SamplingConfig = CONFIG) -> list[Rollout]:
    return sampler.sample(RolloutRequest(PROMPTS, config, (1,), agent=who))


def turns(rollout: Rollout) -> list[tuple[int, int]]:
    """Where each turn begins and ends among the ids behind the prompt."""
    found: list[tuple[int, int]] = []
    for place, is_generated in enumerate(rollout.is_generated):
        if is_generated and (place == 0 or not rollout.is_generated[place - 1]):
            found.append((place, place + 1))
        elif is_generated:
            found[-1] = (found[-1][0], place + 1)
    return found


def test_every_turn_is_asked_for_behind_all_ids_so_far(
    sampler: ReplicaSampler, server: FakeVLLM
) -> None:
    rollouts = sample(sampler, agent(max_turn_tokens=25))
    assert {r.conversation.num_turns for r in rollouts if r.conversation} >= {2, 3, 4}
    asked = [body for path, body in server.asked if path == "/v1/completions"]
    expected = []
    for rollout in rollouts:
        num_before = 0
        for start, end in turns(rollout):
            prompt = [*rollout.prompt_ids, *rollout.completion_ids[:start]]
            expected.append((prompt, min(25, 40 - num_before)))
            num_before += end - start
    assert sorted((body["prompt"], body["max_tokens"]) for body in asked) == sorted(expected)
    assert len({body["seed"] for body in asked}) == len(asked)
    again = sample(sampler, agent(max_turn_tokens=25))
    assert again == rollouts


@torch.no_grad()
def test_log_probabilities_are_those_of_the_whole_conversation(
    sampler: ReplicaSampler, model: Any
) -> None:
    for rollout in sample(sampler, agent()):
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
        log_p = model(ids).logits[0].log_softmax(-1)
        start = len(rollout.prompt_ids) - 1
        rows = [start + n for n, is_generated in enumerate(rollout.is_generated) if is_generated]
        own = log_p[rows, list(rollout.generated_ids)]
        assert rollout.logprobs == pytest.approx(own.tolist(), abs=1e-4)


def test_a_conversation_that_waits_for_its_tools_holds_up_no_other(
    sampler: ReplicaSampler,
) -> None:
    arrived: list[int] = []
    late: list[bool] = []
    both = threading.Event()

    @dataclass
    class Meeting(Talk):
        """Answers a first turn when another conversation has ended one, too."""

        def act(self, turn: Turn) -> Reply:
            if not self.heard:
                arrived.append(1)
                if len(arrived) > 1:
                    both.set()
                late.append(not both.wait(8))
            return super().act(turn)

    sample(sampler, Agent(Meeting, LedgerToolsData(tool_timeout_s=9)))
    assert len(arrived) > 2
    assert not any(late)


def test_a_conversation_that_may_outgrow_the_server_is_refused(
    server: FakeVLLM, model: Any, tmp_path: Path
) -> None:
    server.max_model_len = 200
    sampler = sampler_of(model, TOKENIZER, [server.url], tmp_path / "weights")
    with pytest.raises(ModelError, match=r"vLLM reads 200 tokens, .* 4096 inserted ones") as caught:
        sample(sampler, agent())
    assert "\n" not in str(caught.value)
    assert sample(sampler, agent(max_inserted_tokens=100))
