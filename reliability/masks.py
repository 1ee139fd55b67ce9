"""Bump one logit: the loss may move only where a kept completion token is predicted.

Ragged rollouts are padded on either side, with a padding id that is also the end of a text, cut to
rows, scored, selected and summed. One logit of one position of the rectangle is then changed. Which
positions count is known from the rollouts alone, by loops over plain lists.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tutelage.core import (
    LazyLogits,
    TokenStats,
    composite_objective,
    select_tokens,
    token_stats,
)
from tutelage.core.terms import ForwardKL, ReverseKL
from tutelage.data.batch import Batch, Side, collate
from tutelage.data.types import Prompt, Rollout

from .record import Outcome

VOCAB = 7
PAD = 2
"""Also an ordinary id: an end of text, say."""
RULES = ("soft_or", "q3", "divergence", "entropy")
BUMPS = 4
"""Positions tried in each batch."""
Cut = Callable[[Batch], Batch]


@dataclass(frozen=True)
class Case:
    """A padded batch, which rows are kept, and what each place of the rectangle is."""

    batch: Batch
    logits: Tensor
    """Of student and teacher, `[2, B, T, V]`."""
    rule: str
    keep: float
    predicted: dict[tuple[int, int], tuple[int, int]]
    """(sequence, place) of every predicting position: the (completion, position) it predicts."""


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    rollouts = []
    for i in range(rng.randint(1, 4)):
        lengths = rng.randint(1, 5), rng.randint(0 if i else 1, 6)
        prompt, completion = (tuple(rng.randrange(VOCAB) for _ in range(n)) for n in lengths)
        rollouts.append(Rollout(Prompt("p", "x"), 0, prompt, completion))
    sides: tuple[Side, Side] = ("left", "right")
    side = rng.choice(sides)
    width = max(len(r.prompt_ids) + len(r.completion_ids) for r in rollouts)
    predicted = {}
    for b, r in enumerate(rollouts):
        offset = width - len(r.prompt_ids) - len(r.completion_ids) if side == "left" else 0
        for t in range(len(r.completion_ids)):
            predicted[b, offset + len(r.prompt_ids) + t - 1] = (b, t)
    generator = torch.Generator().manual_seed(seed)
    shape = (2, len(rollouts), width, VOCAB)
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    batch = collate(rollouts, PAD, side)
    return Case(batch, logits, rng.choice(RULES), rng.choice([0.3, 0.6, 1.0]), predicted)


def sides_of(batch: Batch, logits: Tensor) -> tuple[LazyLogits, LazyLogits]:
    eye = torch.eye(VOCAB, dtype=torch.float64)
    student, teacher = (LazyLogits(batch.flatten(z), eye) for z in logits)
    return student, teacher


def read(case: Case, batch: Batch, logits: Tensor) -> tuple[TokenStats, Tensor]:
    """Statistics of all rows, and the rows that the rule keeps."""
    stats = token_stats(*sides_of(batch, logits), batch.tokens)
    return stats, select_tokens(stats, batch.completion, case.rule, case.keep).rows


def loss(batch: Batch, logits: Tensor, rows: Tensor) -> Tensor:
    """Sum over the given rows."""
    student, teacher = sides_of(batch, logits)
    terms = [(ReverseKL(), 0.7), (ForwardKL(), 0.3)]
    return composite_objective(student[rows], teacher[rows], terms).total


def wrong_moves(case: Case, seed: int, cut: Cut = lambda batch: batch) -> list[str]:
    """Every bump after which something moved that should not, or did not that should.

    `cut` may damage the batch, to show that damage is seen.
    """
    batch, rng, found = cut(case.batch), random.Random(seed), []
    stats, rows = read(case, batch, case.logits)
    pairs = torch.stack([batch.completion, batch.position], 1)[rows].tolist()
    # What is kept is the rule's business, unless it is everything.
    kept = set(case.predicted.values()) if case.keep == 1.0 else {tuple(pair) for pair in pairs}
    before = loss(batch, case.logits, rows)
    leaf = case.logits.clone().requires_grad_(True)
    loss(batch, leaf, rows).backward()
    places = [(b, t) for b in range(leaf.shape[1]) for t in range(leaf.shape[2])]
    for b, t in rng.sample(places, min(BUMPS, len(places))):
        moved = case.logits.clone()
        moved[rng.randrange(2), b, t, rng.randrange(VOCAB)] += 1.0
        name = case.predicted.get((b, t))
        change = abs(float(loss(batch, moved, rows) - before))
        if (change > 1e-9) != (name in kept) or (name not in kept and change > 0):
            found.append("loss")
        if name is None:
            again, chosen = read(case, batch, moved)
            if not torch.equal(again.stack(), stats.stack()) or not torch.equal(chosen, rows):
                found.append("scores")
    assert leaf.grad is not None
    has_gradient = {(b, t) for b, t in places if bool((leaf.grad[0, b, t] != 0).any())}
    if has_gradient != {place for place, name in case.predicted.items() if name in kept}:
        found.append("gradient")
    if bool((leaf.grad[1] != 0).any()):
        found.append("teacher")
    names = zip(batch.completion.tolist(), batch.position.tolist(), strict=True)
    if sorted(names) != sorted(case.predicted.values()):
        found.append("rows")
    return found


# --- damage that has to be seen -------------------------------------------------------------------


def shifted(batch: Batch) -> Batch:
    """Rows are read one position late, as when labels are not shifted."""
    last = batch.input_ids.numel() - 1
    return replace(batch, row_index=(batch.row_index + 1).clamp(max=last))


def masked_by_id(batch: Batch) -> Batch:
    """Completion tokens that equal the padding id are dropped."""
    keep = batch.tokens != PAD
    names = ("row_index", "tokens", "completion", "position")
    return replace(batch, **{name: batch.__dict__[name][keep] for name in names})


def leaked(batch: Batch) -> Batch:
    """A position outside of the completions counts as one more row of the first."""
    free = set(range(batch.input_ids.numel())) - set(batch.row_index.tolist())
    if not free:
        return batch
    more = {"row_index": min(free), "tokens": 0, "completion": 0, "position": 99}
    return replace(
        batch,
        **{n: torch.cat([batch.__dict__[n], torch.tensor([value])]) for n, value in more.items()},
    )


DAMAGE: dict[str, Cut] = {"shifted": shifted, "masked by id": masked_by_id, "leaked": leaked}


def run(num_batches: int) -> Outcome:
    """Bumps in `num_batches` batches; each kind of damage in a tenth of them."""
    wrong: Counter[str] = Counter()
    seen = dict.fromkeys(DAMAGE, 0)
    for seed in range(num_batches):
        case = random_case(seed)
        wrong.update(set(wrong_moves(case, seed)))
        if seed % 10 == 0:
            for name, cut in DAMAGE.items():
                seen[name] += bool(wrong_moves(case, seed, cut))
    tried = -(-num_batches // 10)
    return Outcome(
        "a logit moves the loss only where it predicts a kept completion token",
        trials=num_batches,
        failures=sum(wrong.values()),
        control={f"{name}, seen in of {tried}": count for name, count in seen.items()},
        details={"wrong": dict(wrong), "bumps_per_batch": BUMPS},
    )
