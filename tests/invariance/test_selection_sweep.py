"""A thousand random batches under every rule: exact counts, no leak, nothing that cutting changes.

The rows of each batch are read twice: directly, and from padded micro-batches on either side, with
the completions in another order and their statistics put together afterwards. Both ways must keep
the very same tokens.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import reference
from tutelage.core import (
    EXTRAS,
    NORMALIZATIONS,
    RULES,
    LazyLogits,
    TokenSelection,
    TokenStats,
    counter_uniform,
    select_tokens,
    token_stats,
)
from tutelage.data.batch import Side, collate
from tutelage.data.types import Prompt, Rollout

NUM_BATCHES = 1000
VOCAB = 7
EYE = torch.eye(VOCAB, dtype=torch.float64)
KEEPS = ("0.5", "0.2", "0.1", "0.29", "1.0", "0.03")
PAD, PROMPT = 0, 999_999
OUTSIDE = 1e3
"""Size of the logits outside of the completions: one of them read by mistake would be seen."""


@dataclass(frozen=True)
class Rows:
    """Statistics of rows and the (completion, position) that names each of them."""

    stats: TokenStats
    completion: Tensor
    position: Tensor


@dataclass(frozen=True)
class Case:
    """One random batch, how to select from it, and its rows read in two ways."""

    lengths: list[int]
    keep: str
    scope: str
    normalization: str
    has_ties: bool
    direct: Rows
    cut: Rows
    cut_in_order: Rows
    """Like `cut`, but with the completions in their first order."""

    def select(self, rule: str, rows: Rows) -> TokenSelection:
        return select_tokens(
            rows.stats,
            rows.completion,
            rule,
            float(self.keep),
            self.scope,
            self.normalization,
            counter_uniform((3,), rows.completion, rows.position),
            rows.position,
        )

    def kept(self, rule: str, rows: Rows) -> list[tuple[int, int]]:
        """Names of the kept rows, as many as there are."""
        pairs = torch.stack([rows.completion, rows.position])[:, self.select(rule, rows).rows]
        return [(int(c), int(t)) for c, t in pairs.t().tolist()]

    def depends_on_order(self, rule: str) -> bool:
        """Equal scores within one budget go to the earlier row, so to the earlier completion."""
        scores = self.select(rule, self.direct).importance
        return self.scope == "batch" and len(scores.unique()) < len(scores)


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 12) for _ in range(rng.randint(1, 6))]
    logits = 2 * torch.randn(
        2, sum(lengths), VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    has_ties = rng.random() < 0.2
    if has_ties:
        logits[:, : sum(lengths) // 2] = logits[:, :1].clone()
    order = rng.sample(range(len(lengths)), len(lengths))
    sides: tuple[Side, Side] = ("left", "right")
    side, size = rng.choice(sides), rng.randint(1, len(lengths))
    return Case(
        lengths,
        rng.choice(KEEPS),
        rng.choice(["completion", "batch"]),
        rng.choice(NORMALIZATIONS),
        has_ties,
        read_directly(logits, lengths),
        read_in_pieces(logits, lengths, order, side, size),
        read_in_pieces(logits, lengths, sorted(order), side, size),
    )


def read_directly(logits: Tensor, lengths: list[int]) -> Rows:
    completion = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.cat([torch.arange(m) for m in lengths])
    return Rows(statistics(logits, position % VOCAB), completion, position)


def statistics(logits: Tensor, tokens: Tensor) -> TokenStats:
    student, teacher = (LazyLogits(z, EYE) for z in logits)
    return token_stats(student, teacher, tokens, extras=tuple(EXTRAS))


def read_in_pieces(
    logits: Tensor, lengths: list[int], order: list[int], side: Side, size: int
) -> Rows:
    """The same rows from padded micro-batches of `size` completions, in the given order.

    Ids name rows: 1 + the row's index among all rows.
    """
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    prompt, parts = Prompt("p", "x"), []
    for first in range(0, len(order), size):
        here = order[first : first + size]
        batch = collate(
            [
                Rollout(
                    prompt,
                    0,
                    (PROMPT,) * (1 + i % 3),
                    tuple(range(starts[i] + 1, starts[i] + 1 + lengths[i])),
                )
                for i in here
            ],
            PAD,
            side,
        )
        following = batch.input_ids.roll(-1, 1)
        is_predictor = (following > PAD) & (following < PROMPT)
        is_predictor[:, -1] = False
        padded = torch.full((2, *following.shape, VOCAB), OUTSIDE, dtype=torch.float64)
        padded[0, ..., 0] = -OUTSIDE
        padded[:, is_predictor] = logits[:, following[is_predictor] - 1]
        rows = torch.stack([batch.flatten(z) for z in padded])
        stats = statistics(rows, batch.position % VOCAB)
        parts.append(Rows(stats, torch.tensor(here)[batch.completion], batch.position))
    return Rows(
        TokenStats.cat([part.stats for part in parts]),
        torch.cat([part.completion for part in parts]),
        torch.cat([part.position for part in parts]),
    )


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [random_case(seed) for seed in range(NUM_BATCHES)]


@pytest.mark.parametrize("rule", RULES)
def test_counts_are_exact_and_cutting_changes_nothing(cases: list[Case], rule: str) -> None:
    violations = []
    for number, case in enumerate(cases):
        kept = case.kept(rule, case.direct)
        again = case.kept(rule, case.cut_in_order if case.depends_on_order(rule) else case.cut)
        sizes = case.lengths if case.scope == "completion" else [sum(case.lengths)]
        share = "1.0" if rule == "all" else case.keep
        counts = Counter(c if case.scope == "completion" else 0 for c, _ in kept)
        is_exact = [counts[i] for i in range(len(sizes))] == [
            reference.budget(share, m) for m in sizes
        ]
        is_within = all(0 <= t < case.lengths[c] for c, t in [*kept, *again])
        is_unique = len(set(kept)) == len(kept) == len(again)
        if not (is_exact and is_within and is_unique and set(kept) == set(again)):
            violations.append(number)
    assert violations == []


def test_the_sweep_covers_what_it_claims(cases: list[Case]) -> None:
    assert sum(case.has_ties for case in cases) > 100
    assert {case.scope for case in cases} == {"completion", "batch"}
    assert {case.keep for case in cases} == set(KEEPS)
    assert {case.normalization for case in cases} == set(NORMALIZATIONS)
    assert any(1 in case.lengths for case in cases)
    assert any(case.direct.completion.tolist() != case.cut.completion.tolist() for case in cases)


def test_statistics_of_each_micro_batch_by_itself_would_be_seen(cases: list[Case]) -> None:
    """Negative control: Soft-OR normalised per completion keeps other rows in many batches."""
    different = 0
    for case in cases[:200]:
        if case.scope == "batch":
            continue
        whole, rows, alone = set(case.kept("soft_or", case.direct)), case.direct, set()
        for i in range(len(case.lengths)):
            own = (rows.completion == i).nonzero().squeeze(1)
            part = Rows(rows.stats[own], rows.completion[own], rows.position[own])
            alone |= set(case.kept("soft_or", part))
        different += whole != alone
    assert different > 20


def test_rows_from_outside_of_the_completions_would_be_seen() -> None:
    """Negative control: what surrounds the completions is far from anything inside."""
    logits = torch.full((2, 1, VOCAB), OUTSIDE, dtype=torch.float64)
    logits[0, ..., 0] = -OUTSIDE
    assert float(statistics(logits, torch.tensor([0])).log_p[0]) < -OUTSIDE
