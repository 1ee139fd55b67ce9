"""Replicas with two training processes: what is shared out, lost and continued."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ranks import run_ranks
from tiny import tiny_table
from tiny_runs import are_equal, metrics_of, weights_of
from tutelage.config.parse import parse_config
from tutelage.train.loop import train
from vllm_stub import FakeVLLM, engine_of, replicas_of

PROGRAM = """
import json
import sys
from tutelage.config.parse import parse_config
from tutelage.train.loop import train
train(parse_config(json.loads(sys.argv[1])))
"""


@pytest.fixture
def servers(tiny_models: Path) -> Iterator[list[FakeVLLM]]:
    with replicas_of(tiny_models, 2) as found:
        yield found


def two(table: dict[str, Any]) -> str:
    """What the main one of two processes of a run says; the other one is silent."""
    ended = run_ranks([sys.executable, "-c", PROGRAM, json.dumps(table)], 2)
    assert [(rank.code, bool(rank.said)) for rank in ended] == [(0, True), (0, False)], ended
    return ended[0].said


def torn(whole: Path, out: Path) -> Path:
    """A run as it was when it died after its second step."""
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoint-000004")
    shutil.rmtree(out / "student")
    return out


def evaluated(out: Path) -> list[Any]:
    """Problem and length of each completion of the evaluations."""
    lines = (out / "evaluation_rows.jsonl").read_text().splitlines()
    names = ("step", "prompt_id", "sample", "num_tokens")
    return [[json.loads(line)[name] for name in names] for line in lines]


def are_close(one: Path, two: Path) -> bool:
    """Whether two runs learned from the same completions and differ by rounding alone."""
    names = ("step", "num_rows", "completion_length_mean", "staleness_steps")
    pairs = list(zip(metrics_of(one), metrics_of(two), strict=True))
    counts = [evaluated(out) for out in (one, two)]
    assert counts[0] == counts[1]
    assert len(counts[0]) == 5 * 3
    same = all([a[name] for name in names] == [b[name] for name in names] for a, b in pairs)
    return same and all(a["loss"] == pytest.approx(b["loss"], rel=1e-4) for a, b in pairs)


@pytest.mark.slow
def test_two_processes_draw_what_one_does_and_each_continues_the_other(
    servers: list[FakeVLLM], tiny_models: Path, tmp_path: Path
) -> None:
    def table(out: Path) -> dict[str, Any]:
        engine = engine_of(servers, tmp_path, max_staleness=1, min_replicas=1)
        sampling = {"num_samples": 2, "max_new_tokens": 8}
        objective = {"kind": "sampled"}
        changes = {"engine": engine, "sampling": sampling, "objective": objective}
        changes["evaluation"] = {"num_problems": 3, "num_samples": 1, "every": 1, "teacher": False}
        changes["recording"] = {"every": 2, "num_prompts": 1, "num_rollouts": 1}
        return tiny_table(tiny_models, out, **changes)

    one, both = tmp_path / "one", tmp_path / "both"
    train(parse_config(table(one)), log=lambda _: None)
    servers[1].num_left = 11  # of about 6 a step with its evaluation: it dies in the second
    said = two(table(both))
    assert said.count("is left out until the next start, 1 of 2 stay") == 1
    assert are_close(one, both)
    # A replica that is gone at the start is named once, too.
    said = two(table(torn(both, tmp_path / "both, both")))
    assert said.count("is left out until the next start, 1 of 2 stay") == 1
    weights = [weights_of(out / "student") for out in (both, tmp_path / "both, both")]
    assert are_equal(*weights)
    assert metrics_of(both) == metrics_of(tmp_path / "both, both")
    train(parse_config(table(torn(both, tmp_path / "both, one"))), log=lambda _: None)
    assert are_close(one, tmp_path / "both, one")
    servers[1].num_left = None
    two(table(torn(one, tmp_path / "one, both")))
    assert are_close(one, tmp_path / "one, both")
