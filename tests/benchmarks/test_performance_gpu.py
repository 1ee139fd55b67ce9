"""The section about one card: parts are shown where they have results, and only there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import performance_gpu

ABOUT = {
    "device": "a card",
    "driver": "1",
    "packages": {"torch": "2"},
    "date": "2026-01-02",
}
TIP = {
    "rows": 16384,
    "weights_mib": 11264.0,
    "ours": {"100": {"allocated_mib": 20480.0}, "50": {"allocated_mib": 15360.0}},
    "materialised": {"100": {"failed": "out of memory"}, "50": {"allocated_mib": 40960.0}},
}
RECIPE = {
    "phases": {"learn": {"planned_mib": 2048.0, "measured_mib": 1024.0}},
    "planned_mib": 2048.0,
    "measured_mib": 1024.0,
    "ratio": 2.0,
    "limit_mib": 24576.0,
}
CHECKPOINTS = {
    "every": 20,
    "step_s": 1.0,
    "checkpoint_gb": 24.0,
    "wait_s": [0.0, 0.25],
    "copy_s": [9.0, 1.5],
}
FIRST = {"first_step_s": 9.5, "with_loading_s": 30.0, "second_step_s": 2.5}


def section(tmp_path: Path, **parts: dict[str, Any]) -> str:
    named = {name: part | {"commit": "abc"} for name, part in parts.items()}
    (tmp_path / "gpu-1.json").write_text(json.dumps(ABOUT | {"parts": named}))
    return "\n".join(performance_gpu.gpu(tmp_path))


def test_memory_tables_and_pauses_are_shown_where_there_are_results(tmp_path: Path) -> None:
    text = section(
        tmp_path, tip_memory=TIP, recipe_x=RECIPE, checkpoints=CHECKPOINTS, first_step=FIRST
    )
    assert "| 100 % | 20.0 | +0 % | out of memory |  |" in text
    assert "| 50 % | 15.0 | -25 % | 40.0 |  |" in text
    assert "-47 %" in text
    assert "the paper's figures, not ours" in text
    assert "| `x` | 2.0 | 1.0 | 2.00 | learn 2.0 / 1.0 | 24 |" in text
    assert "waits 9.0, 1.5 s for the copy" in text
    assert "and 0.0, 0.2 s for the checkpoint before" in text
    assert "compiled nothing before, 1.7B from 4B, takes 9.5 s" in text


def test_what_was_compared_is_said_whatever_it_showed(tmp_path: Path) -> None:
    gaps = {"mean": 0.25, "largest": 1.5, "bias": 0.0}
    large = {
        "against the own step": {"same completions": 0.0, "same first tokens": 0.5},
        "step against the model's own": {"largest of the rows": 0.125},
        "log-prob gaps to float32, captured step": gaps,
        "log-prob gaps to float32, own step": gaps | {"mean": 0.5},
    }
    text = section(
        tmp_path,
        objective_determinism={"same_bits": False},
        rollout_correctness_small={"greedy": {"same completions": 0.75, "same first tokens": 1.0}},
        rollout_correctness_large=large,
    )
    assert "The same objective twice: other bits" in text
    assert "at least 75 % of the completions are the same" in text
    assert "0 % of the completions are those of the model's own forward pass, and 50 %" in text
    assert "by 0.250 nats (own: 0.500), at most 1.50 (1.50)" in text


def test_what_was_not_measured_is_not_shown(tmp_path: Path) -> None:
    text = section(tmp_path, tip_memory={"failed": "exit status 1", "output": ["a", "b"]})
    assert "47 %" not in text
    assert "Recipes" not in text
    assert "first step of a process" not in text
    assert "`tip_memory`: exit status 1; last lines: a; b" in text
