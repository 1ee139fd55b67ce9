"""The memory plan: its parts against real tensors, and what it says when a run does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import tiny_config
from tutelage.commands.check import check
from tutelage.errors import ConfigError
from tutelage.memory.cpu import (
    _cache_bytes,
    _saved_bytes,
    _saved_bytes_per_token,
    copied_bytes,
    plan_memory,
)
from tutelage.memory.plan import MemoryPlan, Phase
from tutelage.models.load import load_model
from tutelage.setup.components import build_components
from tutelage.setup.process_counts import ProcessCounts


def phases_of(models: Path, out: Path, **changes: Any) -> dict[str, dict[str, int]]:
    config = tiny_config(models, out, **changes)
    return {
        phase.name: phase.parts
        for phase in plan_memory(config, build_components(config), 10).phases
    }


def test_the_cache_is_as_large_as_planned(tiny_models: Path) -> None:
    model = load_model(str(tiny_models / "student"))
    cache = model(torch.arange(14).view(2, 7), use_cache=True).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert real == 14 * _cache_bytes(model)


def test_what_autograd_keeps_is_proportional_to_tokens(tiny_models: Path) -> None:
    model = load_model(str(tiny_models / "student"))
    per_token = _saved_bytes_per_token(model)
    assert abs(_saved_bytes(model, 100) / (100 * per_token) - 1) < 0.1
    # a layer keeps at least the inputs of its seven products
    settings = model.config
    attention = settings.num_attention_heads * settings.head_dim
    least = 2 * settings.hidden_size + attention + settings.intermediate_size
    assert per_token > 4 * settings.num_hidden_layers * least
    model.requires_grad_(False)
    assert _saved_bytes(model, 100) == 0  # the control: without gradients nothing is kept


def test_each_saving_shows_in_its_phase(tmp_path: Path, tiny_models: Path) -> None:
    student = {"model": str(tiny_models / "student")}
    teacher = {"model": str(tiny_models / "teacher")}
    plain = phases_of(tiny_models, tmp_path)
    weights = sum(p.nbytes for p in load_model(student["model"]).parameters())
    assert plain["learn"]["student"] == plain["learn"]["gradients"] == weights
    assert plain["learn"]["optimizer"] == 2 * weights

    reload = phases_of(tiny_models, tmp_path, teacher=teacher | {"mode": "reload"})
    assert reload["learn"]["teacher"] < plain["learn"]["teacher"] == reload["teacher"]["teacher"]
    checkpointed = student | {"activation_checkpointing": True}
    again = phases_of(tiny_models, tmp_path, student=checkpointed)
    assert again["learn"]["activations"] < plain["learn"]["activations"]
    half = phases_of(tiny_models, tmp_path, student=student | {"dtype": "bfloat16"})
    assert half["learn"]["student"] == weights // 2
    assert half["learn"]["masters"] == weights
    fewer = phases_of(tiny_models, tmp_path, micro_batch_size=1)
    assert fewer["learn"]["activations"] < plain["learn"]["activations"]
    assert fewer["rollout"] | {"process": 0} == plain["rollout"] | {"process": 0}


def test_rewards_alone_need_no_teacher_in_steps(tmp_path: Path, tiny_models: Path) -> None:
    teacher = {"model": str(tiny_models / "teacher"), "mode": "reload"}
    objective = {"kind": "grpo"}
    alone = phases_of(tiny_models, tmp_path, teacher=teacher, objective=objective)
    assert "teacher" not in alone
    assert alone["learn"]["teacher"] == alone["learn"]["hidden states"] == 0
    taught = {"kind": "grpo", "distillation_weight": 0.1}
    both = phases_of(tiny_models, tmp_path, teacher=teacher, objective=taught)
    assert both["teacher"]["teacher"] > both["learn"]["teacher"] > 0


def test_a_plan_that_does_not_fit_names_what_to_turn(tmp_path: Path, tiny_models: Path) -> None:
    config = tiny_config(tiny_models, tmp_path)
    phases = (
        Phase("rollout", {"process": 300 << 20, "KV cache": 50 << 20}),
        Phase("learn", {"process": 300 << 20, "activations": 200 << 20}),
    )
    text = "\n".join(MemoryPlan(phases, 400 << 20).lines(config))
    assert "warning: learn needs 100 MiB more than there is" in text
    assert "activations. Turn to micro_batch_tokens" in text
    assert "warning" not in "\n".join(MemoryPlan(phases, 600 << 20).lines(config))


def test_what_is_turned_already_or_cannot_be_is_no_advice(
    tmp_path: Path, tiny_models: Path
) -> None:
    def advice(part: str, **changes: Any) -> str:
        config = tiny_config(tiny_models, tmp_path, **changes)
        *_, last = MemoryPlan((Phase("learn", {part: 2}),), 1).lines(config)
        return last.partition(f"its largest part is {part}.")[2]

    teacher = {"model": str(tiny_models / "teacher"), "sharding": "fsdp2"}
    student = {"model": str(tiny_models / "student"), "sharding": "fsdp2"}
    low = student | {"dtype": "bfloat16"}
    assert "a smaller student or over several processes, student.shard" in advice("student")
    assert advice("student", student=low) == " Turn to a smaller student."
    assert advice("teacher", teacher=teacher) == ' Turn to teacher.mode = "reload".'
    assert "adamw_8bit" in advice("optimizer")
    assert "adamw_8bit" not in advice("optimizer", student=student)
    assert advice("recorded states", scoring="forward") == ""
    away = {"offload": True, "learning_rate": 1e-3}
    assert advice("masters", optimizer=away, student=student) == ""


def test_check_prints_the_plan_of_a_teacher_that_is_not_there(
    tmp_path: Path, tiny_models: Path
) -> None:
    config = tiny_config(tiny_models, tmp_path / "out")
    config = replace(config, teacher=replace(config.teacher, mode="reload"))
    lines = list(check(config, "x"))
    assert sum(line.startswith("memory: ") for line in lines) == 5
    assert any("teacher: Qwen3ForCausalLM" in line for line in lines)


def test_a_pinned_copy_is_as_large_as_what_torch_pins(tmp_path: Path, tiny_models: Path) -> None:
    config = tiny_config(tiny_models, tmp_path)
    away = replace(config, optimizer=replace(config.optimizer, offload=True))
    weights = [torch.empty(100), torch.empty(64, dtype=torch.bfloat16)]
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert copied_bytes(config, weights, cpu) == (400 + 800) + (128 + 256 + 512)
    assert copied_bytes(config, weights, cuda) == (512 + 2 * 512) + (128 + 256 + 512)
    assert copied_bytes(away, weights, cuda) == (512 + 800) + (128 + 256 + 512)


def test_check_plans_one_of_several_processes(tmp_path: Path, tiny_models: Path) -> None:
    sides = {
        who: {"model": str(tiny_models / who), "sharding": "fsdp2"}
        for who in ("student", "teacher")
    }
    config = tiny_config(tiny_models, tmp_path, prompts_per_step=4, **sides)
    text = "\n".join(check(config, "name", (), ProcessCounts(2)))
    assert "memory: of each of 2 processes, student fsdp2 in groups of 2, teacher fsdp2" in text
    components = build_components(config)
    one, two = (
        {p.name: p.parts for p in plan_memory(config, components, 10, ProcessCounts(n)).phases}
        for n in (1, 2)
    )
    held = ("student", "masters", "optimizer")
    whole, half = (sum(plan["learn"][key] for key in held) for plan in (one, two))
    assert half <= 0.55 * whole
    assert two["teacher"]["teacher"] < one["teacher"]["teacher"]
    assert two["rollout"]["whole weights"] >= one["rollout"]["student"]
    with pytest.raises(ConfigError, match="multiple of 3"):
        list(check(config, "name", (), ProcessCounts(3)))
