"""Weights in several files: which file holds what, and that transformers loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tutelage.models.sharding import plain_copy
from tutelage.models.weight_files import (
    assign_files,
    layer_of,
    save_weights,
    saved_weights,
    write_index,
)

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


@given(
    sizes=st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(0, 50)),
    limit=st.integers(1, 120),
)
def test_files_keep_the_order_the_units_and_the_limit(sizes: dict[str, int], limit: int) -> None:
    files = assign_files("model", sizes, limit, lambda name: name[0])
    assert [name for names in files.values() for name in names] == list(sizes)
    units: list[list[str]] = []
    for name in sizes:
        if units and units[-1][-1][0] == name[0]:
            units[-1].append(name)
        else:
            units.append([name])
    held = list(files.values())
    for unit in units:
        assert sum(set(unit) <= set(names) for names in held) == 1
    for names in held:
        is_one = any(names == unit for unit in units)
        assert sum(sizes[name] for name in names) <= limit or is_one
    if len(held) == 1:
        assert list(files) == ["model.safetensors"]
    else:
        assert next(iter(files)) == f"model-00001-of-{len(held):05d}.safetensors"


def models() -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    moe = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
    return {
        "tied": Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)),
        "untied": Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=False)),
        "experts": Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **moe)),
    }


@pytest.mark.parametrize("kind", list(models()))
def test_transformers_loads_what_was_written_file_by_file(kind: str, tmp_path: Path) -> None:
    model = models()[kind]
    plain, weights = plain_copy(model), model.state_dict()
    shapes = saved_weights(plain)
    sizes = {name: weight.nbytes for name, weight in shapes.items()}
    files = assign_files("model", sizes, 4000, layer_of(plain))
    assert len(files) > 3
    plain.save_pretrained(tmp_path, state_dict={})
    written = {
        file: save_weights(plain, {name: weights[name] for name in names}, tmp_path / file)
        for file, names in files.items()
    }
    write_index(plain, written, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    model.save_pretrained(tmp_path / "one")
    expected = {p.name for p in (tmp_path / "one").iterdir()} - {"model.safetensors"}
    assert {p.name for p in tmp_path.glob("*.json")} - {"model.safetensors.index.json"} == expected
