"""Several updates on one batch of rollouts: own denominators, and a clip that binds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from stepping import Watched, distance
from test_step import plain_logprobs
from torch import Tensor

import reference
from tiny import tiny_config
from tutelage.data.types import Rollout
from tutelage.errors import ConfigError
from tutelage.setup.components import build_components

RATE = 0.3
CLIP = 0.1
LIMIT = 1e-6
"""The model's norms round to float32 whatever its dtype, and each update builds on the last."""


def taken(models: Path, rollouts: Sequence[Rollout], **changes: Any) -> tuple[Any, list[Tensor]]:
    """Metrics and weights of one step of plain gradient descent in float64."""
    optimizer = {"learning_rate": RATE, "max_grad_norm": 0}
    config = tiny_config(models, Path("unused"), **({"optimizer": optimizer} | changes))
    components = build_components(config)
    components.student.model.double()
    components.teacher.model.double()
    descent = torch.optim.SGD(components.student.parameters(), lr=RATE)
    step = Watched(config, components, Accelerator(cpu=True), components.student, descent)
    step.rollouts = list(rollouts)
    metrics = step.take(1)
    return metrics, [p.detach().clone() for p in components.student.parameters()]


def plainly(
    models: Path, rollouts: Sequence[Rollout], num_updates: int, clip: float, is_stale: bool = True
) -> tuple[list[Tensor], float]:
    """The same by definition: weights, and the share of tokens whose clip took effect.

    Without `is_stale` every update compares with itself, as if its tokens had just been drawn.
    """
    components = build_components(tiny_config(models, Path("unused")))
    student, teacher = components.student.model.double(), components.teacher.model.double()
    size, per_update = components.student.vocab_size, len(rollouts) // num_updates
    tokens = [torch.tensor(r.completion_ids)[:, None] for r in rollouts]

    def logprobs(model: torch.nn.Module, i: int) -> Tensor:
        return plain_logprobs(model, rollouts[i], size).gather(1, tokens[i]).squeeze(1)

    every = range(len(rollouts))
    with torch.no_grad():
        old, goal = ([logprobs(m, i) for i in every] for m in (student, teacher))
    num_clipped = 0
    for u in range(num_updates):
        mine = range(u * per_update, (u + 1) * per_update)
        losses = []
        for i in mine:
            new = logprobs(student, i)
            start = old[i] if is_stale else new.detach()
            ratio, advantage = (new - start).exp(), goal[i] - start
            clipped = ratio.clamp(1 - clip, 1 + clip) * advantage
            losses.append(-torch.minimum(ratio * advantage, clipped))
            num_clipped += int((clipped < ratio * advantage).sum())
        student.zero_grad()
        torch.cat(losses).mean().backward()
        with torch.no_grad():
            for p in student.parameters():
                p -= RATE * (0 if p.grad is None else p.grad)
    count = sum(len(t) for t in tokens)
    return [p.detach() for p in student.parameters()], num_clipped / count


@pytest.mark.parametrize("num_updates", [1, 2, 4])
def test_updates_equal_the_definition_with_a_binding_clip(
    tiny_models: Path, rollouts: list[Rollout], num_updates: int
) -> None:
    objective = {"kind": "sampled", "clip": CLIP}
    changes = {"updates_per_step": num_updates, "objective": objective, "micro_batch_size": 3}
    metrics, found = taken(tiny_models, rollouts, **changes)
    expected, share = plainly(tiny_models, rollouts, num_updates, CLIP)
    assert distance(found, expected) <= LIMIT
    assert metrics["clip_share"] == pytest.approx(share, abs=1e-12)
    assert (share > 0.1) == (num_updates > 1)


def test_fresh_probabilities_or_no_clip_would_be_seen(
    tiny_models: Path, rollouts: list[Rollout]
) -> None:
    """Negative control: the updates differ when old probabilities are not those of the start."""
    expected, _ = plainly(tiny_models, rollouts, 4, CLIP)
    fresh, share = plainly(tiny_models, rollouts, 4, CLIP, is_stale=False)
    unclipped, _ = plainly(tiny_models, rollouts, 4, 1e9)
    assert share == 0
    assert distance(fresh, expected) > 1e-4
    assert distance(unclipped, expected) > 1e-4


@pytest.mark.parametrize("rule", ["all", "entropy"])
def test_every_update_has_its_own_denominator(
    tiny_models: Path, rollouts: list[Rollout], rule: str
) -> None:
    """Two updates of exact KL are two steps on the halves (selection being per completion)."""
    selection = {"rule": "all"} if rule == "all" else {"rule": rule, "keep": 0.5}
    if rule == "entropy":  # so that scores before the first update choose alike
        selection["keep"] = 1.0
    changes: dict[str, Any] = {"selection": selection, "micro_batch_size": 3}
    metrics, found = taken(tiny_models, rollouts, updates_per_step=2, **changes)
    components = build_components(tiny_config(tiny_models, Path("unused")))
    student, teacher = components.student.model.double(), components.teacher.model.double()
    size, total = components.student.vocab_size, 0.0
    for half in (rollouts[:4], rollouts[4:]):
        log_p = torch.cat([plain_logprobs(student, r, size) for r in half])
        with torch.no_grad():
            log_q = torch.cat([plain_logprobs(teacher, r, size) for r in half])
        kls = reference.reverse_kl(log_p, log_q)
        total += float(kls.detach().sum())
        student.zero_grad()
        kls.mean().backward()
        with torch.no_grad():
            for p in student.parameters():
                p -= RATE * (0 if p.grad is None else p.grad)
    assert distance(found, [p.detach() for p in student.parameters()]) <= LIMIT
    count = sum(len(r.completion_ids) for r in rollouts)
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-10)
    assert metrics["clip_share"] is None


@pytest.mark.parametrize("limits", [(1, 64), (16, 64), (40, 2), (0, 3)])
def test_micro_batches_change_no_update(
    tiny_models: Path, rollouts: list[Rollout], limits: tuple[int, int]
) -> None:
    changes: dict[str, Any] = {
        "updates_per_step": 2,
        "objective": {"kind": "eopd", "estimator": "sampled", "clip": CLIP},
        "selection": {"rule": "soft_or", "keep": 0.4, "scope": "batch"},
    }
    whole, expected = taken(tiny_models, rollouts, micro_batch_size=8, **changes)
    tokens, size = limits
    metrics, found = taken(
        tiny_models, rollouts, micro_batch_tokens=tokens, micro_batch_size=size, **changes
    )
    assert distance(found, expected) <= LIMIT
    assert metrics["clip_share"] == whole["clip_share"]
    assert whole["clip_share"] > 0


def test_prompts_that_do_not_divide_are_refused(tiny_models: Path) -> None:
    with pytest.raises(ConfigError, match="prompts_per_step must be a multiple of 3 updates"):
        tiny_config(tiny_models, Path("unused"), updates_per_step=3)
