"""One trained run and one set of own prompts, shared by the tests of the commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from calling import LEDGER, STUDENT, TEACHER, TINY, Outcome, succeed, write_jsonl


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A run of three steps with evaluations, trained with --json, and what it printed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    outcome = succeed(
        "train", LEDGER, *TINY, f"out={folder}", "num_steps=3", "evaluation.num_problems=6",
        "evaluation.num_samples=2", "--json",
    )  # fmt: skip
    return folder, outcome


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with its own prompts, of several lengths, for the embedded pair."""
    folder = tmp_path_factory.mktemp("own")
    prompts = write_jsonl(
        folder / "own.jsonl",
        {"id": "five", "prompt": "e4+7;j7-6;n3+7;m0-6;b9*7;>", "answer": "1"},
        {"id": "four", "question": "a1+1;b2+2;c3+3;d4+4;>", "answer": 0},
        {"id": "three", "problem": "k7-2;m3*3;n0+8;>", "answer": "2"},
        {"id": "two", "prompt": "p6+6;o5-9;>"},
        {"id": "six", "prompt": "a0+1;b5*2;c8-3;d4+9;e7*7;f1-0;>"},
    )
    config = folder / "own.toml"
    config.write_text(
        f"""
        num_steps = 2
        prompts_per_step = 3
        micro_batch_size = 2
        num_threads = 1
        quadrant_thresholds = [0.3, 0.05]
        student.model = "{STUDENT}"
        teacher.model = "{TEACHER}"
        optimizer.learning_rate = 1e-3
        evaluation.num_problems = 0
        [data]
        kind = "file"
        path = "{prompts}"
        chat = false
        num_held_out = 2
        [sampling]
        max_new_tokens = 70
        temperature = 1.5
        num_samples = 2
        """,
        encoding="utf-8",
    )
    return config
