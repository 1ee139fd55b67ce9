"""Which rows of a step train, how heavily, and what each update is divided by."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tutelage.config.schema import Config
from tutelage.config.selection import (
    AllTokens,
    FirstTokens,
    RandomTokens,
    SampledTokens,
    SelectionConfig,
)
from tutelage.core import TokenSelection, counter_uniform, select_tokens
from tutelage.setup.objective import gate_of, rule_of
from tutelage.train.distributed import Ranks, StepRows
from tutelage.train.micro_batch import MicroBatch

_SELECTION_SEED = 1
"""Keeps the random numbers of selection apart from those of sampling."""
_TRUST_SEED = 7
"""Keeps those that TrOPD draws apart from either."""


@dataclass(frozen=True)
class Selection(StepRows):
    """Every row of a step, and which of them train how heavily."""

    rows: Tensor
    """Selected rows `[K]`, ascending."""
    mask: Tensor
    """`[N]`, True where a row is selected."""
    weights: Tensor
    """Loss weight of every row `[N]`; 0 where it is not selected."""
    gate: Tensor
    """How far the forward KL of every row is switched on `[N]`, of EOPD and TrOPD."""


def selection_of(
    config: Config, rows: StepRows, chosen: TokenSelection, weighting: Tensor, step: int
) -> Selection:
    """Combine what a rule keeps with the weights of the configured weighting `[N]`."""
    weights = torch.zeros_like(weighting)
    weights[chosen.rows] = weighting[chosen.rows] * chosen.weights
    seed = (config.seed, step, _TRUST_SEED)
    uniform = counter_uniform(seed, rows.completion, rows.position)
    gate = gate_of(config.objective, rows.stats, uniform)
    return Selection(**vars(rows), rows=chosen.rows, mask=chosen.mask, weights=weights, gate=gate)


def choose(
    config: Config, rows: StepRows, step: int, stops: Collection[int] = ()
) -> TokenSelection:
    """The rows to train on, of all processes; the same answer in every process.

    Args:
        config: the run.
        rows: of the whole step.
        step: decides what a random rule draws.
        stops: ids that end a text.
    """
    selection = config.selection
    options: dict[str, Any] = {"position": rows.position, **ranking_options(selection)}
    if not isinstance(selection, AllTokens | FirstTokens):
        options["keep"] = selection.keep
    if isinstance(selection, SampledTokens | RandomTokens):
        seed = (config.seed, step, _SELECTION_SEED)
        options["uniform"] = counter_uniform(seed, rows.completion, rows.position)
        options["correct_sampling"] = selection.correct_sampling
    if isinstance(selection, FirstTokens):
        options["num_tokens"] = selection.num_tokens
    options["is_stop"] = is_one_of(rows.tokens, stops)
    return select_tokens(rows.stats, rows.completion, rule_of(selection), **options)


def is_one_of(tokens: Tensor, ids: Collection[int]) -> Tensor:
    """`[N]`, True where a token is one of the ids."""
    return torch.isin(tokens, torch.tensor(sorted(ids), dtype=tokens.dtype, device=tokens.device))


def ranking_options(selection: SelectionConfig) -> dict[str, Any]:
    """Scope and normalization for `select_tokens`; only what the selection names."""
    named = vars(selection)
    return {option: named[option] for option in ("scope", "normalization") if option in named}


def assign(
    config: Config, micro_batches: Sequence[MicroBatch], selection: Selection | None
) -> None:
    """Tell each micro-batch of this process which of its rows train; without selection all do."""
    objective = config.objective
    if selection is None:
        for micro_batch in micro_batches:
            micro_batch.train_on_all(objective)
        return
    sizes = [micro_batch.batch.num_rows for micro_batch in micro_batches]
    places = torch.split(selection.local, sizes)
    masks = [selection.mask[here] for here in places]
    counts: list[int] = torch.stack([mask.sum() for mask in masks]).tolist()  # one host wait
    for micro_batch, here, mask, count in zip(micro_batches, places, masks, counts, strict=True):
        rows = torch.nonzero_static(mask, size=count).squeeze(1)
        here = here[rows]
        weights, gate = selection.weights[here], selection.gate[here]
        micro_batch.train_on(objective, rows, selection.stats[here], weights, gate)


def divisors(
    config: Config,
    updates: Sequence[Sequence[MicroBatch]],
    selection: Selection | None,
    ranks: Ranks,
) -> list[int]:
    """The one number that each update's sums are divided by: its rows in the global batch."""
    num_updates = len(updates)
    if selection is None:
        return [ranks.sum(sum(m.batch.num_rows for m in update)) for update in updates]
    num_local = sum(m.batch.num_sequences for update in updates for m in update)
    completions_per_update = num_local * ranks.count // num_updates
    method, completion = config.selection, selection.completion
    # Weights 1/π already estimate the sum over all rows.
    is_corrected = isinstance(method, SampledTokens | RandomTokens) and method.correct_sampling
    if config.renormalize and not is_corrected:
        completion = completion[selection.rows]
    counts = completion.new_zeros(num_updates)
    counts.index_add_(0, completion // completions_per_update, torch.ones_like(completion))
    found: list[int] = counts.tolist()
    return found
