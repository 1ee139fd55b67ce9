"""Which students can be cut into parts, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tiny import tiny_config
from tutelage.errors import ConfigError
from tutelage.models.load import load_model
from tutelage.models.offload import MappedFile, whole_pages
from tutelage.models.sharding import require_shardable
from tutelage.setup.components import build_components
from tutelage.setup.validate import validate


def half(model: Any) -> None:
    """Trains two dtypes."""
    model.model.norm.to(torch.bfloat16)


def number(model: Any) -> None:
    """Has a weight without rows."""
    model.model.layers[0].scale = nn.Parameter(torch.tensor(1.0))


def shared(model: Any) -> None:
    """Has one weight in two layers."""
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (half, "one dtype, Qwen3ForCausalLM has bfloat16 (model.norm.weight) and float32 ("),
        (number, "model.layers.0.scale of Qwen3ForCausalLM is a single number"),
        (shared, "model.layers.1.mlp.up_proj.weight of Qwen3ForCausalLM belongs to several"),
    ],
)
def test_a_model_that_cannot_be_cut_is_one_line(tiny_models: Path, change: Any, part: str) -> None:
    model = load_model(str(tiny_models / "student"))
    require_shardable(model)
    change(model)
    with pytest.raises(ConfigError) as refused:
        require_shardable(model)
    said = str(refused.value)
    assert part in said
    assert "\n" not in said
    assert said.endswith('Use student.sharding = "none".')


def test_frozen_weights_may_be_of_another_dtype(tiny_models: Path) -> None:
    model = load_model(str(tiny_models / "student"))
    model.model.embed_tokens.requires_grad_(False).to(torch.bfloat16)
    require_shardable(model)


def test_one_process_has_all_weights_whatever_the_key_says(tiny_models: Path) -> None:
    student = {"model": str(tiny_models / "student"), "sharding": "fsdp2", "sharding_group_size": 2}
    components = build_components(tiny_config(tiny_models, Path("unused"), student=student))
    assert not components.student.is_sharded
    assert components.student.plain is components.student.model
    with components.whole() as same:
        assert same is components


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"student": {"quantization": "8bit", "lora": {"rank": 2}}}, "student.quantization"),
        ({"student": {"sharding_group_size": 1}}, "sharding_group_size must be 0 or at least 2"),
        ({"student": {"sharding": "none", "sharding_group_size": 2}}, "0 without student.sharding"),
        ({"optimizer": {"kind": "adafactor"}}, "optimizer.kind must be adamw or adamw_on_disk"),
        ({"optimizer": {"kind": "adamw_8bit"}}, "optimizer.kind must be adamw or adamw_on_disk"),
        ({"checkpoint_writer": "thread"}, "checkpoint_writer must be auto or inline"),
    ],
)
def test_what_does_not_work_on_parts_is_refused(
    tiny_models: Path, changes: dict[str, Any], part: str
) -> None:
    student = {"model": str(tiny_models / "student"), "sharding": "fsdp2"}
    student |= changes.get("student", {})
    with pytest.raises(ConfigError) as refused:
        tiny_config(tiny_models, Path("unused"), **(changes | {"student": student}))
    assert part in str(refused.value)
    assert "\n" not in str(refused.value)


def test_groups_have_to_be_as_large_as_each_other(tiny_models: Path, tmp_path: Path) -> None:
    student = {"model": str(tiny_models / "student"), "sharding": "fsdp2", "sharding_group_size": 3}
    config = tiny_config(tiny_models, tmp_path / "run", student=student)
    validate(config, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"student\.sharding_group_size must divide .* got 3 and"):
        validate(config, tmp_path / "run", num_processes=4)


def test_a_part_without_rows_takes_no_room_in_a_file(tmp_path: Path) -> None:
    file = MappedFile(whole_pages(8), tmp_path)
    empty = file.tensor(whole_pages(8), 0, torch.float32)
    assert empty.shape == (0,)
    file.release(whole_pages(8), 0)
