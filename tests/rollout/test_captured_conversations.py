"""Conversations by captured steps, run eagerly, against the model's own forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from talking import agent

from eager import generate_captured, make_model
from tutelage.config.sampling import SamplingConfig
from tutelage.data.types import Prompt, Rollout
from tutelage.models.packing import use_own_attention
from tutelage.models.tiny import tiny_tokenizer
from tutelage.rollout.cuda import extend, kv_slots
from tutelage.rollout.cuda.extend import Following
from tutelage.rollout.generate import generate
from tutelage.rollout.request import RolloutRequest

TOKENIZER = tiny_tokenizer()
PROMPTS = [Prompt(letter * (1 + 5 * (index % 3)), letter) for index, letter in enumerate("abcde")]
CONFIG = SamplingConfig(temperature=1.5, max_new_tokens=60, num_samples=2)
MIXED = {
    "use_sliding_window": True,
    "sliding_window": 20,
    "layer_types": ["sliding_attention", "full_attention"],
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 20},
    "qwen2": {"num_key_value_heads": 1, "hidden_size": 128},
    "qwen3": {"tie_word_embeddings": True, **MIXED},
}


def talking_model(family: str = "qwen3", **options: Any) -> Any:
    """A model of which one token in ten ends a turn."""
    model = make_model(family, vocab_size=len(TOKENIZER), **options)
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, *range(0, 256, 11)]
    return model


def own(model: Any, config: SamplingConfig = CONFIG, **limits: float) -> list[Rollout]:
    request = RolloutRequest(PROMPTS, config, (1,), record_hidden=True, agent=agent(**limits))
    return generate(model, TOKENIZER, request, is_fast=False)


def captured(
    model: Any, batch_size: int, config: SamplingConfig = CONFIG, **limits: float
) -> tuple[list[Rollout], Any]:
    who = agent(**limits)
    return generate_captured(model, TOKENIZER, PROMPTS, config, batch_size, agent=who)


def outcome(rollouts: list[Rollout]) -> list[Any]:
    return [(r.completion_ids, r.is_generated, r.is_truncated, r.conversation) for r in rollouts]


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_steps_have_the_models_conversations(family: str) -> None:
    model = talking_model(family, **FAMILIES[family])
    expected = own(model)
    assert len({r.conversation.num_turns for r in expected if r.conversation}) == 4
    for batch_size in (3, 64):
        ours, _ = captured(model, batch_size)
        assert outcome(ours) == outcome(expected)
        for a, b in zip(ours, expected, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
            torch.testing.assert_close(a.hidden, b.hidden, rtol=1e-3, atol=1e-4)


def test_attention_of_training_reads_insertions_too() -> None:
    """On CUDA a student attends by a function of ours; here, with windows in one layer of two."""
    model = talking_model("qwen3", **MIXED)
    expected, _ = captured(model, 64)
    assert use_own_attention(model)
    ours, _ = captured(model, 64)
    assert outcome(ours) == outcome(expected)


def test_limits_are_those_of_other_engines() -> None:
    model = talking_model()
    limits: list[dict[str, float]] = [
        {"max_turns": 2},
        {"max_turn_tokens": 6},
        {"max_inserted_tokens": 60},
    ]
    for limit in limits:
        ours, generator = captured(model, 4, **limit)
        assert outcome(ours) == outcome(own(model, **limit))
        assert any(r.is_truncated for r in ours)
    assert generator.length == max(len(r.prompt_ids) for r in ours) + 60 + 60


def test_nothing_is_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass reads what is inserted and the id before it, which ended the turn."""
    read: list[int] = []
    prefilled: list[tuple[int, ...]] = []
    read_behind, prefill = kv_slots.read_behind, kv_slots.KVSlots.prefill

    def counted(model: Any, cache: Any, following: list[Following], pad: int) -> Any:
        read.extend(len(row.ids) for row in following)
        return read_behind(model, cache, following, pad)

    def listed(self: Any, model: Any, prompts: Any, pad: int) -> Any:
        prefilled.extend(prompts)
        return prefill(self, model, prompts, pad)

    model = talking_model()
    captured(model, 64)  # tries a step and an extension
    monkeypatch.setattr(kv_slots, "read_behind", counted)
    monkeypatch.setattr(kv_slots.KVSlots, "prefill", listed)
    rollouts, _ = captured(model, 64)
    ends = sum(r.is_generated[:-1].count(False) for r in rollouts)
    num_turns = sum(r.conversation.num_turns - 1 for r in rollouts if r.conversation)
    assert sum(read) == ends + num_turns > 100
    assert sorted(prefilled) == sorted({r.prompt_ids for r in rollouts})


def test_long_insertions_are_read_in_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = talking_model("mistral", sliding_window=20)
    whole, _ = captured(model, 64)
    monkeypatch.setattr(extend, "EXTEND_CHUNK", 7)
    monkeypatch.setattr(extend, "EXTEND_TOKENS", 150)
    parts, _ = captured(model, 64)
    assert outcome(parts) == outcome(whole)
    rows = [Following(0, 3, tuple(range(16))), Following(1, 60, (1, 2)), Following(2, 90, (5,))]
    assert list(extend.passes(rows)) == [
        [(0, Following(0, 3, tuple(range(7)))), (1, Following(1, 60, (1, 2)))],
        [(2, Following(2, 90, (5,)))],
        [(0, Following(0, 10, tuple(range(7, 14))))],
        [(0, Following(0, 17, (14, 15)))],
    ]


def test_columns_that_are_not_filled_may_hold_anything() -> None:
    model = talking_model()
    first, generator = captured(model, 3)
    generator.slots.cache.fill_(torch.nan)
    again, second = captured(model, 3)
    assert second.slots is generator.slots
    assert outcome(again) == outcome(first)


def test_a_wrong_extension_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = talking_model()
    seen = extend._SlotCache.seen
    monkeypatch.setattr(extend._SlotCache, "seen", lambda self, window: ~seen(self, window))
    with pytest.raises(AssertionError):
        captured(model, 3)
