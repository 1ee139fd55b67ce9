"""Whole steps without a teacher: the definition, a rule that brings the teacher back, and cuts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import distance, take_step
from test_grpo import LIMIT, RATE, taken
from test_step import plain_logprobs
from torch import Tensor

import reference
from tiny import tiny_config
from tutelage.data.types import Rollout
from tutelage.models.teacher import Teacher
from tutelage.setup.components import build_components

KEEP = 0.4
OPSA: dict[str, Any] = {
    "objective": {"kind": "opsa", "clip": 0.1},
    "selection": {"rule": "lowest_logprob", "keep": KEEP},
}


def plainly(models: Path, rollouts: Sequence[Rollout], num_updates: int) -> list[Tensor]:
    """Weights by definition: advantages over the step's kept tokens, one mean for each update."""
    components = build_components(tiny_config(models, Path("unused")))
    student, size = components.student.model.double(), components.student.vocab_size
    with torch.no_grad():
        before = [plain_logprobs(student, r, size) for r in rollouts]
    old = [
        [float(row[y]) for row, y in zip(x, r.completion_ids, strict=True)]
        for x, r in zip(before, rollouts, strict=True)
    ]
    kept = [
        reference.kept([-x for x in row], [0] * len(row), str(KEEP), [True] * len(row))
        for row in old
    ]
    entropies = [reference.entropy(x)[rows] for x, rows in zip(before, kept, strict=True)]
    advantages = iter(reference.sharpening(torch.cat(entropies).tolist()))
    per_update = len(rollouts) // num_updates
    for u in range(num_updates):
        losses = []
        for i in range(u * per_update, (u + 1) * per_update):
            log_p = plain_logprobs(student, rollouts[i], size)[kept[i]]
            tokens = [rollouts[i].completion_ids[t] for t in kept[i]]
            given = [old[i][t] for t in kept[i]], [next(advantages) for _ in kept[i]]
            losses.append(reference.policy(log_p, tokens, *given, (0.1, 0.1)))
        student.zero_grad()
        torch.cat(losses).mean().backward()
        with torch.no_grad():
            for p in student.parameters():
                p -= RATE * (0 if p.grad is None else p.grad)
    return [p.detach() for p in student.parameters()]


@pytest.mark.parametrize("num_updates", [1, 4])
def test_a_step_equals_the_definition_and_reads_no_teacher(
    tiny_models: Path,
    rollouts: list[Rollout],
    num_updates: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Teacher, "forward", None)
    metrics, found, _ = taken(tiny_models, rollouts, updates_per_step=num_updates, **OPSA)
    assert distance(found, plainly(tiny_models, rollouts, num_updates)) <= LIMIT
    assert metrics["reverse_kl_nats"] is metrics["teacher_top16_mass"] is None
    assert "teacher_s" not in metrics["seconds"]
    assert metrics["num_nonfinite"] == 0
    assert (metrics["clip_share"] > 0) == (num_updates > 1)


def test_a_rule_that_compares_with_the_teacher_brings_it_back(
    tiny_models: Path, rollouts: list[Rollout]
) -> None:
    changes = OPSA | {"selection": {"rule": "divergence", "keep": KEEP}}
    metrics = taken(tiny_models, rollouts, **changes)[0]
    assert metrics["reverse_kl_nats"] > 0
    assert metrics["num_nonfinite"] == 0
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize(
    "changes", [{"micro_batch_size": 1}, {"micro_batches": "packed"}, {"diagnostics": "kept"}]
)
def test_cuts_and_order_change_no_gradient(
    tiny_models: Path, rollouts: list[Rollout], changes: dict[str, Any]
) -> None:
    whole = take_step(tiny_models, rollouts, torch.float64, **OPSA)
    moved = [rollouts[i] for i in (5, 0, 7, 2, 1, 6, 3, 4)]
    found = take_step(tiny_models, moved, torch.float64, **OPSA, **changes)
    assert distance(found.gradients, whole.gradients) <= 1e-10
    assert found.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-10)
