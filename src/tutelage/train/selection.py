"""What a step learns from: which rows, how heavily, and divided by what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tutelage.config.method import (
    FirstTokens,
    RandomTokens,
    SampledTokens,
    SelectionConfig,
    SomeTokens,
)
from tutelage.config.schema import Config
from tutelage.core import TokenSelection, counter_uniform, select_tokens
from tutelage.core.terms import SampledReverseKL, Term
from tutelage.data.batch import Batch
from tutelage.setup.objective import Guidance, guidance, guided_terms, plain_terms
from tutelage.train.distributed import Gathered

_SELECTION_SEED = 1
"""Keeps the random numbers of selection apart from those of sampling."""


@dataclass(frozen=True)
class Plan:
    """What a step will learn from, and how heavily."""

    gathered: Gathered
    chosen: TokenSelection
    weights: Tensor
    """Loss weight of every row `[N]`."""
    gate: Tensor
    """EOPD's gate of every row `[N]`."""


@dataclass(frozen=True)
class Lesson:
    """Rows of one micro-batch to learn from, and the objective's terms with their weights."""

    rows: Tensor
    terms: Sequence[tuple[Term, Tensor | float]]
    guide: Guidance | None = None
    """What the terms were made of, for each row; None if they are the same for all rows."""

    @property
    def num_clipped(self) -> int:
        """Rows of the sampled objective whose clip took effect when they were learned from."""
        clipped = (term.is_clipped for term, _ in self.terms if isinstance(term, SampledReverseKL))
        return sum(int(rows.sum()) for rows in clipped)


def choose(config: Config, gathered: Gathered, step: int) -> TokenSelection:
    """The rows to train on, of all processes; the same answer in every process."""
    selection = config.selection
    options: dict[str, Any] = {"position": gathered.position, **reading(selection)}
    if isinstance(selection, SomeTokens | SampledTokens | RandomTokens):
        options["keep"] = selection.keep
    if isinstance(selection, SampledTokens | RandomTokens):
        seed = (config.seed, step, _SELECTION_SEED)
        options["uniform"] = counter_uniform(seed, gathered.completion, gathered.position)
        options["correct_sampling"] = selection.correct_sampling
    if isinstance(selection, FirstTokens):
        options["num_tokens"] = selection.num_tokens
    return select_tokens(gathered.stats, gathered.completion, selection.rule, **options)


def reading(selection: SelectionConfig) -> dict[str, Any]:
    """Scope and normalization as `select_tokens` takes them; only what the selection names."""
    named = vars(selection)
    return {option: named[option] for option in ("scope", "normalization") if option in named}


def lessons_of(config: Config, batches: Sequence[Batch], plan: Plan | None) -> list[Lesson]:
    """What each micro-batch of this process learns from: all rows where there is no plan."""
    if plan is None:
        terms = plain_terms(config.objective)
        return [Lesson(torch.arange(b.num_rows, device=b.tokens.device), terms) for b in batches]
    weights = torch.zeros_like(plan.weights)
    weights[plan.chosen.rows] = plan.weights[plan.chosen.rows] * plan.chosen.weights
    places = torch.split(plan.gathered.here, [batch.num_rows for batch in batches])
    kept = [plan.chosen.mask[here] for here in places]
    counts: list[int] = torch.stack(
        [mask.sum() for mask in kept]
    ).tolist()  # one look at the device
    lessons = []
    for batch, here, mask, count in zip(batches, places, kept, counts, strict=True):
        rows = torch.nonzero_static(mask, size=count).squeeze(1)
        guide = guidance(plan.gathered.stats[here], batch.tokens, weights[here], plan.gate[here])
        guide = guide[rows]
        lessons.append(Lesson(rows, guided_terms(config.objective, guide), guide))
    return lessons


def divisors(config: Config, plan: Plan, completions_per_update: int) -> list[int]:
    """The one number that each update's sums are divided by: its rows in the global batch."""
    selection, completion = config.selection, plan.gathered.completion
    # Weights 1/π already estimate the sum over all rows.
    is_corrected = isinstance(selection, SampledTokens | RandomTokens) and (
        selection.correct_sampling
    )
    if config.renormalize and not is_corrected:
        completion = completion[plan.chosen.rows]
    counts = completion.new_zeros(config.updates_per_step)
    counts.index_add_(0, completion // completions_per_update, torch.ones_like(completion))
    found: list[int] = counts.tolist()
    return found
