"""The plan of a CUDA device, made for cards that are not there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import save_tiny_model, tiny_config
from tutelage.errors import ModelError
from tutelage.memory import cpu as memory
from tutelage.memory import cuda as memory_cuda
from tutelage.memory.cpu import available_bytes, plan_memory
from tutelage.memory.cuda import plan_cuda, plan_run
from tutelage.memory.facts import ALLOCATOR_SHARE, CONTEXT_BYTES, Facts
from tutelage.memory.meta_model import shadow
from tutelage.memory.plan import UNCOUNTED, Phase
from tutelage.models.head_model import shape_of_head
from tutelage.models.load import load_model
from tutelage.models.lora import checkpoint_activations
from tutelage.setup.components import build_components
from tutelage.setup.process_counts import ONE_PROCESS, ProcessCounts

MIB, GIB = 1 << 20, 1 << 30
CARD = Facts(140 * GIB, 100 * GIB, (9, 0), True, 200 * GIB)


def phases_of(
    models: Path,
    out: Path,
    facts: Facts = CARD,
    processes: ProcessCounts = ONE_PROCESS,
    **changes: Any,
) -> Any:
    """Parts of each phase of a tiny run on a card that is not there, and main memory's."""
    config = tiny_config(models, out, **changes)
    sides = [load_model(str(models / who), config.student.dtype) for who in ("student", "teacher")]
    if config.student.activation_checkpointing:
        checkpoint_activations(sides[0])
    plan = plan_cuda(config, shadow(sides[0]), shadow(sides[1]), facts, 10, processes)
    assert plan.host is not None
    return {phase.name: phase.parts for phase in (*plan.phases, *plan.host.phases)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_models`, with heads as wide as a captured step needs them."""
    folder = tmp_path_factory.mktemp("models")
    for seed, who in enumerate(("student", "teacher")):
        save_tiny_model(folder / who, seed=seed, head_dim=32)
    return folder


def test_slots_and_steps_of_a_draw_are_in_no_other_phase(tmp_path: Path, models: Path) -> None:
    soft_or = {"rule": "soft_or", "keep": 0.5}
    evaluation = {"num_problems": 1, "num_samples": 1}
    phases = phases_of(models, tmp_path, selection=soft_or, evaluation=evaluation)
    for part in ("KV cache", "decoding step"):
        assert {name for name, parts in phases.items() if part in parts} == {"evaluate", "rollout"}
        assert phases["rollout"][part] > 0


def test_each_saving_shows_in_its_phase(tmp_path: Path, models: Path) -> None:
    student = {"model": str(models / "student"), "dtype": "bfloat16"}
    teacher = {"model": str(models / "teacher"), "dtype": "bfloat16"}
    plain = phases_of(models, tmp_path, student=student, teacher=teacher)
    weights = sum(p.numel() for p in load_model(str(models / "student")).parameters())
    learn = plain["learn"]
    assert (learn["student"], learn["masters"], learn["optimizer"]) == (
        2 * weights,
        4 * weights,
        8 * weights,
    )
    assert plain["run"]["checkpoint copy"] >= 14 * weights

    moved = {"optimizer": {"learning_rate": 1e-3, "offload": True}}
    moved |= {"teacher": teacher | {"mode": "offload"}}
    away = phases_of(models, tmp_path, student=student, **moved)
    assert away["learn"]["masters"] == away["learn"]["optimizer"] == 0
    assert away["learn"]["teacher"] < learn["teacher"] == away["teacher"]["teacher"]
    assert away["run"]["float32 weights"] == away["run"]["float32 gradients"] == 4 * weights
    assert away["run"]["moments"] == 8 * weights
    assert away["run"]["teacher weights"] == learn["teacher"]
    inline = phases_of(models, tmp_path, student=student, checkpoint_writer="inline")
    assert inline["run"]["checkpoint copy"] == 0

    # what a micro-batch holds shows where activations are the most that learning needs
    long = {"sampling": {"num_samples": 2, "max_new_tokens": 100}, "micro_batch_tokens": 0}
    much = phases_of(models, tmp_path, student=student, **long)
    again = student | {"activation_checkpointing": True}
    less = phases_of(models, tmp_path, student=again, **long)
    assert less["learn"]["activations"] < 0.7 * much["learn"]["activations"]
    assert less["teacher"] == much["teacher"]


def test_rewards_alone_need_no_teacher_in_steps(tmp_path: Path, models: Path) -> None:
    teacher = {"model": str(models / "teacher"), "mode": "offload"}
    alone, both = (
        phases_of(models, tmp_path, teacher=teacher, objective={"kind": "grpo", **weight})
        for weight in ({}, {"distillation_weight": 0.1})
    )
    assert "teacher" in both.keys() - alone.keys()
    for phase in ("score", "learn"):
        assert alone[phase]["teacher"] == alone[phase]["hidden states"] == 0
        assert both[phase]["teacher"] > 0
    assert sum(alone["learn"].values()) < sum(both["learn"].values())


def test_a_server_of_log_probabilities_takes_what_it_tells(tmp_path: Path, models: Path) -> None:
    """Its head is not here: 20 ids and the token's, in int64 and float32, wait in main memory."""
    table = {"model": str(models / "teacher"), "url": "http://h:1"}
    config = tiny_config(
        models, tmp_path, teacher=table | {"kind": "logprob_server"}, objective={"kind": "topk"}
    )
    student = shadow(load_model(str(models / "student")))
    plans = [
        plan_cuda(config, student, shadow(teacher), CARD, 10)
        for teacher in (shape_of_head(str(models / "teacher")), load_model(str(models / "teacher")))
    ]
    assert plans[0] == plans[1]
    assert plans[0].host is not None
    phases = {phase.name: phase.parts for phase in (*plans[0].phases, *plans[0].host.phases)}
    for phase in ("rollout", "teacher", "learn"):
        assert phases[phase]["teacher"] == 0
    assert phases["teacher"]["activations"] == phases["teacher"]["log-probabilities"] == 0
    assert phases["run"]["log-probabilities"] == 4 * 2 * 10 * 12 * 21
    assert 0 < phases["learn"]["log-probabilities"] <= 4 * 2 * 10 * 12 * 21
    assert not any("hidden states" in parts for parts in phases.values())


def test_conversations_need_room_for_what_is_inserted(tmp_path: Path, models: Path) -> None:
    plain = phases_of(models, tmp_path)
    tools = phases_of(models, tmp_path, data={"kind": "ledger_tools", "max_inserted_tokens": 400})
    assert tools["rollout"]["KV cache"] == 2 * plain["rollout"]["KV cache"]  # 420 columns, and 20
    assert tools["rollout"]["prefill"] > 10 * plain["rollout"]["prefill"]
    assert tools["teacher"]["activations"] > 10 * plain["teacher"]["activations"]
    # no more tokens are supervised
    assert tools["teacher"]["hidden states"] == plain["teacher"]["hidden states"]


def test_packed_rows_are_filled_to_the_limit(tmp_path: Path, models: Path) -> None:
    padded, packed = (
        phases_of(models, tmp_path, micro_batches=way, micro_batch_tokens=50)
        for way in ("padded", "packed")
    )
    # two sequences of 20 tokens, or 50 in a row, with an angle for each
    activations = padded["teacher"]["activations"]
    assert packed["teacher"]["activations"] == pytest.approx(50 / 40 * activations, rel=0.1)


def test_engines_scoring_and_evaluation_have_their_parts(tmp_path: Path, models: Path) -> None:
    soft_or = {"rule": "soft_or", "keep": 0.5}
    scored = phases_of(models, tmp_path, selection=soft_or)
    recorded = 4 * 2 * 10 * 32 * 4
    assert scored["rollout"]["recorded states"] == recorded
    assert scored["score"]["recorded states"] == 2 * recorded
    assert "recorded states" not in scored["learn"]
    vllm = {"kind": "vllm", "gpu_memory_utilization": 0.5}
    drawn = phases_of(models, tmp_path, engine=vllm)
    assert drawn["rollout"]["vLLM"] == CARD.total_bytes // 2
    assert "KV cache" not in drawn["rollout"]
    evaluated = phases_of(models, tmp_path, evaluation={"num_problems": 4})
    assert evaluated["evaluate"]["KV cache"] > 0
    assert evaluated["evaluate"]["optimizer"] == 0
    for parts in evaluated.values():
        rest = sum(size for name, size in parts.items() if name not in UNCOUNTED)
        if "context" in parts:
            assert parts["context"] == CONTEXT_BYTES
            assert parts["allocator"] == int(ALLOCATOR_SHARE * rest)


def test_check_plans_a_device_and_a_class_without_shapes_as_before(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(models, tmp_path)
    components = build_components(config)
    monkeypatch.setattr(Facts, "of", lambda device: CARD)
    here = replace(components, device=torch.device("cuda"))
    lines = list(plan_run(config, here, 10).lines(config))
    assert [line.split()[:2] for line in lines[:3]] == [
        ["memory:", name] for name in ("rollout", "teacher", "learn")
    ]
    assert lines[3].startswith("memory: peak ")
    assert lines[4].startswith("main memory: run ")
    warned = replace(CARD, available_bytes=GIB // 2, host_bytes=0)
    monkeypatch.setattr(Facts, "of", lambda device: warned)
    table = {"teacher": {"model": str(models / "teacher"), "mode": "offload"}}
    config = tiny_config(models, tmp_path, **table)
    text = "\n".join(plan_run(config, here, 10).lines(config))
    assert "needs" in text
    assert "Turn to teacher.mode" in text.splitlines()[-1]

    def refuse(_: Any) -> Any:
        raise ModelError("a class that computes with numbers.")

    monkeypatch.setattr(memory_cuda, "shadows", refuse)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 7)
    monkeypatch.setattr(memory, "is_supported", lambda device: True)
    monkeypatch.setattr(memory, "chunk_budget", lambda device: MIB)
    assert plan_run(config, here, 10) == plan_memory(config, here, 10)


def test_what_torch_holds_already_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 9 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
    assert available_bytes(torch.device("cuda")) == 5 * GIB


def parts_of(models: Path, out: Path, processes: ProcessCounts, **changes: Any) -> Any:
    """Parts of each phase in one of several processes."""
    student = {"model": str(models / "student"), "dtype": "bfloat16", "sharding": "fsdp2"}
    teacher = {"model": str(models / "teacher"), "dtype": "bfloat16"}
    sides = {"student": student, "teacher": teacher} | changes
    return phases_of(models, out, processes=processes, prompts_per_step=8, **sides)


def test_a_process_holds_its_shards_and_gathers_the_rest_for_a_while(
    tmp_path: Path, models: Path
) -> None:
    two, eight = (parts_of(models, tmp_path, ProcessCounts(n)) for n in (2, 8))
    student = load_model(str(models / "student"), "bfloat16")
    weights = sum(p.numel() for p in student.parameters())
    for plan, count in ((two, 2), (eight, 8)):
        learn, whole = plan["learn"], plan["rollout"]["whole weights"]
        # the shards are the float32 masters
        assert learn["student"] == pytest.approx(4 * weights / count, rel=0.02)
        assert learn["optimizer"] == pytest.approx(8 * weights / count, rel=0.02)
        assert learn["masters"] == 0
        assert 2 * weights <= whole < 3.1 * weights
        assert plan["run"]["checkpoint copy"] == 0
    assert two["learn"]["gradients"] >= 4 * eight["learn"]["gradients"] * 0.9
    one = parts_of(models, tmp_path, ProcessCounts(1))
    assert "whole weights" not in one["rollout"] or one["rollout"]["whole weights"] == 0
    held = ("student", "masters", "optimizer")
    assert sum(two["learn"][k] for k in held) <= 0.55 * sum(one["learn"][k] for k in held)
    # an eighth of the prompts
    assert eight["rollout"]["KV cache"] < one["rollout"]["KV cache"]
    grouped = {"model": str(models / "student"), "dtype": "bfloat16", "sharding": "fsdp2"}
    grouped |= {"sharding_group_size": 2}
    assert (
        parts_of(models, tmp_path, ProcessCounts(8), student=grouped)["learn"]["student"]
        == (two["learn"]["student"])
    )


def test_shards_in_main_memory_are_counted_there(tmp_path: Path, models: Path) -> None:
    moved = {"optimizer": {"learning_rate": 1e-3, "offload": True}}
    plan = parts_of(models, tmp_path, ProcessCounts(2), **moved)
    assert plan["learn"]["student"] == plan["learn"]["optimizer"] == 0
    weights = sum(p.numel() for p in load_model(str(models / "student")).parameters())
    assert plan["run"]["float32 weights"] >= 4 * weights / 2
    assert plan["run"]["float32 gradients"] >= 4 * weights / 2
    assert plan["run"]["moments"] == pytest.approx(8 * weights / 2, rel=0.02)


@pytest.mark.parametrize("sharding", ["fsdp2", "tp"])
def test_a_teacher_of_several_processes_keeps_a_part_and_the_head(
    tmp_path: Path, models: Path, sharding: str
) -> None:
    table = {"model": str(models / "teacher"), "dtype": "bfloat16", "sharding": sharding}
    plan = parts_of(models, tmp_path, ProcessCounts(2), teacher=table)
    teacher = load_model(str(models / "teacher"), "bfloat16")
    weights, head = sum(p.nbytes for p in teacher.parameters()), teacher.lm_head.weight.nbytes
    for phase in ("rollout", "teacher", "learn"):
        assert plan[phase]["teacher"] == pytest.approx(weights / 2 + head, rel=0.02)
    assert (plan["teacher"]["gathered weights"] > 0) == (sharding == "fsdp2")


def test_several_processes_of_a_host_share_its_main_memory(tmp_path: Path, models: Path) -> None:
    sides = [shadow(load_model(str(models / who))) for who in ("student", "teacher")]
    config = tiny_config(models, tmp_path, prompts_per_step=8)
    spread = [plan_cuda(config, *sides, CARD, 10, ProcessCounts(8, hosts)) for hosts in (1, 4)]
    assert [plan.host and plan.host.available_bytes for plan in spread] == [25 * GIB, 100 * GIB]
    lines = list(spread[1].lines(config))
    assert lines[0] == "memory: of each of 8 processes, 4 hosts"


def test_whole_weights_that_do_not_fit_have_a_way_out(tmp_path: Path, models: Path) -> None:
    student = {"model": str(models / "student"), "sharding": "fsdp2"}
    config = tiny_config(models, tmp_path, prompts_per_step=8, student=student)
    sides = [shadow(load_model(str(models / who))) for who in ("student", "teacher")]
    plan = plan_cuda(config, *sides, replace(CARD, available_bytes=1), 10, ProcessCounts(8))
    rollout = replace(plan, phases=(Phase("rollout", {"whole weights": 9, "KV cache": 2}),))
    assert [line for line in rollout.lines(config) if "vllm_server" in line]
