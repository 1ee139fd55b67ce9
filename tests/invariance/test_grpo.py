"""Whole steps by rewards: the definition, the teacher beside it, and prompts without signal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from accelerate import Accelerator
from stepping import Watched, distance
from test_step import plain_logprobs
from torch import Tensor

import reference
from tiny import tiny_config
from tutelage.config.method import GRPOObjective, SampledObjective
from tutelage.core import TokenStats
from tutelage.core.policy import ClippedPolicy
from tutelage.core.terms import SampledReverseKL
from tutelage.data.batch import collate
from tutelage.data.types import Conversation, Outcome, Prompt, Rollout
from tutelage.models.teacher import Teacher
from tutelage.setup.components import build_components
from tutelage.train.grades import grade_step
from tutelage.train.micro_batch import MicroBatch

RATE = 0.3
LIMIT = 1e-6
"""The model's norms round to float32 whatever its dtype, and each update builds on the last."""
RIGHT = [True, False, False, False, False, True, True, True]
"""Two completions of each prompt: the second and the fourth teach nothing."""


class Graded:
    """Verdicts by the order of completions."""

    def __init__(self, task: Any, rollouts: Sequence[Rollout], verdicts: Sequence[bool]) -> None:
        self.prompts = task.prompts
        named = zip(rollouts, verdicts, strict=True)
        self.verdicts = {(r.prompt.id, r.text): verdict for r, verdict in named}

    def grade(self, prompt: Prompt, text: str, is_truncated: bool) -> bool:
        return self.verdicts[prompt.id, text]


@pytest.fixture
def told(rollouts: list[Rollout]) -> list[Rollout]:
    """Rollouts with texts that tell a prompt's two apart."""
    return [Rollout(r.prompt, r.sample, r.prompt_ids, r.completion_ids, text=str(r.sample))
            for r in rollouts]  # fmt: skip


def taken(
    models: Path, rollouts: Sequence[Rollout], verdicts: Sequence[bool] = RIGHT, **changes: Any
) -> tuple[dict[str, Any], list[Tensor], list[Tensor]]:
    """Metrics, weights and the change of weights of one step of gradient descent in float64."""
    changes = {"objective": {"kind": "grpo"}, "micro_batch_size": 3} | changes
    changes |= {"optimizer": {"learning_rate": RATE, "max_grad_norm": 0}}
    config = tiny_config(models, Path("unused"), **changes)
    components = build_components(config)
    object.__setattr__(components, "task", Graded(components.task, rollouts, verdicts))
    components.student.model.double()
    components.teacher.model.double()
    before = [p.detach().clone() for p in components.student.parameters()]
    descent = torch.optim.SGD(components.student.parameters(), lr=RATE)
    step = Watched(config, components, Accelerator(cpu=True), components.student, descent)
    step.rollouts = list(rollouts)
    metrics = step.take(1)
    after = [p.detach().clone() for p in components.student.parameters()]
    return metrics, after, [a - b for a, b in zip(after, before, strict=True)]


def plainly(
    models: Path, rollouts: Sequence[Rollout], num_updates: int, is_scaled: bool, clip: float
) -> tuple[list[Tensor], float]:
    """Weights and loss by definition: the sum over an update's tokens by their number."""
    components = build_components(tiny_config(models, Path("unused")))
    student, size = components.student.model.double(), components.student.vocab_size
    advantages = reference.advantages([float(x) for x in RIGHT], 2, is_scaled)
    with torch.no_grad():
        old = [sampled(student, r, size) for r in rollouts]
    total, count, per_update = 0.0, 0, len(rollouts) // num_updates
    for u in range(num_updates):
        losses = []
        for i in range(u * per_update, (u + 1) * per_update):
            ratio = (sampled(student, rollouts[i], size) - old[i]).exp()
            clipped = ratio.clamp(1 - clip, 1 + clip)
            losses.append(-torch.minimum(ratio * advantages[i], clipped * advantages[i]))
        student.zero_grad()
        torch.cat(losses).mean().backward()
        total, count = (
            total + float(torch.cat(losses).detach().sum()),
            count + len(torch.cat(losses)),
        )
        with torch.no_grad():
            for p in student.parameters():
                p -= RATE * (0 if p.grad is None else p.grad)
    return [p.detach() for p in student.parameters()], total / count


def sampled(model: torch.nn.Module, rollout: Rollout, size: int) -> Tensor:
    tokens = torch.tensor(rollout.completion_ids)[:, None]
    return plain_logprobs(model, rollout, size).gather(1, tokens).squeeze(1)


@pytest.mark.parametrize(("num_updates", "scale"), [(1, "std"), (2, "std"), (4, "none")])
def test_a_step_equals_the_definition_and_reads_no_teacher(
    tiny_models: Path,
    told: list[Rollout],
    num_updates: int,
    scale: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Teacher, "forward", None)
    objective = {"kind": "grpo", "scale": scale, "clip_low": 0.1, "clip_high": 0.1}
    metrics, found, _ = taken(tiny_models, told, objective=objective, updates_per_step=num_updates)
    expected, loss = plainly(tiny_models, told, num_updates, scale == "std", 0.1)
    assert distance(found, expected) <= LIMIT
    assert metrics["loss"] == pytest.approx(loss, abs=1e-9)
    assert (metrics["clip_share"] > 0) == (num_updates > 1)
    assert (metrics["reward_mean"], metrics["no_signal_share"]) == (0.5, 0.5)
    assert metrics["reverse_kl_nats"] is None
    assert {"grade_s", "score_s", "learn_s"} <= metrics["seconds"].keys()


