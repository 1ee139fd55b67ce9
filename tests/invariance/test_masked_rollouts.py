"""Inserted tokens of a conversation are context: no gradient, budget or metric knows them."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from stepping import RULES, ragged_rollouts, take_step
from torch import Tensor

from tiny import MEASURED, tiny_config
from tutelage.core import LazyLogits, distillation_objective, select_tokens, token_stats
from tutelage.data.batch import Batch, collate, pack
from tutelage.data.types import Conversation, Outcome, Prompt, Rollout
from tutelage.errors import DataError
from tutelage.setup.components import build_components
from tutelage.train.distributed import Ranks
from tutelage.train.metrics import rollout_metrics, token_metrics

VOCAB, WIDTH = 11, 6


def conversation(rng: random.Random, num_turns: int) -> tuple[bool, ...]:
    """A mask of turns of 1 to 4 generated ids with 1 to 5 inserted ones between them."""
    mask: list[bool] = []
    for turn in range(num_turns):
        mask += [False] * (rng.randint(1, 5) if turn else 0) + [True] * rng.randint(1, 4)
    return tuple(mask)


def random_rollouts(rng: random.Random, count: int) -> list[Rollout]:
    found = []
    for index in range(count):
        mask = conversation(rng, rng.randint(1, 5))
        prompt, ids = (
            tuple(rng.randrange(VOCAB) for _ in range(size))
            for size in (rng.randint(1, 4), len(mask))
        )
        found.append(Rollout(Prompt(str(index), "p"), 0, prompt, ids, is_generated=mask))
    return found


# --- one gradient ---------------------------------------------------------------------------------


def gradient_by_mask(models: Path, rollouts: list[Rollout]) -> list[Tensor]:
    """Of the mean reverse KL over masked tokens of whole sequences, one sequence at a time."""
    components = build_components(tiny_config(models, Path("unused")))
    student, teacher = (
        side.model.double().train(False) for side in (components.student, components.teacher)
    )
    size, total, count = components.student.vocab_size, torch.zeros((), dtype=torch.float64), 0
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
        log_p = student(input_ids=ids).logits[0, :-1, :size].log_softmax(-1)
        with torch.no_grad():
            log_q = teacher(input_ids=ids).logits[0, :-1, :size].log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)[len(rollout.prompt_ids) - 1 :]
        mask = torch.tensor(rollout.is_generated or [True] * len(rollout.completion_ids))
        total, count = total + kl[mask].sum(), count + int(mask.sum())
    loss = total / count
    return list(torch.autograd.grad(loss, list(student.parameters())))


def with_turns(models: Path, num_turns: int) -> list[Rollout]:
    """Conversations over ids that the tiny models know."""
    rng = random.Random(1)
    components = build_components(tiny_config(models, Path("unused")))
    found = []
    for rollout in ragged_rollouts(components):
        mask = conversation(rng, num_turns)
        ids = tuple(rng.randrange(components.student.vocab_size) for _ in mask)
        found.append(replace(rollout, completion_ids=ids, is_generated=mask))
    return found


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    error = sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True))
    return float((error / sum(float(b.square().sum()) for b in expected)) ** 0.5)


def test_three_turns_have_the_gradient_of_one_sequence_with_a_mask(tiny_models: Path) -> None:
    rollouts = with_turns(tiny_models, 3)
    taken = take_step(tiny_models, rollouts, torch.float64)
    expected = gradient_by_mask(tiny_models, rollouts)
    assert relative(taken.gradients, expected) < 1e-12
    assert taken.metrics["num_rows"] == sum(map(sum, (r.is_generated for r in rollouts)))
    everything = [replace(r, is_generated=()) for r in rollouts]
    assert relative(taken.gradients, gradient_by_mask(tiny_models, everything)) > 1e-3


@pytest.mark.parametrize("micro_batches", ["padded", "packed"])
@pytest.mark.parametrize("rule", ["all", "soft_or", "q3"])
def test_a_mask_of_ones_is_no_mask(tiny_models: Path, rule: str, micro_batches: str) -> None:
    components = build_components(tiny_config(tiny_models, Path("unused")))
    plain = ragged_rollouts(components)
    masked = [replace(r, is_generated=(True,) * len(r.completion_ids)) for r in plain]
    changes = {"selection": RULES[rule], "micro_batches": micro_batches}
    one, other = (
        take_step(tiny_models, rollouts, torch.float32, **changes) for rollouts in (plain, masked)
    )
    assert one.kept == other.kept
    assert all(map(torch.equal, one.gradients, other.gradients))
    names = one.metrics.keys() - MEASURED
    assert {n: one.metrics[n] for n in names} == {n: other.metrics[n] for n in names}


# --- the mask oracle ------------------------------------------------------------------------------


def outcome(
    batch: Batch, states: Tensor, teacher: Tensor, rule: str
) -> tuple[Tensor, list[int], dict[str, Any]]:
    """Gradient with respect to all states, kept rows and metrics."""
    states = states.clone().requires_grad_()
    head = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    p, q = LazyLogits(batch.flatten(states), head), LazyLogits(batch.flatten(teacher), head)
    stats = token_stats(p, q, batch.tokens, extras=("teacher_top_mass",))
    selection = select_tokens(stats, batch.completion, rule, 0.3)
    objective = distillation_objective(p[selection.rows], q[selection.rows])
    (objective.total / len(selection.rows)).backward()  # type: ignore[no-untyped-call]
    config = tiny_config(Path("unused"), Path("unused"))
    gate = torch.zeros(batch.num_rows)
    assert states.grad is not None
    return (
        states.grad,
        selection.rows.tolist(),
        token_metrics(stats, selection.mask, gate, config),
    )


def oracle(num_conversations: int, place: str) -> int:
    """How many batches change where logits in front of an inserted or generated token change."""
    rng, size, num_changed = random.Random(7), 8, 0
    torch.manual_seed(3)
    for index in range(num_conversations // size):
        rollouts = random_rollouts(rng, size)
        is_packed, side = index % 3 == 0, "left" if index % 2 else "right"
        batch = pack(rollouts) if is_packed else collate(rollouts, 0, side)  # type: ignore[arg-type]
        shape = (*batch.input_ids.shape, WIDTH)
        states, teacher = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
        is_row = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
        is_row[batch.row_index] = True
        bumped = ~is_row.view(shape[:2]) if place == "inserted" else is_row.view(shape[:2])
        rule = ("all", "soft_or", "q3", "entropy")[index % 4]
        before = outcome(batch, states, teacher, rule)
        if place == "inserted":
            assert not before[0][bumped].any()
        bump = torch.randn(WIDTH, dtype=torch.float64)
        other = states + 10 * bumped[..., None] * bump
        after = outcome(batch, other, teacher + 10 * bumped[..., None] * bump.flip(0), rule)
        is_same = torch.equal(before[0], after[0]) and before[1:] == after[1:]
        num_changed += not is_same
    return num_changed


def test_logits_of_inserted_tokens_move_nothing() -> None:
    assert oracle(2000, "inserted") == 0


def test_logits_of_generated_tokens_move_everything() -> None:
    assert oracle(80, "generated") == 10


def test_a_row_stands_in_front_of_each_generated_token_and_of_no_other() -> None:
    rng = random.Random(5)
    for _ in range(100):
        rollouts = random_rollouts(rng, 6)
        batch = collate(rollouts, 0)
        following = batch.input_ids.flatten()[batch.row_index + 1]
        assert torch.equal(following, batch.tokens)
        assert batch.tokens.tolist() == [t for r in rollouts for t in r.generated_ids]
        assert batch.position.tolist() == [i for r in rollouts for i in range(len(r.generated_ids))]


def test_a_conversation_and_a_single_answer_share_a_batch() -> None:
    told = Rollout(Prompt("a", "p"), 0, (1,), (2, 3, 4), is_generated=(True, False, True))
    batch = collate([told, Rollout(Prompt("b", "p"), 0, (5,), (6, 7))], 0)
    assert batch.tokens.tolist() == [2, 4, 6, 7]
    assert batch.position.tolist() == [0, 1, 0, 1]


def test_a_mask_of_another_length_is_refused() -> None:
    rollout = Rollout(Prompt("a", "p"), 0, (1,), (2, 3), is_generated=(True,))
    with pytest.raises(DataError, match="2 completion ids and 1 entries of is_generated"):
        collate([rollout], 0)


# --- metrics --------------------------------------------------------------------------------------


def test_metrics_of_conversations_count_turns_calls_and_generated_tokens() -> None:
    told = Conversation((), 2, 4, 1, Outcome(0.5, False))
    done = Conversation((), 4, 0, 0, Outcome(1.0, True))
    rollouts = [
        Rollout(Prompt("a", "p"), 0, (1,), (2, 3, 4), is_generated=(True, False, True)),
        Rollout(Prompt("b", "p"), 0, (1,), (2, 3, 4, 5), is_generated=(True,) * 4),
    ]
    rollouts = [replace(r, conversation=c) for r, c in zip(rollouts, (told, done), strict=True)]
    found = rollout_metrics(rollouts, 6, Ranks(Accelerator(cpu=True)))
    assert found["completion_length_mean"] == 3
    assert {name: found[name] for name in list(found)[3:]} == {
        "success_share": 0.5,
        "score_mean": 0.75,
        "turns_mean": 3.0,
        "tokens_per_turn": 1.0,
        "tool_calls_mean": 2.0,
        "tool_error_share": 0.25,
        "inserted_tokens_mean": 0.5,
    }
    plain = rollout_metrics(
        [replace(rollouts[0], conversation=None)], 2, Ranks(Accelerator(cpu=True))
    )
    assert "success_share" not in plain
