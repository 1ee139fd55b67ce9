"""Headers of recipes for one GPU: what they are planned to take is there, fits, and is today's."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import plan_recipes  # noqa: E402

RECIPES = sorted((ROOT / "configs").rglob("*_1gpu_*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_planned_to_fit_its_card(path: Path) -> None:
    found = re.search(
        r"# Planned, not measured: ([\d.]+) GiB of the card's\s([\d.]+) at", path.read_text()
    )
    assert found is not None
    assert float(found[1]) <= float(found[2])
    assert float(found[2]) == plan_recipes.CARDS[path.stem[-4:]] / plan_recipes.GIB


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_header_is_what_is_planned_today(path: Path) -> None:
    assert plan_recipes.block_of(path) + "\nbase = " in path.read_text()


def test_a_card_that_held_a_recipe_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    parts = {"recipe_x": {"measured_mib": 51_200.0, "ratio": 1.03}, "recipe_y": {"failed": "so"}}
    (results / "gpu-a.json").write_text(json.dumps({"device": "a card", "parts": parts}))
    monkeypatch.setattr(plan_recipes, "ROOT", tmp_path)
    text = " ".join(plan_recipes._measured("x"))
    assert "Measured on one a card" in text
    assert "50.0 GiB of tensors, 1.03 of that planned" in text
    assert plan_recipes._measured("y") == plan_recipes._measured("z") == []
