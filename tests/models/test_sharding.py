"""Which students can be cut into parts, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ranks import run_script
from tiny import tiny_config
from tutelage.errors import ConfigError, RunError
from tutelage.models import optimizer
from tutelage.models.load import load_model
from tutelage.models.offload import MappedFile, whole_pages
from tutelage.models.optimizer import MasterWeights
from tutelage.models.sharding import require_shardable_student
from tutelage.setup import components
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
    require_shardable_student(model)
    change(model)
    with pytest.raises(ConfigError) as refused:
        require_shardable_student(model)
    said = str(refused.value)
    assert part in said
    assert "\n" not in said
    assert said.endswith('Use student.sharding = "none".')


def test_frozen_weights_may_be_of_another_dtype(tiny_models: Path) -> None:
    model = load_model(str(tiny_models / "student"))
    model.model.embed_tokens.requires_grad_(False).to(torch.bfloat16)
    require_shardable_student(model)


def test_one_process_has_all_weights_whatever_the_key_says(tiny_models: Path) -> None:
    student = {"model": str(tiny_models / "student"), "sharding": "fsdp2", "sharding_group_size": 2}
    found = build_components(tiny_config(tiny_models, Path("unused"), student=student))
    assert not found.student.is_sharded
    assert found.student.plain is found.student.model
    with found.whole() as same:
        assert same is found


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
    with pytest.raises(ConfigError, match=r"student\.sharding_group_size must divide .* 4, got 3"):
        validate(config, tmp_path / "run", num_processes=4)


def is_in_a_file(tensor: torch.Tensor) -> bool:
    """Whether its memory is that of a file with weights."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = [line.split()[0].split("-") for line in lines if line.endswith(".safetensors")]
    return any(int(a, 16) <= tensor.data_ptr() < int(b, 16) for a, b in found)


@pytest.mark.parametrize("count", [1, 2])
def test_a_student_that_starts_as_a_shared_teacher_is_no_copy(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(components, "num_processes", lambda: count)
    side = {"model": str(tiny_models / "student")}
    teacher = side | {"sharding": "fsdp2"}
    config = tiny_config(tiny_models, Path("unused"), student=side, teacher=teacher)
    found = build_components(config, is_run=False)
    weights = [*found.student.model.parameters()]
    assert [is_in_a_file(weight) for weight in weights] == [count > 1] * len(weights)
    weights += found.teacher.model.parameters()
    assert len({weight.data_ptr() for weight in weights}) == len(weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_copy_to_be_made_in_each_process_is_one_warning(tiny_models: Path, dtype: str) -> None:
    teacher = {"model": str(tiny_models / "teacher"), "dtype": dtype, "sharding": "fsdp2"}
    config = tiny_config(tiny_models, Path("unused"), teacher=teacher)
    said = [w for w in build_components(config, is_run=False).warnings if "copies all of it" in w]
    assert len(said) == (dtype == "bfloat16")
    for line in said:
        assert line.startswith("teacher.dtype = 'bfloat16', but the files of ")
        assert line.endswith("keeps its part. teacher.dtype = 'float32' copies nothing")


def test_a_part_without_rows_takes_no_room_in_a_file(tmp_path: Path) -> None:
    file = MappedFile(whole_pages(8), tmp_path)
    empty = file.tensor(whole_pages(8), 0, torch.float32)
    assert empty.shape == (0,)
    file.release(whole_pages(8), 0)


def test_a_weight_that_has_left_its_master_is_not_learned_in_vain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optimizer, "is_shard", lambda _: True)
    weight = nn.Parameter(torch.ones(2, 3))
    masters = MasterWeights([weight])
    weight.grad = torch.ones(2, 3)
    masters.accumulate_grads()
    assert masters.masters[0].grad is weight.grad
    weight.data = weight.data.clone()
    with pytest.raises(RunError, match=r"moved a weight in shards, \(2, 3\), away from the memory"):
        masters.accumulate_grads()


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
        ),
    ],
)
def test_shards_in_main_memory_learn_as_whole_weights(
    tiny_models: Path, tmp_path: Path, device: str
) -> None:
    script = Path(__file__).parent / "offload_rank.py"
    run_script(script, (tiny_models / "student", tmp_path, device), 1)
    assert float((tmp_path / "gap").read_text()) < 2e-4  # two updates move a weight by 2e-3
