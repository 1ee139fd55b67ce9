"""The plan of a CUDA device against what one was measured to hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gpu_models
import gpu_step
from tutelage.config.parse import parse_config
from tutelage.memory.cuda import plan_cuda
from tutelage.memory.facts import Facts
from tutelage.memory.meta_model import shapes

MIB, GIB = 1 << 20, 1 << 30
MEASURED = json.loads(
    (Path(gpu_step.__file__).parents[1] / "results" / "gpu-nvidia-h200-2026-11-27.json").read_text()
)["parts"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "teacher", "new_tokens"),
    [(MEASURED["step_ours"], "4B", 256), (MEASURED["learn_fused"]["steps"], "0.6B", 128)],
    ids=["1.7B from 4B", "1.7B from 0.6B"],
)
def test_the_plan_is_what_a_card_was_measured_to_hold(
    tmp_path: Path, steps: dict[str, Any], teacher: str, new_tokens: int
) -> None:
    changes = {"sampling": {"max_new_tokens": new_tokens}}
    config = parse_config(gpu_step.configuration(tmp_path, **changes))
    student = shapes(gpu_models.qwen3_config("1.7B"), student=config.student)
    other = shapes(gpu_models.qwen3_config(teacher))
    card = Facts(140 * GIB, 139 * GIB, (9, 0), False, 1 << 50)
    plan = plan_cuda(config, student, other, card, gpu_step.PROMPT_TOKENS)
    planned = {phase.name: phase.allocated_bytes / MIB for phase in plan.phases}
    # At the commits that were measured, the later phases still held what the draw had taken.
    draw = next(phase.parts for phase in plan.phases if phase.name == "rollout")
    held = (draw["KV cache"] + draw["decoding step"]) / MIB
    planned = {name: mib + held * (name != "rollout") for name, mib in planned.items()}
    for name, measured in steps["phases_peak_mib"].items():
        assert planned[name] == pytest.approx(measured, rel=0.005), name
    assert max(planned.values()) == pytest.approx(steps["peak_mib"], rel=0.005)
