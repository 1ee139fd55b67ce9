"""Sequences in one row read as each does alone, whatever lies beside them."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_padded_neighbours import SIZES, rollouts
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tutelage.data.batch import collate, pack
from tutelage.errors import ConfigError, ModelError
from tutelage.models import packing
from tutelage.models.forward import read_alone
from tutelage.models.head import hidden_rows
from tutelage.setup.trial import try_model

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=4),
    "qwen2": Qwen2Config(**SIZES | {"num_key_value_heads": 4}),
    "qwen3": Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
}
OTHERS: dict[str, Any] = {
    "gemma2": Gemma2Config(**SIZES, attn_logit_softcapping=5.0),
    "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "mamba": MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=4),
    "llama_dynamic": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    ),
}


def model_of(config: Any, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(deepcopy(config)).to(dtype).eval()


def prepared(name: str) -> PreTrainedModel:
    model = model_of(CONFIGS[name])
    packing.require_packed(model, "student")
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_row_holds_what_each_sequence_has_alone(name: str) -> None:
    plain, model, every = model_of(CONFIGS[name]), prepared(name), rollouts()
    with torch.no_grad():
        found = hidden_rows(model, pack(every))
        expected = torch.cat([hidden_rows(plain, collate([r], 0)) for r in every])
        rectangle = [hidden_rows(model, collate(every, 0, side)) for side in ("left", "right")]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for padded in rectangle:  # which a prepared model reads as before
        torch.testing.assert_close(padded, expected, rtol=1e-12, atol=1e-12)


def test_sequences_that_see_one_another_would_be_seen() -> None:
    """Negative control: the same row read as one sequence is far from it."""
    model, batch = prepared("llama"), pack(rollouts())
    with torch.no_grad():
        found = hidden_rows(model, batch)
        joined = read_alone(model, tuple(batch.input_ids[0].tolist()))[batch.row_index]
    assert float((found - joined).abs().max()) > 1e-2 * float(found.abs().max())


def test_a_trial_finds_a_model_that_reads_packed_rows_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = prepared("llama")
    try_model(model, "student 'x'", 50, is_packed=True)
    monkeypatch.setattr(packing, "_by_sequence", _over_the_whole_row)
    with pytest.raises(ModelError, match="'x' computes a sequence differently in a packed row"):
        try_model(model, "student 'x'", 50, is_packed=True)


def _over_the_whole_row(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match=r'Use micro_batches = "padded"\.$') as error:
        packing.require_packed(model_of(OTHERS[name]), f"teacher {name!r}")
    assert f"got the teacher {name!r}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("asked", "named"), [({"softcap": 5.0}, "softcap"), ({"s_aux": 1}, "s_aux"), ({}, "dropout")]
)
def test_what_attention_does_not_know_is_refused(asked: dict[str, Any], named: str) -> None:
    x = torch.zeros(1, 2, 3, 4)
    starts = torch.tensor([0, 3])
    module = model_of(CONFIGS["llama"]).base_model.layers[0].self_attn
    options = asked or {"dropout": 0.1}
    with pytest.raises(ModelError, match=rf"{named}.*\"padded\"\.$"):
        packing.attention(module, x, x, x, None, cu_seq_lens_q=starts, lengths=(3,), **options)


def test_a_saved_model_does_not_name_an_attention_that_only_we_know(tmp_path: Path) -> None:
    prepared("llama").save_pretrained(tmp_path)
    assert "packed" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def _flash(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor,
    max_q: int, max_k: int, *, scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Torch's variable-length attention, as its documentation has it."""
    assert key.shape == value.shape
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert window_size[1] == 0
    place = torch.arange(len(query))
    sequence = torch.bucketize(place, cu_seq_q[1:], right=True)
    behind = place[:, None] - place
    sees = (sequence[:, None] == sequence) & (behind >= 0)
    if window_size[0] >= 0:
        sees &= behind <= window_size[0]
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, sees, scale=scale, enable_gqa=enable_gqa)
    return out.transpose(0, 1)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("window", [None, 3, 100])
def test_the_kernel_is_asked_for_the_same(
    monkeypatch: pytest.MonkeyPatch, groups: int, window: int | None
) -> None:
    import torch.nn.attention.varlen as module

    monkeypatch.setattr(module, "varlen_attn", _flash)
    torch.manual_seed(0)
    lengths = (5, 1, 7)
    q = torch.randn(1, 4, 13, 8, dtype=torch.float64)
    k, v = (torch.randn(1, groups, 13, 8, dtype=torch.float64) for _ in "kv")
    expected = packing._by_sequence(q, k, v, lengths, 0.3, window)
    starts = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    rows = (x[0].transpose(0, 1) for x in (q, k, v))
    found = packing._by_kernel(*rows, starts, 7, 0.3, window)  # type: ignore[call-arg, arg-type]
    torch.testing.assert_close(found, expected[0], rtol=1e-12, atol=1e-12)
