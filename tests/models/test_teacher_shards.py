"""A teacher that processes hold together computes what a whole one computes, with its part."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ranks import run_script
from tiny import save_tiny_model, tiny_config
from tutelage.commands.check import check
from tutelage.config.parse import parse_config
from tutelage.errors import ConfigError, ModelError
from tutelage.models.forward import foreign
from tutelage.models.teacher_shards import require_shardable_teacher
from tutelage.setup.process_counts import ProcessCounts
from tutelage.setup.teacher import load_teacher
from tutelage.setup.validate import validate

SCRIPT = Path(__file__).parent / "shards_rank.py"
KINDS = ("fsdp2", "tp")


def seen(models: Path, out: Path, count: int, group_size: int, *families: str) -> list[Any]:
    """What each of some processes saw."""
    run_script(SCRIPT, (models, out, group_size, *families), count)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(count)]


def compare(each: list[Any], families: tuple[str, ...], part: float) -> None:
    """Logits, losses and bytes of every process."""
    for rank in each:
        for name in (f"{family} {kind}" for family in families for kind in KINDS):
            assert rank[f"{name} torch.float32"]["gap"] < 1e-5, name
            # the norms of these families round to float32
            assert rank.get(f"{name} torch.float64", {"gap": 0})["gap"] < 2e-6, name
        losses = rank["losses"]
        for kind in (*KINDS, "both"):
            assert losses[kind] == pytest.approx(losses["none"], abs=1e-5), kind
        assert losses["same, cut"] == pytest.approx(losses["same"], abs=1e-6)
    for name in (f"{family} {kind}" for family in families for kind in KINDS):
        parts = [rank[f"{name} torch.float32"]["bytes"] for rank in each]
        assert max(parts) < 1.05 * part, name  # norms are whole, and rows odd


def test_two_processes_hold_half_a_teacher_each(tiny_models: Path, tmp_path: Path) -> None:
    each = seen(tiny_models, tmp_path, 2, 0, "qwen3", "tied")
    compare(each, ("qwen3", "tied"), 1 / 2)
    assert each[0]["refused"] == each[1]["refused"]
    for line in each[0]["refused"]:
        assert "the teacher has numbers in model.layers.1.mlp.down_proj.weight that are not" in line


@pytest.mark.slow
def test_families_of_models_are_cut_too(tiny_models: Path, tmp_path: Path) -> None:
    families = ("llama", "phi3", "gemma2", "olmo2", "qwen3_moe")
    compare(seen(tiny_models, tmp_path, 2, 0, *families), families, 1 / 2)


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [0, 2])
def test_four_processes_in_one_group_or_two(tmp_path: Path, group_size: int) -> None:
    for seed, name in enumerate(("student", "teacher")):
        save_tiny_model(tmp_path / "models" / name, seed, num_key_value_heads=4)
    each = seen(tmp_path / "models", tmp_path, 4, group_size, "qwen3", "tied")
    compare(each, ("qwen3", "tied"), 1 / (group_size or 4))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sharding_group_size": 2}, r"sharding_group_size must be 0 without teacher.sharding"),
        ({"sharding": "tp", "sharding_group_size": 1}, r"must be 0 or at least 2, got 1"),
        ({"sharding": "tp", "quantization": "8bit"}, r"teacher.quantization must be none with"),
        ({"sharding": "fsdp2", "mode": "offload"}, r"teacher.mode must be resident or reload"),
    ],
)
def test_what_cannot_be_cut_is_refused(changes: dict[str, Any], match: str) -> None:
    table = {"student": {"model": "s"}, "teacher": {"model": "t"} | changes}
    with pytest.raises(ConfigError, match=match):
        parse_config(table | {"data": {"kind": "ledger"}})


def test_architectures_that_cannot_be_cut_are_refused(gpt2: Any, qwen3: Any) -> None:
    require_shardable_teacher(gpt2, "fsdp2", "teacher")
    require_shardable_teacher(qwen3, "tp", "teacher", 2)
    with pytest.raises(
        ModelError, match=r"GPT2LMHeadModel, has no plan for tensor parallelism.*fs"
    ):
        require_shardable_teacher(gpt2, "tp", "teacher")
    with pytest.raises(ModelError, match="has 2 num_key_value_heads, which 4 processes cannot"):
        require_shardable_teacher(qwen3, "tp", "teacher", 4)
    gpt2._no_split_modules = None
    with pytest.raises(ModelError, match="names no layers that could be gathered one by one"):
        require_shardable_teacher(gpt2, "fsdp2", "teacher")


@pytest.mark.parametrize("is_there", [False, True])
def test_an_old_transformers_is_one_line(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    name = "transformers.distributed.tensor_parallel"
    old = ModuleType(name)
    vars(old)["apply_tensor_parallelism"] = lambda model, tp_mesh: model
    monkeypatch.setitem(sys.modules, name, old if is_there else None)
    teacher = {"model": str(tiny_models / "teacher"), "sharding": "tp"}
    config = tiny_config(tiny_models, tmp_path / "out", teacher=teacher)
    with pytest.raises(ModelError, match=r"^teacher.sharding 'tp' needs transformers 5.19 or lat"):
        list(check(config, "run"))


def test_files_and_groups_that_do_not_suit_are_refused(tmp_path: Path, tiny_models: Path) -> None:
    file = tmp_path / "teacher.gguf"
    file.write_bytes(b"GGUF")
    shutil.copy(tiny_models / "teacher" / "config.json", tmp_path)
    teacher = {"model": str(file), "sharding": "tp"}
    config = tiny_config(tiny_models, tmp_path / "out", teacher=teacher)
    with pytest.raises(ConfigError, match=r"would unpack .* in every process: it is a GGUF file"):
        load_teacher(config, torch.device("cpu"))
    whole = str(tiny_models / "teacher")
    three = {"model": whole, "sharding": "tp", "sharding_group_size": 3}
    config = tiny_config(tiny_models, tmp_path / "out", teacher=three)
    with pytest.raises(ConfigError, match="must divide the number of processes, 4, got 3"):
        validate(config, tmp_path / "out", 4)


def test_check_looks_at_a_teacher_that_is_to_be_cut(tiny_models: Path, tmp_path: Path) -> None:
    teacher = {"model": str(tiny_models / "teacher"), "sharding": "tp", "sharding_group_size": 4}
    config = tiny_config(tiny_models, tmp_path / "out", teacher=teacher)
    with pytest.raises(ModelError, match="has 2 num_key_value_heads, which 4 processes cannot"):
        list(check(config, "run"))
    config = replace(config, teacher=replace(config.teacher, sharding_group_size=0))
    with pytest.raises(ModelError, match="has 2 num_key_value_heads, which 4 processes cannot"):
        list(check(config, "run", processes=ProcessCounts(4)))
    config = replace(config, teacher=replace(config.teacher, sharding_group_size=2))
    measured = replace(config, evaluation=replace(config.evaluation, num_problems=2))
    lines = list(check(measured, "run"))
    assert any("Set evaluation.teacher = false" in line for line in lines)
    lines = list(check(config, "run"))
    assert not any(line.startswith("warning: several processes") for line in lines)
    assert "teacher: cut by tp over 2 processes; its forward pass is tried when they start" in lines


def test_a_broken_connection_is_no_fault_of_the_model(qwen3: Any) -> None:
    broken = RuntimeError("[x/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    with pytest.raises(RuntimeError, match="Connection closed"), foreign("cannot be run", qwen3):
        raise broken
    with pytest.raises(ModelError, match="cannot be run"), foreign("cannot be run", qwen3):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
