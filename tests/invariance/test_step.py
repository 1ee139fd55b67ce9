"""The gradient of a step is that of the plain computation, however the step is cut up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from stepping import RULES, Taken, distance, take_step
from torch import Tensor

import reference
from tutelage.core import LazyLogits, Objective, TokenStats, counter_uniform
from tutelage.data.batch import Batch, Side, collate
from tutelage.data.types import Rollout
from tutelage.setup.components import Components

DTYPES = [(torch.float64, 1e-12), (torch.float32, 2e-6)]
DETERMINISTIC = [
    "all",
    "soft_or",
    "entropy",
    "q3",
    "divergence",
    "bottom",
    "lowest_logprob",
    "probability_gap",
    "extreme_advantage",
    "influence",
]


def plain_logprobs(model: torch.nn.Module, rollout: Rollout, vocab_size: int) -> Tensor:
    """Log-probabilities of a completion's positions: one sequence, no padding, full logits."""
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
    logits = model(ids, use_cache=False).logits[0, :, :vocab_size]
    first = len(rollout.prompt_ids) - 1
    return reference.log_softmax(logits[first : first + len(rollout.completion_ids)])


def plain_step(components: Components, rollouts: Sequence[Rollout], rule: str) -> Taken:
    """A step, naively: score every token, keep, average the reverse KL of the kept."""
    student, teacher = components.student.model, components.teacher.model
    size = components.student.vocab_size
    student.zero_grad()
    log_p = torch.cat([plain_logprobs(student, r, size) for r in rollouts])
    with torch.no_grad():
        log_q = torch.cat([plain_logprobs(teacher, r, size) for r in rollouts])
    group = [i for i, r in enumerate(rollouts) for _ in r.completion_ids]
    position = [t for r in rollouts for t in range(len(r.completion_ids))]
    uniform = counter_uniform((0, 1, 1), torch.tensor(group), torch.tensor(position)).tolist()
    kls = reference.reverse_kl(log_p, log_q)
    scope = [0] * len(group) if RULES[rule].get("scope") == "batch" else group
    if rule in (*reference.SAMPLED_RULES, "extreme_advantage"):
        tokens = torch.tensor([token for r in rollouts for token in r.completion_ids])
        ours, theirs = (
            x.detach().gather(1, tokens[:, None]).squeeze(1).tolist() for x in (log_p, log_q)
        )
        if rule == "extreme_advantage":
            score = reference.extreme_scores(ours, theirs, scope)
        else:
            score = reference.sampled_scores(rule, ours, theirs, RULES[rule].get("b", 1.0))
    else:
        score = reference.scores(
            "soft_or" if rule == "influence" else rule,
            reference.entropy(log_p.detach()).tolist(),
            kls.detach().tolist(),
            reference.forward_kl(log_p.detach(), log_q).tolist(),
            uniform,
        )
    if rule == "influence":
        pairs = zip(log_p.detach(), log_q, strict=True)
        signal = [reference.extras(p, q)["signal_share"] for p, q in pairs]
        score = reference.influence_scores(signal, score, scope, RULES[rule]["combine"])
    keep = str(RULES[rule].get("keep", 1))
    usable = [True] * len(group)
    if rule == "probability_gap":
        stop = components.tokenizer.eos_token_id
        usable = [token != stop for r in rollouts for token in r.completion_ids]
    rows = reference.kept(score, scope, keep, usable, 2 if rule == "extreme_advantage" else 1)
    loss = kls[rows].sum() / len(rows)
    loss.backward()
    gradients = [
        torch.zeros_like(p) if p.grad is None else p.grad for p in components.student.parameters()
    ]
    metrics = {"loss": float(loss.detach()), "num_kept": len(rows), "num_rows": len(group)}
    return Taken(metrics, gradients, {(group[i], position[i]) for i in rows})


@pytest.mark.parametrize("rule", RULES)
def test_a_step_equals_the_plain_computation(
    tiny_models: Path, rollouts: list[Rollout], rule: str
) -> None:
    found = take_step(tiny_models, rollouts, torch.float64, selection=RULES[rule])
    assert found.components is not None
    expected = plain_step(found.components, rollouts, rule)
    assert found.kept == expected.kept
    for key, value in expected.metrics.items():
        assert found.metrics[key] == pytest.approx(value, rel=1e-12)
    assert distance(found.gradients, expected.gradients) <= 1e-11
    norm = sum(float(g.square().sum()) for g in expected.gradients) ** 0.5
    assert found.metrics["grad_norm"] == pytest.approx(norm, rel=1e-11)


@pytest.mark.parametrize(("dtype", "limit"), DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_the_micro_batch_size_changes_nothing(
    tiny_models: Path, rollouts: list[Rollout], dtype: torch.dtype, limit: float, rule: str
) -> None:
    whole = take_step(
        tiny_models, rollouts, dtype, selection=RULES[rule], micro_batch_size=len(rollouts)
    )
    for size in (1, 3, 5, 100):
        found = take_step(
            tiny_models, rollouts, dtype, selection=RULES[rule], micro_batch_size=size
        )
        assert found.kept == whole.kept
        assert found.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=limit)
        assert distance(found.gradients, whole.gradients) <= limit