@pytest.mark.parametrize("diagnostics", ["all", "kept"])
def test_distillation_adds_its_own_gradient(
    tiny_models: Path, told: list[Rollout], diagnostics: str
) -> None:
    weight = 0.3
    both = {"kind": "grpo", "distillation_weight": weight}
    metrics, _, sum_of_both = taken(tiny_models, told, objective=both, diagnostics=diagnostics)
    policy, teaching = (
        taken(tiny_models, told, objective=objective)[2]
        for objective in ({"kind": "grpo"}, {"kind": "kl"})
    )
    expected = [a + weight * b for a, b in zip(policy, teaching, strict=True)]
    assert distance(sum_of_both, expected) <= LIMIT
    assert distance(sum_of_both, policy) > 0.01
    assert metrics["reverse_kl_nats"] > 0


@pytest.mark.parametrize("verdict", [True, False])
def test_prompts_without_signal_move_nothing(
    tiny_models: Path, told: list[Rollout], verdict: bool
) -> None:
    metrics, _, change = taken(tiny_models, told, [verdict] * 8)
    assert all(bool((x == 0).all()) for x in change)
    assert (metrics["loss"], metrics["no_signal_share"]) == (0, 1)


def test_of_selected_tokens_the_sum_is_divided_by_their_number(
    tiny_models: Path, told: list[Rollout]
) -> None:
    """First tokens alone, which is the whole of completions that were cut after them."""
    selection = {"rule": "first_n", "num_tokens": 1}
    _, _, found = taken(tiny_models, told, selection=selection)
    cut = [Rollout(r.prompt, r.sample, r.prompt_ids, r.completion_ids[:1], text=r.text)
           for r in told]  # fmt: skip
    assert distance(found, taken(tiny_models, cut)[2]) <= LIMIT


def test_packed_micro_batches_change_no_gradient(tiny_models: Path, told: list[Rollout]) -> None:
    padded, packed = (taken(tiny_models, told, micro_batches=x)[2] for x in ("padded", "packed"))
    assert distance(packed, padded) <= LIMIT


def test_the_ratio_is_to_the_weights_that_sampled(told: list[Rollout]) -> None:
    """Where those were older than the step's, and in both halves of a micro-batch that is cut."""
    batch = collate(told, 0)
    n = batch.num_rows
    micro_batch = MicroBatch(batch, 0, sampler_logprobs=torch.arange(n) * -1.0)
    stats = TokenStats(*torch.rand(6, n).double(), {"advantage": torch.arange(n).double()})
    rows = torch.arange(0, n, 2)
    weights = torch.ones(len(rows))
    micro_batch.train_on(GRPOObjective("grpo"), rows, stats[rows], weights, weights * 0)
    halves = micro_batch.halves(GRPOObjective("grpo"))
    terms = [m.terms[0][0] for m in (micro_batch, *halves)]
    assert all(isinstance(term, ClippedPolicy) for term in terms)
    olds, advantages = ([vars(term)[x] for term in terms] for x in ("old_logprobs", "advantages"))
    assert olds[0].tolist() == (-rows.double()).tolist()
    assert advantages[0].tolist() == rows.tolist()
    assert torch.cat(olds[1:]).tolist() == olds[0].tolist()
    assert torch.cat(advantages[1:]).tolist() == advantages[0].tolist()


@pytest.mark.parametrize("name", ["sampler", "step"])
def test_the_sampled_objective_compares_with_what_it_is_told_to(
    told: list[Rollout], name: Literal["sampler", "step"]
) -> None:
    batch = collate(told, 0)
    n = batch.num_rows
    micro_batch = MicroBatch(batch, 0, sampler_logprobs=torch.full((n,), -9.0))
    stats, every = TokenStats(*torch.rand(6, n).double()), torch.arange(n)
    objective = SampledObjective("sampled", old_logprobs=name)
    micro_batch.train_on(objective, every, stats, torch.ones(n), torch.zeros(n))
    ((term, _),) = micro_batch.terms
    assert isinstance(term, SampledReverseKL)
    expected = stats.log_p if name == "step" else torch.full((n,), -9.0).double()
    assert torch.equal(term.old_logprobs, expected)


def test_a_conversation_earns_the_environments_score() -> None:
    def talk(score: float, is_success: bool) -> Rollout:
        outcome = Outcome(score, is_success)
        talked = Conversation(({"role": "assistant", "content": "x"},), 1, 0, 0, outcome)
        return Rollout(Prompt("a", "b"), 0, (1,), (2,), conversation=talked)

    ranks: Any = SimpleNamespace(by_completion=lambda values, share: list(values))
    grades = grade_step(
        SimpleNamespace(grade=None), [talk(0.25, False), talk(1.0, True)], [0, 1], ranks
    )  # type: ignore[arg-type]
    assert grades.rewards == [0.25, 1.0]
    assert grades.verdicts == [False, True]
