"""What a plan counts of the weights of a student that teaches itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tiny import tiny_config
from tutelage.memory.meta_model import shadow, stored_bytes
from tutelage.memory.teacher_weights import TeacherWeights, teacher_weights
from tutelage.setup.components import build_components

EMA = {"weights": "ema", "ema_decay": 0.5}


@pytest.mark.parametrize("mode", ["resident", "offload"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("teacher", [{}, EMA], ids=["frozen", "ema"])
def test_a_plan_counts_what_the_teacher_has(
    tmp_path: Path, tiny_models: Path, teacher: dict[str, Any], dtype: str, mode: str
) -> None:
    own = {"model": str(tiny_models / "student"), "dtype": dtype}
    table = {"kind": "self", "mode": mode, **teacher}
    config = tiny_config(tiny_models, tmp_path / "run", teacher=table, student=own)
    components = build_components(config)
    meta = shadow(components.student.model)
    planned, found = teacher_weights(config, meta, meta), components.teacher
    assert planned.resting == found.resting_bytes
    assert planned.head == found.head_bytes
    every = stored_bytes(meta)
    assert planned.while_read("offload") == every
    assert planned.while_read("resident") == found.full_bytes
    assert planned.at_rest("offload") == found.head_bytes < every


def test_live_weights_take_nothing_but_the_head_of_several_updates(
    tmp_path: Path, tiny_models: Path
) -> None:
    table = {"kind": "self", "weights": "live"}
    for updates in (1, 2):
        config = tiny_config(tiny_models, tmp_path / "run", teacher=table, updates_per_step=updates)
        components = build_components(config)
        meta = shadow(components.student.model)
        found = components.teacher
        assert teacher_weights(config, meta, meta) == TeacherWeights(0, 0, found.head_bytes)
        assert (found.head_bytes > 0) == (updates == 2)
        assert found.full_bytes == found.resting_bytes == 0
