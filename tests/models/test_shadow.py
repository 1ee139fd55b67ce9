"""What passes allocate on shapes alone, against passes over real tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tutelage.models.adapter import checkpoint_activations
from tutelage.models.shadow import Live, learning_from, reading, shadow


def make_model() -> Any:
    """As transformers makes it: `load_model` would put in norms that are for CPUs."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,  # of fewer, CUDA's backward pass takes copies that a CPU's does not
        head_dim=8,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_shapes_take_what_tensors_take(is_checkpointed: bool) -> None:
    model = make_model()
    if is_checkpointed:
        checkpoint_activations(model)
    weights = sum(p.nbytes for p in model.parameters())
    shape, num_rows = (6, 64), 6 * 40
    found = learning_from(shadow(model), shape, num_rows, has_gradients=False)
    ids = torch.zeros(shape, dtype=torch.int64)
    model.train(is_checkpointed)
    with Live((*model.parameters(), *model.buffers())) as live:
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        rows = states.flatten(0, 1)[:num_rows] * 1.0
        del states
        kept, live.peak = live.now, live.now
        loss = (rows.sum() + model.lm_head.weight.sum()) * 1.0
        del rows
        loss.backward()
    assert found.forward.kept == pytest.approx(kept, rel=0.1)
    assert found.backward == pytest.approx(live.peak, rel=0.1)
    assert found.backward > weights  # gradients are among it
    more = learning_from(shadow(model), (12, 64), 2 * num_rows, has_gradients=False)
    assert more.forward.kept > 1.8 * found.forward.kept


def test_a_cache_is_as_large_as_its_tokens() -> None:
    model = make_model()
    cache = model(torch.arange(14).view(2, 7), use_cache=True).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    states = 2 * 7 * 32 * 4
    assert reading(shadow(model), (2, 7), is_cached=True).kept == real + states
    assert reading(shadow(model), (2, 7)).kept == states
