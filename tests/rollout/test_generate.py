"""Captured steps, run eagerly, against the model's own forward pass: the same tokens."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eager import generate_captured, make_model
from sampling import sample_rollouts
from tutelage.config.sampling import SamplingConfig
from tutelage.data.types import Prompt
from tutelage.errors import ModelError
from tutelage.models.lora import add_lora, merge
from tutelage.rollout.cuda import generate, kv_slots
from tutelage.rollout.cuda.decode_step import is_covered, windows_of
from tutelage.rollout.cuda.operators import TorchOperators

RAGGED = [Prompt(f"p{i}", "abc defghij klmnop"[: 1 + 3 * i]) for i in range(6)]
CONFIG = SamplingConfig(temperature=1.5, max_new_tokens=30, num_samples=3)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 6},
    "qwen2": {"num_key_value_heads": 1, "hidden_size": 128},
    "qwen3": {"tie_word_embeddings": True},
}


def outcome(drawn: Any) -> list[tuple[tuple[int, ...], bool]]:
    return [(r.completion_ids, r.is_truncated) for r in drawn]


def own(model: Any, letters: Any, config: SamplingConfig = CONFIG) -> Any:
    return sample_rollouts(
        model, letters, RAGGED, config, (1,), 4, record_hidden=True, is_fast=False
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_slots_draw_what_the_model_draws(family: str, batch_size: int, letters: Any) -> None:
    model = make_model(family, **FAMILIES[family])
    expected = own(model, letters)
    ours, _ = generate_captured(model, letters, RAGGED, CONFIG, batch_size)
    assert outcome(ours) == outcome(expected)
    assert len({len(r.completion_ids) for r in ours}) > 3  # they left at different times
    for a, b in zip(ours, expected, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    for mine, theirs in zip([r.hidden for r in ours], [r.hidden for r in expected], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(0.0, max_new_tokens=12),
        SamplingConfig(0.7, 0.9, 5, 12, 2),
        SamplingConfig(1.0, 0.5, 0, 12, 2),
    ],
)
def test_filters_and_greedy_draw_what_they_draw_elsewhere(
    config: SamplingConfig, letters: Any
) -> None:
    model = make_model("qwen3")
    ours, _ = generate_captured(model, letters, RAGGED, config, 8)
    assert outcome(ours) == outcome(own(model, letters, config))


def test_a_step_reads_weights_that_were_written_in_place(letters: Any) -> None:
    model = make_model("qwen3")
    before, first = generate_captured(model, letters, RAGGED, CONFIG, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after, second = generate_captured(model, letters, RAGGED, CONFIG, 8)
    assert second.slots is first.slots  # nothing was captured anew
    assert outcome(after) == outcome(own(model, letters)) != outcome(before)


def test_adapters_are_part_of_the_step(letters: Any) -> None:
    pytest.importorskip("peft")
    model = make_model("qwen2", num_key_value_heads=1, hidden_size=128)
    add_lora(model, 3, 6.0)
    assert is_covered(model)
    before, first = generate_captured(model, letters, RAGGED, CONFIG, 8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    after, second = generate_captured(model, letters, RAGGED, CONFIG, 8)
    assert second.slots is first.slots
    assert outcome(after) == outcome(own(model, letters)) != outcome(before)
    merge(model)
    merged, _ = generate_captured(model, letters, RAGGED, CONFIG, 8)
    assert outcome(merged) == outcome(own(model, letters))


def test_weights_that_have_moved_are_found(letters: Any) -> None:
    model = make_model("qwen3")
    _, first = generate_captured(model, letters, RAGGED, CONFIG, 8)
    layer = model.model.layers[1].mlp.up_proj
    layer.weight.data = layer.weight.data * 1.5
    after, second = generate_captured(model, letters, RAGGED, CONFIG, 8)
    assert second.slots is not first.slots
    assert outcome(after) == outcome(own(model, letters))


def test_slots_serve_shorter_and_smaller_draws_and_grow_for_longer_ones(letters: Any) -> None:
    model = make_model("qwen3")
    _, first = generate_captured(model, letters, RAGGED, CONFIG, 16)
    _, smaller = generate_captured(model, letters, RAGGED[:2], SamplingConfig(max_new_tokens=5), 4)
    assert smaller.slots is first.slots
    longer = [Prompt("long", "ab " * 90)]
    drawn, grown = generate_captured(model, letters, longer, SamplingConfig(max_new_tokens=20), 4)
    assert grown.slots.capacity > first.slots.capacity
    expected = sample_rollouts(
        model, letters, longer, SamplingConfig(max_new_tokens=20), (1,), 4, is_fast=False
    )
    assert outcome(drawn) == outcome(expected)


def test_the_host_looks_once_in_a_few_steps(letters: Any) -> None:
    model = make_model("qwen3")
    model.generation_config.eos_token_id = 2
    drawn, generator = generate_captured(
        model, letters, RAGGED, SamplingConfig(max_new_tokens=20), 8
    )
    assert any(r.is_truncated for r in drawn)
    assert generator.num_transfers == 5  # after every fourth token


def test_rows_that_are_free_are_refilled_while_others_go_on(letters: Any) -> None:
    model = make_model("qwen3")
    drawn, generator = generate_captured(model, letters, RAGGED, CONFIG, 8)
    longest = max(len(r.completion_ids) for r in drawn)
    batches = -(-len(drawn) // 8)
    assert generator.num_transfers < batches * -(-longest // kv_slots.STEPS)


def test_a_row_with_more_steps_than_it_needs_is_waited_for(letters: Any) -> None:
    """Started beside a younger row, which ends before the host has seen the older one's end."""
    model = make_model("qwen3")
    for most in (9, 10, 11):
        config = SamplingConfig(temperature=1.5, max_new_tokens=most, num_samples=3)
        ours, _ = generate_captured(model, letters, RAGGED, config, 8)
        assert outcome(ours) == outcome(own(model, letters, config))


