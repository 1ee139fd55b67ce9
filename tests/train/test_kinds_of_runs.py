"""Whole runs of kinds that meet: rewards with an adapter, drawn ahead, and in two processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ahead import Sequential, are_one_run, draw_late
from test_aligned import PROMPTS, save

from ranks import run_ranks
from tiny import tiny_config
from tiny_runs import metrics_of, needs_peft, weights_of
from tutelage.config.parse import parse_config
from tutelage.data.tasks.ledger import LedgerTask
from tutelage.models.load import load_model
from tutelage.rollout import replicas
from tutelage.train import loop
from tutelage.train.loop import train
from vllm_stub import QUICK, FakeVLLM, engine_of, replicas_of

PROGRAM = """
import json
import sys
from tutelage.config.parse import parse_config
from tutelage.train.loop import train
train(parse_config(json.loads(sys.argv[1])))
"""
EMBEDDED = "package:tutelage/assets/ledger-"
GRPO: dict[str, Any] = {
    "student": {"model": EMBEDDED + "overconfident"},
    "teacher": {"model": EMBEDDED + "teacher", "mode": "reload"},
    "data": {"kind": "ledger"},
    "sampling": {"num_samples": 4, "max_new_tokens": 64},
    "objective": {"kind": "grpo"},
    "optimizer": {"learning_rate": 3e-4},
    "evaluation": {"num_problems": 4, "num_samples": 1, "teacher": False},
}
"""Learns from its grader; about one completion in four of the start is right."""


def small(out: Path, **changes: Any) -> dict[str, Any]:
    """A run of three steps."""
    table: dict[str, Any] = {
        "num_steps": 3, "prompts_per_step": 4, "micro_batch_size": 5, "checkpoint_every": 2,
        "num_threads": 1, "device": "cpu", "out": str(out),
    }  # fmt: skip
    return table | changes


def aligned(folder: Path) -> dict[str, Any]:
    """A teacher with another tokenizer."""
    save(folder / "student", 300, "<end>", 0)
    save(folder / "teacher", 275, "<stop>", 1)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(x) + "\n" for x in PROMPTS))
    teacher = {"model": str(folder / "teacher"), "vocabulary": "aligned", "stop_token": "class"}
    file = {"kind": "file", "path": str(folder / "prompts.jsonl"), "num_held_out": 2}
    return {
        "student": {"model": str(folder / "student")},
        "teacher": teacher,
        "data": file | {"grader": "number"},
        "objective": {"kind": "topk", "support": "student", "k": 4},
        "sampling": {"num_samples": 2, "max_new_tokens": 16},
        "evaluation": {"num_problems": 2, "num_samples": 1, "teacher": False},
    }


def oneself(_: Path) -> dict[str, Any]:
    """A student that is taught by its own average, which is told the answer."""
    teacher = {"kind": "self", "weights": "ema", "ema_decay": 0.5, "context": "{answer};"}
    sampling = {"num_samples": 2, "max_new_tokens": 32}
    return GRPO | {"teacher": teacher, "objective": {"kind": "kl"}, "sampling": sampling}


KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "aligned": aligned,
    "self": oneself,
    "grpo": lambda _: GRPO,
    "grpo, distillation": lambda _: GRPO | {
        "objective": {"kind": "grpo", "distillation_weight": 0.1},
        "teacher": {"model": EMBEDDED + "teacher"},
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one_run(tmp_path: Path, kind: str) -> None:
    table = KINDS[kind](tmp_path)
    train(parse_config(small(tmp_path / "one", **table)), log=lambda _: None)
    command = [sys.executable, "-c", PROGRAM, json.dumps(small(tmp_path / "two", **table))]
    ended = run_ranks(command, 2)
    assert [(rank.code, bool(rank.said)) for rank in ended] == [(0, True), (0, False)], ended
    one, two = (metrics_of(tmp_path / name) for name in ("one", "two"))
    assert [row["step"] for row in two] == [1, 2, 3]
    for ours, theirs in zip(one, two, strict=True):
        for name in ours.keys() & {"loss", "grad_norm", "num_rows", "aligned_share", "reward_mean"}:
            assert theirs[name] == pytest.approx(ours[name], rel=2e-4, abs=1e-7), name
    assert one[0]["grad_norm"] > 0
    assert (tmp_path / "two" / "student" / "model.safetensors").is_file()


@needs_peft
@pytest.mark.slow
def test_an_adapter_learns_from_rewards(tmp_path: Path) -> None:
    """GRPO moves the adapter alone; a run that is cut goes on to the same numbers."""
    student = GRPO["student"] | {"lora": {"rank": 4, "alpha": 8}}
    table = small(tmp_path / "run", **GRPO | {"student": student})
    train(parse_config(table), log=lambda _: None)
    metrics = metrics_of(tmp_path / "run")
    assert all(0 < row["reward_mean"] < 1 for row in metrics)
    assert metrics[0]["grad_norm"] > 0
    assert sum(row["num_nonfinite"] for row in metrics) == 0
    after, before = weights_of(tmp_path / "run" / "student"), load_model(EMBEDDED + "overconfident")
    start = before.state_dict()
    moved = {name for name, weight in after.items() if not torch.equal(weight, start[name])}
    assert moved
    assert all(name.endswith("_proj.weight") for name in moved)
    cut = small(tmp_path / "cut", **GRPO | {"student": student})
    with pytest.raises(KeyboardInterrupt):
        train(parse_config(cut), log=lambda _: None, on_step=stop_behind(2))
    train(parse_config(cut), log=lambda _: None)
    assert metrics_of(tmp_path / "cut") == metrics


def stop_behind(number: int) -> Callable[[dict[str, Any]], None]:
    """Interrupts a run behind one of its steps."""

    def stop(metrics: dict[str, Any]) -> None:
        if metrics["step"] == number:
            raise KeyboardInterrupt

    return stop


@pytest.fixture
def servers(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeVLLM]]:
    monkeypatch.setattr(replicas, "Limits", lambda: QUICK)
    with replicas_of(tiny_models, 2) as found:
        yield found


@pytest.mark.slow
def test_rewards_of_completions_drawn_ahead(
    servers: list[FakeVLLM], tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ratios are to the weights that sampled, which are those of the step before."""
    monkeypatch.setattr(LedgerTask, "grade", lambda *given: len(given[2]) % 2 == 0)

    def run(out: Path) -> list[dict[str, Any]]:
        changes: dict[str, Any] = {
            "engine": engine_of(servers, out, max_staleness=1),
            "objective": {"kind": "grpo", "clip_low": 1e-3, "clip_high": 1e-3},
            "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
            "sampling": {"num_samples": 3, "max_new_tokens": 6},
        }
        train(tiny_config(tiny_models, out, **changes), log=lambda _: None)
        return metrics_of(out)

    with monkeypatch.context() as patch:
        draw_late(patch)
        steps = run(tmp_path / "beside")
    monkeypatch.setattr(loop, "Step", Sequential)
    run(tmp_path / "in line")
    assert are_one_run(tmp_path / "beside", tmp_path / "in line")
    assert [step["staleness_steps"] for step in steps] == [0, 1, 1, 1]
    assert all(step["grad_norm"] > 0 for step in steps)
    assert steps[0]["clip_share"] == 0 < max(step["clip_share"] for step in steps)
