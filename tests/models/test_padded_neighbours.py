"""A rectangle of sequences gives each the hidden states it has alone, whatever the attention."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tutelage.data.batch import Side, collate, length_groups
from tutelage.data.types import Prompt, Rollout
from tutelage.models.head import hidden_rows

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    # Two of three layers see four tokens back only.
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=4, query_pre_attn_scalar=8),
}


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def rollouts() -> list[Rollout]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for prompt, length in [(3, 1), (2, 20), (5, 2), (1, 9), (4, 30), (3, 3), (2, 8), (6, 25)]:
        ids = torch.randint(1, 50, (prompt + length,), generator=generator).tolist()
        found.append(Rollout(Prompt("p", "p"), 0, tuple(ids[:prompt]), tuple(ids[prompt:])))
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_neighbours_do_not_see_each_other_or_padding(name: str, side: Side) -> None:
    model, every = model_of(name), rollouts()
    lengths = [len(r.prompt_ids) + len(r.completion_ids) for r in every]
    groups = length_groups(lengths, 64, 8)
    assert 1 < len(groups) < len(every)
    with torch.no_grad():
        for group in groups:
            found = hidden_rows(model, collate([every[i] for i in group], 0, side))
            alone = torch.cat([hidden_rows(model, collate([every[i]], 0)) for i in group])
            assert float((found - alone).abs().max()) <= 1e-5 * float(alone.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_another_neighbour_within_the_sequence_would_be_seen(name: str) -> None:
    """Negative control: two rollouts run together into one sequence change the second."""
    model, (first, second) = model_of(name), rollouts()[:2]
    joined = Rollout(
        second.prompt,
        0,
        (*first.prompt_ids, *first.completion_ids, *second.prompt_ids),
        second.completion_ids,
    )
    with torch.no_grad():
        found, alone = (hidden_rows(model, collate([r], 0)) for r in (joined, second))
    assert float((found - alone).abs().max()) > 1e-2 * float(alone.abs().max())
