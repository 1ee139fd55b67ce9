"""Parts for a card, at toy size on a CPU: what a card meets first has run before."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gpu
import gpu_card
import gpu_memory
import gpu_step


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch, toy_card: None) -> None:
    """A few prompts."""
    for name, value in {"PROMPTS": 2, "PROMPT_TOKENS": 4, "NEW_TOKENS": 6}.items():
        monkeypatch.setattr(gpu_step, name, value)
    monkeypatch.setattr(gpu_step, "CHECKPOINT_EVERY", 1)
    for name, value in {"SEQUENCES": 3, "PROMPT_TOKENS": 4, "NEW_TOKENS": 40}.items():
        monkeypatch.setattr(gpu_memory, name, value)
    monkeypatch.setattr(gpu_memory, "FEW_TOKENS", 3)
    plain = gpu_memory.recipe_table

    def small(name: str, folder: Path) -> dict[str, Any]:
        table = plain(name, folder)
        table["data"]["max_prompt_tokens"] = 6
        table["sampling"]["max_new_tokens"] = 10
        each = table["sampling"].get("num_samples", 1)
        sizes = {"prompts_per_step": 4, "micro_batch_tokens": 40, "updates_per_step": 1}
        assert each in (1, 16)
        return table | sizes

    monkeypatch.setattr(gpu_memory, "recipe_table", small)


def test_every_part_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu.parts()
    assert gpu_memory.PARTS.keys() | gpu_step.PARTS.keys() < found.keys()
    assert gpu.limits()["step_trl"] == 150
    assert gpu.limits().keys() < found.keys()


SLOW = "eopd_qwen3_4b_1gpu_80gb"
"""It differs from the others in what theirs cover: lengths, sampled objective, short slots."""


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in gpu_memory.RECIPES if name != SLOW),
        pytest.param(SLOW, marks=pytest.mark.slow),
    ],
)
def test_recipes_are_measured_beside_their_plan(name: str) -> None:
    found = gpu_memory.PARTS[f"recipe_{name}"]()
    assert json.loads(json.dumps(found)) == found
    assert found["phases"].keys() == {"rollout", "teacher", "score", "learn"}
    assert found["planned_mib"] > 0 < found["measured_mib"]
    assert found["ratio"] == found["planned_mib"] / found["measured_mib"]
    assert found["tokens"] == 2 * (6 + 10)


def test_tips_table_falls_with_the_share_of_tokens_where_logits_are_gathered() -> None:
    found = gpu_memory.tip_memory()
    assert json.loads(json.dumps(found)) == found
    assert found["rows"] == 3 * 40
    for share in map(str, gpu_memory.SHARES):
        ours, theirs = (found[way][share] for way in ("ours", "materialised"))
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)
    whole, half = (found["materialised"][share]["allocated_mib"] for share in ("100", "50"))
    assert half < 0.85 * whole


def test_a_way_that_does_not_fit_is_told_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(gpu_memory, "_materialised", refuse)
    found = gpu_memory.tip_memory()
    assert found["materialised"]["100"] == {"failed": "out of memory"}
    assert found["ours"]["10"]["allocated_mib"] > 0


def test_checkpoints_tell_the_copy_from_the_wait() -> None:
    found = gpu_step.PARTS["checkpoints"]()
    assert json.loads(json.dumps(found)) == found
    assert len(found["wait_s"]) == len(found["copy_s"]) == 3
    assert min(found["copy_s"]) > 0
    assert found["checkpoint_gb"] > 0


def test_the_first_step_is_apart_from_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # put back afterwards
    found = gpu_step.PARTS["first_step"]()
    assert json.loads(json.dumps(found)) == found
    assert found["first_step_s"] == sum(found["phases_s"].values()) < found["with_loading_s"]


@pytest.mark.parametrize(
    "name",
    [
        "step_ours",
        "step_ours_offloaded",
        "step_ours_teacher_offloaded",
        "step_ours_soft_or",
        "step_ours_small",
    ],
)
def test_whole_steps_run(name: str) -> None:
    found = gpu_step.PARTS[name]()
    assert json.loads(json.dumps(found)) == found
    assert found["tokens"] == 12


def test_what_a_card_held_is_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    answers = {
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 3 << 20,
        "max_memory_reserved": 5 << 20,
        "mem_get_info": (1 << 20, 9 << 20),
    }
    for name, answer in answers.items():

        def ask(name: str = name, answer: Any = answer) -> Any:
            asked.append(name)
            return answer

        monkeypatch.setattr(torch.cuda, name, ask)
    monkeypatch.setattr(gpu_card, "DEVICE", "cuda")
    with pytest.raises(torch.OutOfMemoryError), gpu_card.measured() as peak:
        raise torch.OutOfMemoryError("no room")
    assert peak.described() == {"allocated_mib": 3.0, "reserved_mib": 5.0, "used_mib": 8.0}
    assert asked.index("reset_peak_memory_stats") < asked.index("max_memory_allocated")


def test_a_limit_leaves_room_for_the_context_and_is_lifted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares: list[float] = []
    about = SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(gpu_card, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)

    def fail() -> None:
        with gpu_memory._limited(24 << 30):
            assert len(shares) == 1
            raise RuntimeError("what did not fit")

    with pytest.raises(RuntimeError, match="what did not fit"):
        fail()
    assert shares == [(24 * 1024 - 640) / (80 * 1024), 1.0]
