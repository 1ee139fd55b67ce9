"""Every selection rule with exact and with sampled objectives, and at the smallest budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from pydantic import TypeAdapter
from stepping import Recorder, Watched, distance, ragged_rollouts
from test_step import plain_logprobs
from torch import Tensor

import reference
from tiny import tiny_config
from tutelage.config.method import ObjectiveConfig
from tutelage.config.schema import Config
from tutelage.config.selection import SelectionConfig
from tutelage.core import RULES
from tutelage.data.types import Rollout
from tutelage.setup.components import Components, build_components

_SELECTION: TypeAdapter[Any] = TypeAdapter(SelectionConfig)
_OBJECTIVE: TypeAdapter[Any] = TypeAdapter(ObjectiveConfig)
GATE = {"kind": "eopd", "threshold": 2.5}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "exact": {"kind": "kl"},
    "sampled": {"kind": "sampled"},
    "eopd": GATE,
    "eopd_sampled": GATE | {"estimator": "sampled"},
    "opsa": {"kind": "opsa"},
}
PAIRS = [
    pytest.param(rule, objective, marks=() if (i + j) % len(OBJECTIVES) == 0 else pytest.mark.slow)
    for i, rule in enumerate(RULES)
    for j, objective in enumerate(OBJECTIVES)
]
"""All of them; the fast ones have every rule once."""


def selection(rule: str, keep: float) -> Any:
    """The rule's table with a budget, where it has one."""
    options = {"all": {}, "first_n": {"num_tokens": 1}}.get(rule, {"keep": keep})
    return _SELECTION.validate_python({"rule": rule, **options})


@dataclass
class Plain:
    """A tiny run's models and rollouts, and log-probabilities with their graph `[N, V]`."""

    config: Config
    components: Components
    step: Callable[[Config], Watched]
    rollouts: list[Rollout]
    log_p: Tensor
    log_q: Tensor

    @property
    def names(self) -> list[tuple[int, int]]:
        """(completion, position) of every row."""
        return [(i, t) for i, r in enumerate(self.rollouts) for t in range(len(r.completion_ids))]

    def loss(self, objective: str, rows: list[int]) -> Tensor:
        """The mean of an objective over some rows, by definition."""
        log_p, log_q = self.log_p[rows], self.log_q[rows]
        every = [token for r in self.rollouts for token in r.completion_ids]
        tokens = [every[row] for row in rows]
        old = [float(row[y]) for row, y in zip(log_p.detach(), tokens, strict=True)]
        if objective == "opsa":
            advantages = reference.sharpening(reference.entropy(log_p.detach()).tolist())
            return reference.policy(log_p, tokens, old, advantages, (0.2, 0.2)).mean()
        loss = reference.reverse_kl(log_p, log_q)
        if "sampled" in objective:
            loss = reference.sampled(log_p, log_q, tokens, old, 0.2)
        if "eopd" in objective:
            gate = (reference.entropy(log_q) >= GATE["threshold"]).double()
            loss = loss + gate * reference.forward_kl(log_p, log_q)
        return loss.mean()


@pytest.fixture(scope="module")
def plain(tiny_models: Path) -> Plain:
    changes = {"optimizer": {"max_grad_norm": 0}, "prompts_per_step": 2, "micro_batch_size": 4}
    config = tiny_config(tiny_models, Path("unused"), **changes)
    components = build_components(config)
    student, teacher = components.student.model.double(), components.teacher.model.double()
    rollouts = ragged_rollouts(components, 4)
    size = components.student.vocab_size
    log_p = torch.cat([plain_logprobs(student, r, size) for r in rollouts])
    with torch.no_grad():
        log_q = torch.cat([plain_logprobs(teacher, r, size) for r in rollouts])
    recorder = Recorder(list(components.student.parameters()), lr=1.0)

    def step(changed: Config) -> Watched:
        found = Watched(changed, components, Accelerator(cpu=True), components.student, recorder)
        found.rollouts = rollouts
        return found

    return Plain(config, components, step, rollouts, log_p, log_q)


@pytest.mark.parametrize(("rule", "objective"), PAIRS)
def test_a_rule_trains_with_exact_and_with_sampled_objectives(
    plain: Plain, rule: str, objective: str
) -> None:
    table = _OBJECTIVE.validate_python(OBJECTIVES[objective])
    config = replace(plain.config, selection=selection(rule, 0.3), objective=table)
    step = plain.step(config)
    metrics = step.take(1)
    rows = [row for row, name in enumerate(plain.names) if name in step.kept]
    loss = plain.loss(objective, rows)
    assert metrics["num_nonfinite"] == 0
    assert metrics["num_kept"] == len(rows)
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-10)
    assert (metrics["clip_share"] is None) == (objective in ("exact", "eopd"))
    parameters = list(plain.components.student.parameters())
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert isinstance(step.optimizer, Recorder)
    assert distance(step.optimizer.gradients, expected) <= 1e-10


@pytest.mark.parametrize("rule", RULES)
def test_a_thousandth_trains_one_token_of_every_completion(plain: Plain, rule: str) -> None:
    step = plain.step(replace(plain.config, selection=selection(rule, 0.001)))
    assert step.take(1)["grad_norm"] > 0
    kept = Counter(completion for completion, _ in step.kept)
    stop = plain.components.tokenizer.eos_token_id
    for number, rollout in enumerate(plain.rollouts):
        ids = rollout.completion_ids
        most = {"all": len(ids), "extreme_advantage": 2}.get(rule, 1)
        usable = len(ids) - (ids.count(stop) if rule == "probability_gap" else 0)
        assert kept[number] == min(most, usable)
