"""Conversations by vLLM in this process; `make test-vllm` makes the environment for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vllm: make test-vllm")

from talking import agent

from eager import make_model
from tutelage.config.parse import load_config
from tutelage.config.sampling import SamplingConfig
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import ModelError
from tutelage.models.tiny import tiny_tokenizer
from tutelage.rollout.request import Agent, RolloutRequest
from tutelage.rollout.vllm_engine import VLLMSampler
from tutelage.train.loop import train

# vLLM and what it imports warn about a CPU; what is tested is what it computes.
pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = tiny_tokenizer()
PROMPTS = [Prompt(letter * 100, letter) for letter in "abcd"]
CONFIG = SamplingConfig(max_new_tokens=60, num_samples=2)


@pytest.fixture(scope="module")
def model() -> Any:
    """A model of which one token in ten ends a turn."""
    model = make_model("qwen3", vocab_size=len(TOKENIZER), max_position_embeddings=4096)
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, *range(0, 256, 11)]
    model.config.architectures = [type(model).__name__]
    return model


@pytest.fixture  # one at a time: vLLM has global state
def sampler(model: Any) -> Iterator[VLLMSampler]:
    sampler = VLLMSampler(model, TOKENIZER, max_model_len=1000)
    yield sampler
    sampler.close()


def sample(sampler: VLLMSampler, who: Agent, seed: int = 1) -> list[Rollout]:
    return sampler.sample(RolloutRequest(PROMPTS, CONFIG, (seed,), agent=who))


@torch.no_grad()
def test_conversations_are_the_models_and_follow_the_seed(sampler: VLLMSampler) -> None:
    who = agent(max_inserted_tokens=400)
    rollouts = sample(sampler, who)
    assert {r.conversation.num_turns for r in rollouts if r.conversation} >= {2, 3, 4}
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
        log_p = sampler.model(ids).logits[0].log_softmax(-1)
        start = len(rollout.prompt_ids) - 1
        rows = [start + n for n, is_generated in enumerate(rollout.is_generated) if is_generated]
        own = log_p[rows, list(rollout.generated_ids)]
        assert rollout.logprobs == pytest.approx(own.tolist(), abs=1e-4)
        assert len(rollout.generated_ids) <= 60
    assert sample(sampler, who) == rollouts
    assert sample(sampler, who, seed=2) != rollouts
    single = sampler.sample(RolloutRequest(PROMPTS, CONFIG, (1,)))
    assert all(r.conversation is None for r in single)


def test_prefixes_are_read_from_the_cache(
    sampler: VLLMSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = sampler.llm.llm_engine
    step, read = engine.step, []

    def watched() -> Any:
        outputs = step()
        read.extend((len(x.prompt_token_ids), x.num_cached_tokens) for x in outputs if x.finished)
        return outputs

    monkeypatch.setattr(engine, "step", watched)
    rollouts = sample(sampler, agent(max_inserted_tokens=400))
    block = engine.vllm_config.cache_config.block_size
    later = sorted(read)[len(rollouts) :]  # turns behind the first
    assert len(later) >= 8
    assert all(num_cached >= length // block * block - block for length, num_cached in later)
    assert sum(num_cached for _, num_cached in later) > 0


def test_a_conversation_that_may_outgrow_vllm_is_refused(sampler: VLLMSampler) -> None:
    with pytest.raises(ModelError, match=r"vLLM reads 1000 tokens, .* 4096 inserted ones"):
        sample(sampler, agent())


def test_the_embedded_agents_train_by_vllm(tmp_path: Path) -> None:
    changes = ["engine.kind=vllm", "num_steps=2", "evaluation.num_problems=0", f"out={tmp_path}"]
    steps: list[dict[str, Any]] = []
    config = load_config(ROOT / "configs" / "ledger_tools.toml", changes)
    train(config, log=lambda _: None, on_step=steps.append)
    assert [step["step"] for step in steps] == [1, 2]
    assert all(0 < step["engine_logprob_gap_nats"] < 1e-5 for step in steps)
    assert all(4 <= step["turns_mean"] <= 6 for step in steps)
    assert all(step["success_share"] < 0.5 for step in steps)
