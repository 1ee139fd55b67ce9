"""Written-out forward passes and faster layers: the model's own numbers, where they are meant."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tutelage.data.batch import Batch, Side, collate
from tutelage.data.types import Prompt, Rollout
from tutelage.models.head import hidden_rows
from tutelage.models.llama_cpu.forward import is_written_out, last_hidden
from tutelage.models.llama_cpu.patch import use_fast_layers
from tutelage.models.lora import add_lora, checkpoint_activations, learning

SIZES: dict[str, Any] = {
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
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama, far": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "qwen3, as many keys": Qwen3Config(**SIZES | {"num_key_value_heads": 4}),
    "another activation": LlamaConfig(**SIZES, hidden_act="gelu"),
    "one layer": Qwen3Config(**SIZES | {"num_hidden_layers": 1}),
}
OTHERS = {
    "a window": MistralConfig(**SIZES, sliding_window=4),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=4, query_pre_attn_scalar=8),
}


def model_of(config: Any) -> PreTrainedModel:
    """A model whose norms and biases are not the ones they start with."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def batch_of(side: Side = "right") -> Batch:
    generator = torch.Generator().manual_seed(1)
    found = []
    for prompt, length in [(3, 1), (2, 20), (5, 2), (6, 0), (4, 13)]:
        ids = torch.randint(1, 50, (prompt + length,), generator=generator).tolist()
        found.append(Rollout(Prompt("p", "p"), 0, tuple(ids[:prompt]), tuple(ids[prompt:])))
    return collate(found, 0, side)


def own_rows(model: PreTrainedModel, batch: Batch) -> Tensor:
    """What the model's own code says, by masks."""
    output = model.base_model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    )
    return batch.flatten(output.last_hidden_state)


def gradients(model: PreTrainedModel, hidden: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    (hidden * weights).sum().backward()
    named = model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_close(found: Tensor, wanted: Tensor) -> None:
    gap = (found - wanted).detach().abs().max()
    assert float(gap) <= 2e-5 * float(wanted.detach().abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_and_gradients_are_the_models_own(name: str) -> None:
    original = model_of(CONFIGS[name])
    model, batch = copy.deepcopy(original), batch_of()
    use_fast_layers(model)
    assert is_written_out(model)
    found, wanted = hidden_rows(model, batch), own_rows(original, batch)
    assert_close(found, wanted)
    ours, theirs = gradients(model, found), gradients(original, wanted)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert_close(ours[key], theirs[key])


def test_columns_before_the_first_are_left_out_and_nothing_else() -> None:
    model, ids = model_of(CONFIGS["qwen3"]), batch_of().input_ids
    with torch.no_grad():
        whole = last_hidden(model, ids, 0)
        for first in (1, 7, ids.shape[1] - 1):
            assert_close(last_hidden(model, ids, first), whole[:, first:])
        shifted = last_hidden(model, ids, 3)[:, 1:] - last_hidden(model, ids, 3)[:, :-1]
    assert float(shifted.abs().max()) > 0.1  # negative control: a shift by one would be seen


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_forgotten_part_would_be_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without rotary positions the rows are others."""
    model, batch = model_of(CONFIGS[name]), batch_of()
    monkeypatch.setattr("tutelage.models.llama_cpu.forward.rotate", lambda x, *_: x)
    with torch.no_grad():
        found, wanted = hidden_rows(model, batch), own_rows(model, batch)
    assert float((found - wanted).abs().max()) > 1e-2 * float(wanted.abs().max())


def test_every_layer_keeps_its_own_scale() -> None:
    model, batch = model_of(CONFIGS["qwen3"]), batch_of()
    model.model.layers[1].self_attn.scaling *= 3
    assert is_written_out(model)
    with torch.no_grad():
        assert_close(hidden_rows(model, batch), own_rows(model, batch))


@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
@pytest.mark.parametrize("side", ["left", "right"])
def test_any_padding_and_any_family_gives_the_models_rows(name: str, side: Side) -> None:
    original, batch = model_of((CONFIGS | OTHERS)[name]), batch_of(side)
    model = copy.deepcopy(original)
    use_fast_layers(model)
    with torch.no_grad():
        assert_close(hidden_rows(model, batch), own_rows(original, batch))


def test_a_batch_without_rows_has_none() -> None:
    batch = batch_of()
    none = replace(batch, row_index=batch.row_index[:0], tokens=batch.tokens[:0])
    assert hidden_rows(model_of(CONFIGS["qwen3"]), none).shape == (0, 32)


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_are_left_to_their_own_code(name: str) -> None:
    assert not is_written_out(model_of(OTHERS[name]))


def test_what_the_written_form_does_not_know_goes_through_the_models_own() -> None:
    model = model_of(CONFIGS["qwen3"])
    assert is_written_out(model)
    assert not is_written_out(copy.deepcopy(model).double())
    assert not is_written_out(copy.deepcopy(model).to(torch.bfloat16))
    assert not is_written_out(copy.deepcopy(model).train())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_written_out(model)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    assert not is_written_out(eager)
    hooked = copy.deepcopy(model)
    hooked.model.layers[1].register_forward_hook(lambda *_: None)
    assert not is_written_out(hooked)
    checkpoint_activations(model)
    with learning(model, (0,)):
        assert not is_written_out(model)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_adapters_learn_the_same() -> None:
    found = []
    for is_fast in (False, True):
        model, batch = model_of(CONFIGS["qwen3"]), batch_of()
        if is_fast:
            use_fast_layers(model)
        add_lora(model, rank=4, alpha=8.0, seed=3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
        assert is_written_out(model)
        rows = hidden_rows(model, batch) if is_fast else own_rows(model, batch)
        found.append(gradients(model, rows))
    theirs, ours = found
    assert ours.keys() == theirs.keys()
    assert all("lora" in key for key in theirs)
    for key in theirs:
        assert_close(ours[key], theirs[key])


def test_layers_keep_their_names_weights_hooks_and_kind() -> None:
    original = model_of(CONFIGS["qwen3"])
    model = copy.deepcopy(original)
    weights, seen = dict(model.named_parameters()), list[int]()
    norm = model.model.norm
    norm.register_forward_hook(lambda *_: seen.append(1))
    use_fast_layers(model)
    assert model.model.norm is norm
    assert isinstance(norm, type(original.model.norm))
    assert type(norm) is not type(original.model.norm)
    assert type(norm).__name__ == "Qwen3RMSNorm"
    assert type(norm) is type(model.model.layers[0].self_attn.q_norm)
    after = dict(model.named_parameters())
    assert after.keys() == weights.keys()
    assert all(after[name] is weights[name] for name in weights)
    with torch.no_grad():
        model(torch.tensor([[1, 2]]))
    assert seen == [1]


def test_norms_of_other_kinds_and_dtypes_are_as_they_were() -> None:
    gemma = model_of(OTHERS["gemma3"])
    kinds = [type(module) for module in gemma.modules() if "Norm" in type(module).__name__]
    use_fast_layers(gemma)
    assert kinds == [type(m) for m in gemma.modules() if "Norm" in type(m).__name__]
    for dtype in (torch.bfloat16, torch.float64):
        original = model_of(CONFIGS["llama"]).to(dtype)
        model = copy.deepcopy(original)
        use_fast_layers(model)
        with torch.no_grad():
            x = torch.randn(3, 32, dtype=dtype)
            assert torch.equal(model.model.norm(x), original.model.norm(x))