def test_a_wrong_step_is_not_taken(letters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("qwen3")

    def wrong(self: Any, work: Any) -> None:
        gate, up = work.gate_up.chunk(2, dim=-1)
        work.opened.copy_(torch.relu(gate) * up)

    monkeypatch.setattr(TorchOperators, "swiglu", wrong)
    with pytest.raises(AssertionError):
        generate_captured(model, letters, RAGGED, CONFIG, 8)


def test_a_wrong_window_is_not_taken(letters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("mistral", sliding_window=6)
    monkeypatch.setattr("tutelage.rollout.cuda.decode_step.windows_of", lambda config: [6, 0])
    with pytest.raises(AssertionError):
        generate_captured(model, letters, RAGGED, CONFIG, 8)


def test_logits_that_are_not_numbers_are_told(letters: Any) -> None:
    model = make_model("qwen3")
    generate_captured(model, letters, RAGGED, CONFIG, 8)
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(ModelError, match="not numbers"):
        generate_captured(model, letters, RAGGED, CONFIG, 8)


def test_parameters_that_share_a_matrix_are_saved_and_optimised_as_before(
    letters: Any, tmp_path: Path
) -> None:
    model = make_model("qwen3")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = list(before)
    generate_captured(model, letters, RAGGED, CONFIG, 8)
    assert [name for name, _ in model.named_parameters()] == names
    save_file(dict(model.named_parameters()), tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    for name, value in before.items():
        assert torch.equal(saved[name], value)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.tensor([[3, 7, 9]])).logits.square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before[names[-5]])
    after, _ = generate_captured(model, letters, RAGGED, CONFIG, 8)
    assert outcome(after) == outcome(own(model, letters))


def test_what_is_covered() -> None:
    assert is_covered(make_model("qwen3"))
    assert is_covered(make_model("mistral", sliding_window=6))
    assert is_covered(make_model("llama", dtype=torch.bfloat16))
    assert not is_covered(make_model("qwen3", head_dim=8))
    assert not is_covered(make_model("qwen3", dtype=torch.float64))
    assert not is_covered(make_model("llama", hidden_act="gelu"))
    assert not is_covered(make_model("gemma3_text"))
    model = make_model("qwen3")
    model.model.layers[0].mlp.register_forward_hook(lambda *args: None)
    assert not is_covered(model)


def test_windows_follow_the_kinds_of_layers() -> None:
    kinds = ["sliding_attention", "full_attention"]
    options = {"use_sliding_window": True, "sliding_window": 6, "layer_types": kinds}
    assert windows_of(make_model("qwen3", **options).config) == [6, 0]
    assert windows_of(make_model("qwen3", **options | {"use_sliding_window": False}).config) == [
        0,
        0,
    ]
    assert windows_of(make_model("llama").config) == [0, 0]


def test_buckets_hold_the_rows_with_little_to_spare() -> None:
    sizes = [kv_slots.bucket(n) for n in (1, 2, 3, 8, 9, 17, 24, 25, 33, 64, 65, 97)]
    assert sizes == [2, 2, 4, 8, 16, 24, 24, 32, 48, 64, 96, 128]


def test_what_was_drawn_before_changes_no_bit(letters: Any) -> None:
    config = SamplingConfig(max_new_tokens=12)
    fresh, _ = generate_captured(make_model("qwen3"), letters, RAGGED[:3], config, 3)
    model = make_model("qwen3")
    _, larger = generate_captured(model, letters, [*RAGGED, Prompt("long", "ab " * 90)], CONFIG, 64)
    again, generator = generate_captured(model, letters, RAGGED[:3], config, 3)
    assert generator.slots is larger.slots
    assert again == fresh
    assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(again, fresh, strict=True))
    longest = generator.length
    assert generator.slots.num_splits(4, longest) == kv_slots.KVSlots(
        model, generator.device, 3, longest
    ).num_splits(4, longest)


def test_slots_that_are_forgotten_are_freed_at_once(letters: Any) -> None:
    """No cycle holds them: a collector that comes later would leave their memory to no one."""
    model = make_model("qwen3")
    _, generator = generate_captured(model, letters, RAGGED[:2], CONFIG, 4)
    slots = weakref.ref(generator.slots)
    gc.disable()
    try:
        del generator
        assert slots() is not None  # kept for the next draw
        generate.forget(model)
        assert slots() is None
    finally:
        gc.enable()
