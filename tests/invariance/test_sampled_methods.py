"""Steps whose weights or terms depend on the sampled tokens equal the plain computation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import Taken, distance, take_step
from test_step import plain_logprobs
from torch import Tensor

import reference
from tutelage.core.terms import SampledReverseKL, TopKForwardKL
from tutelage.data.batch import collate
from tutelage.data.types import Rollout
from tutelage.setup.components import Components
from tutelage.train.micro_batch import MicroBatch

METHODS: dict[str, dict[str, Any]] = {
    "ida": {"weighting": {"kind": "ida"}},
    "ida_sampled": {"weighting": {"kind": "ida"}, "objective": {"kind": "sampled"}},
    "tropd": {"objective": {"kind": "tropd", "k": 5}},
    "tropd_renorm": {"objective": {"kind": "tropd", "k": 5, "fkl": "topk_renorm"}},
}


def plain_step(components: Components, rollouts: Sequence[Rollout], method: str) -> Taken:
    """The step by definition: all tokens, each with its own loss, and one mean."""
    student, teacher = components.student.model, components.teacher.model
    size = components.student.vocab_size
    student.zero_grad()
    log_p = torch.cat([plain_logprobs(student, r, size) for r in rollouts])
    with torch.no_grad():
        log_q = torch.cat([plain_logprobs(teacher, r, size) for r in rollouts])
    losses = losses_of(method, log_p, log_q, rollouts)
    losses.mean().backward()
    gradients = [
        torch.zeros_like(p) if p.grad is None else p.grad for p in components.student.parameters()
    ]
    return Taken({"loss": float(losses.detach().mean())}, gradients)


def losses_of(method: str, log_p: Tensor, log_q: Tensor, rollouts: Sequence[Rollout]) -> Tensor:
    """The loss of every token `[N]`."""
    tokens = [token for r in rollouts for token in r.completion_ids]
    if method.startswith("tropd"):
        places = [(c, t) for c, r in enumerate(rollouts) for t in range(len(r.completion_ids))]
        uniform = [reference.counter_uniform((0, 1, 7), place) for place in places]
        return reference.trust_region(log_p, log_q, tokens, uniform, 5, method == "tropd_renorm")
    before = log_p.detach()
    old = [float(row[y]) for row, y in zip(before, tokens, strict=True)]
    sampled = reference.sampled(log_p, log_q, tokens, old, 0.2)
    given = zip(before, log_q, tokens, strict=True)
    weights = torch.tensor([reference.ida_weight(*row) for row in given], dtype=torch.float64)
    assert 0.2 < float((weights < 1).double().mean()) < 0.8
    return weights * (sampled if method == "ida_sampled" else reference.reverse_kl(log_p, log_q))


@pytest.mark.parametrize("method", METHODS)
def test_a_step_equals_the_plain_computation_however_it_is_cut(
    tiny_models: Path, rollouts: list[Rollout], method: str
) -> None:
    expected = None
    for changes in ({"micro_batch_size": 3}, {"micro_batch_size": 1, "micro_batches": "packed"}):
        found = take_step(tiny_models, rollouts, torch.float64, **METHODS[method], **changes)
        if expected is None:
            assert found.components is not None
            expected = plain_step(found.components, rollouts, method)
        assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-10)
        assert distance(found.gradients, expected.gradients) <= 1e-10


def test_the_order_of_rollouts_changes_no_weight(
    tiny_models: Path, rollouts: list[Rollout]
) -> None:
    moved = [rollouts[i] for i in (5, 0, 7, 2, 1, 6, 3, 4)]
    found = [take_step(tiny_models, x, torch.float64, **METHODS["ida"]) for x in (rollouts, moved)]
    assert distance(found[1].gradients, found[0].gradients) <= 1e-12


def test_what_is_outside_of_the_trust_region_is_drawn_anew_for_every_seed(
    tiny_models: Path, rollouts: list[Rollout]
) -> None:
    shares = set()
    for seed in range(2):
        changes = {"seed": seed, **METHODS["tropd"]}
        found = take_step(tiny_models, rollouts, torch.float64, **changes)
        shares.add(found.metrics["outside_trust_share"])
    assert all(0 < share < 1 for share in shares)
    assert len(shares) > 1


def test_tokens_outside_of_the_trust_region_are_not_counted_as_clipped(
    rollouts: list[Rollout],
) -> None:
    batch = collate(rollouts[:1], 0)
    term = SampledReverseKL(torch.zeros(3, dtype=torch.long), torch.zeros(3))
    term.is_clipped[:] = torch.tensor([True, True, False])
    outside = (TopKForwardKL(5), torch.tensor([1.0, 0.0, 0.0]))
    terms = [(term, torch.tensor([0.0, 1.0, 1.0])), outside]
    assert MicroBatch(batch, 0, terms=terms).num_clipped == 1