def test_a_gradient_above_its_limit_is_cut_to_it_and_no_other_changes(
    tiny_models: Path, rollouts: list[Rollout]
) -> None:
    def clipped(limit: float) -> Taken:
        optimizer = {"learning_rate": 1.0, "max_grad_norm": limit}
        return take_step(tiny_models, rollouts, torch.float64, optimizer=optimizer)

    whole = clipped(0.0)
    norm = whole.metrics["grad_norm"]
    cut = clipped(0.3 * norm)
    assert cut.metrics["grad_norm"] == norm  # as it was before
    assert distance(cut.gradients, [0.3 * g for g in whole.gradients]) <= 1e-5
    same = clipped(1.01 * norm)
    assert all(map(torch.equal, same.gradients, whole.gradients))


def test_a_mean_of_means_would_change_it(tiny_models: Path, rollouts: list[Rollout]) -> None:
    """Negative control: averaging each micro-batch by itself is far outside of the limits."""
    whole = take_step(tiny_models, rollouts, torch.float64)
    parts = [take_step(tiny_models, [r], torch.float64, prompts_per_step=1) for r in rollouts]
    means = [
        torch.stack([part.gradients[i] for part in parts]).mean(0)
        for i in range(len(whole.gradients))
    ]
    assert distance(means, whole.gradients) > 1e-2


@pytest.mark.parametrize("rule", DETERMINISTIC)
def test_the_order_of_rollouts_changes_nothing(
    tiny_models: Path, rollouts: list[Rollout], rule: str
) -> None:
    order = [5, 0, 7, 2, 1, 6, 3, 4]
    plain = take_step(tiny_models, rollouts, torch.float64, selection=RULES[rule])
    moved = take_step(
        tiny_models, [rollouts[i] for i in order], torch.float64, selection=RULES[rule]
    )
    assert {(order[c], t) for c, t in moved.kept} == plain.kept
    assert distance(moved.gradients, plain.gradients) <= 1e-12


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_its_side_change_nothing(
    tiny_models: Path, rollouts: list[Rollout], side: Side
) -> None:
    """Statistics and gradients of a padded batch are those of each rollout on its own."""
    taken = take_step(tiny_models, rollouts, torch.float64)
    components = taken.components
    assert components is not None
    padded = learn(components, [collate(rollouts, 0, side)])
    alone = learn(components, [collate([r], 0) for r in rollouts])
    torch.testing.assert_close(padded[0], alone[0], rtol=1e-11, atol=1e-12)
    assert distance(padded[1], alone[1]) <= 1e-12


def learn(components: Components, batches: list[Batch]) -> tuple[Tensor, list[Tensor]]:
    """Statistics and summed gradients over batches, without the loop around them."""
    components.student.zero_grad()
    tables = []
    for batch in batches:
        view: LazyLogits = components.teacher.forward(batch)
        stats = components.student(batch, view)
        assert isinstance(stats, TokenStats)
        tables.append(stats.stack())
        objective = components.student(batch, view, torch.arange(batch.num_rows))
        assert isinstance(objective, Objective)
        objective.total.backward()
    gradients = [p.grad.clone() for p in components.student.parameters() if p.grad is not None]
    return torch.cat(tables, 1), gradients


def test_another_rollout_or_a_shifted_mask_would_be_seen(
    tiny_models: Path, rollouts: list[Rollout]
) -> None:
    """Negative control: moving one token from completion to prompt changes the gradient."""
    first = rollouts[1]
    shifted = Rollout(
        first.prompt,
        first.sample,
        (*first.prompt_ids, first.completion_ids[0]),
        first.completion_ids[1:],
    )
    plain = take_step(tiny_models, rollouts, torch.float64)
    moved = take_step(tiny_models, [rollouts[0], shifted, *rollouts[2:]], torch.float64)
    assert moved.metrics["num_rows"] == plain.metrics["num_rows"] - 1
    assert distance(moved.gradients, plain.gradients) > 1e-3


def test_a_tied_student_and_an_offloaded_teacher_give_the_plain_gradient(
    tmp_path: Path,
    tiny_models: Path,
    rollouts: list[Rollout],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tiny import save_tiny_model

    # As on an accelerator; on a CPU the teacher would be read again, in float32.
    monkeypatch.setattr("tutelage.setup.teacher._mode_at_rest", lambda config, _: config.mode)

    tied = save_tiny_model(tmp_path / "tied", seed=3, is_tied=True)
    teacher = {"model": str(tiny_models / "teacher"), "mode": "offload"}
    found = take_step(
        tiny_models, rollouts, torch.float64, student={"model": str(tied)}, teacher=teacher
    )
    assert found.components is not None
    expected = plain_step(found.components, rollouts, "all")
    assert distance(found.gradients, expected.gradients) <= 1e-11
