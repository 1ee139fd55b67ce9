"""What passes allocate on shapes alone, against passes over real tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tiny import save_tiny_model
from tutelage.memory.meta_model import (
    FewBits,
    Live,
    learning_from,
    reading,
    shadow,
    stored_bytes,
)
from tutelage.models.liger import bind_liger
from tutelage.models.lora import checkpoint_activations


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


def test_layers_by_ligers_kernels_are_planned_as_the_models_own() -> None:
    plain, changed = make_model(), make_model()
    for layer in changed.modules():
        bind_liger(layer)
    bound = [vars(layer).get("forward") for layer in changed.modules()]
    assert sum(forward is not None for forward in bound) == 2 * 5 + 1
    found, expected = (learning_from(shadow(x), (2, 8), 8, False) for x in (changed, plain))
    assert found == expected
    now = [vars(layer).get("forward") for layer in changed.modules()]
    assert now == bound  # the model itself stays


def in_few_bits(twin: Any, num_bits: int) -> Any:
    """Linear layers, the head aside, in so many bits."""
    for layer in twin.base_model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in list(part.named_children()):
                if isinstance(module, torch.nn.Linear):
                    setattr(part, name, FewBits(module, num_bits, twin.dtype))
    return twin


def test_weights_of_few_bits_are_kept_packed_and_unpacked_for_a_product() -> None:
    wide, narrow = shadow(make_model()), in_few_bits(shadow(make_model()), 8)
    linear = [m for m in narrow.modules() if isinstance(m, FewBits)]
    assert len(linear) == 2 * 7  # the head is not among them
    count = sum(m.weight.numel() for m in linear)
    rows = sum(len(m.weight) for m in linear)
    assert stored_bytes(wide) - stored_bytes(narrow) == 4 * count - count - 4 * rows
    more = reading(narrow, (1, 1)).peak - reading(wide, (1, 1)).peak
    assert 0 < more <= max(4 * m.weight.numel() for m in linear)
    assert in_few_bits(shadow(make_model()), 4).base_model.layers[0].mlp.down_proj.num_bytes == (
        32 * 48 // 2 + 4 * 32 * 48 // 64
    )


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own
def test_a_quantised_model_has_a_shadow(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from tutelage.models.load import load_model

    save_tiny_model(tmp_path / "model", seed=0)
    model = load_model(str(tmp_path / "model"), "float32", quantization="8bit")
    twin = shadow(model)
    packed = [m for m in twin.modules() if isinstance(m, FewBits)]
    assert len(packed) == 2 * 7
    real = sum(p.nbytes for p in model.parameters())
    scales = sum(4 * m.out_features for m in packed)
    assert stored_bytes(twin) == real + scales
    assert reading(twin, (2, 8)).peak > 0
