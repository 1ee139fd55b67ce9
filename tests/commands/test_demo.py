"""`tutelage demo` needs nothing but the package."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tutelage.commands import demo
from tutelage.config.parse import load_config
from tutelage.config.selection import AllTokens, SomeTokens

ROOT = Path(__file__).parents[2]


def test_its_configuration_is_the_example_of_a_checkout() -> None:
    assert demo.CONFIG.read_text() == (ROOT / "configs/examples/ledger.toml").read_text()


def test_a_small_one_runs_in_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(
        demo.CONFIG,
        ["num_steps=1", "prompts_per_step=2", "sampling.max_new_tokens=8", "recording.every=0",
         "evaluation.num_problems=2", "evaluation.num_samples=1"],
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "load_config", lambda _: config)
    monkeypatch.setattr(demo, "RULES_STEPS", 1)
    monkeypatch.setattr(demo, "NUM_PROBLEMS", 2)
    monkeypatch.setattr(demo, "RULES", (AllTokens(), SomeTokens("q3", keep=0.1)))
    assert demo.run(argparse.Namespace()) == 0
    said = capsys.readouterr().out
    assert "1. A student is distilled" in said
    assert "q3 10%" in said
    assert (tmp_path / "runs").is_dir()
