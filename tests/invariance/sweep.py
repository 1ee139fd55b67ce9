"""Random batches and how to read them: one rank of the sweep over selection rules.

Usage: sweep.py NUM_BATCHES OUT; the usual environment variables name rank, world size and master.

The rows of each batch are read twice, in float32 as in training: directly, and shared out over the
ranks, from padded micro-batches on either side with the completions in any order, gathered as a
training step gathers them. Both ways must score and keep the very same tokens.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import TypeAdapter
from torch import Tensor

import reference
from ranks import process_group
from tutelage.config.parse import parse_config
from tutelage.config.schema import Config
from tutelage.config.selection import SelectionConfig
from tutelage.core import (
    EXTRAS,
    NORMALIZATIONS,
    RULES,
    LazyLogits,
    TokenSelection,
    TokenStats,
    token_stats,
)
from tutelage.data.batch import Batch, Side, collate
from tutelage.data.types import Prompt, Rollout
from tutelage.train.distributed import Ranks, StepRows
from tutelage.train.selection import choose

NUM_RANKS = 2
VOCAB = 7
EYE = torch.eye(VOCAB)
KEEPS = ("0.5", "0.2", "0.1", "0.29", "1.0", "0.03")
PAD, PROMPT = 0, 999_999
OUTSIDE = 1e3
"""Size of the logits outside of the completions: one of them read by mistake would be seen."""
CONTROLS = 40
"""Batches on which each fault is tried."""
_SELECTION: TypeAdapter[Any] = TypeAdapter(SelectionConfig)
_CONFIG = parse_config({"student": {"model": "s"}, "teacher": {"model": "t"}})


@dataclass(frozen=True)
class Case:
    """One random batch and how to select from it."""

    lengths: list[int]
    rank: list[int]
    """The rank that each completion belongs to."""
    logits: Tensor
    """Of student and teacher `[2, N, V]`."""
    bad: frozenset[int]
    """Rows whose logits are not numbers."""
    certain: frozenset[int]
    """Rows whose student rules out what the teacher says: an infinite oracle weight."""
    keep: str
    scope: str
    normalization: str
    has_ties: bool
    seed: int

    @property
    def names(self) -> list[tuple[int, int]]:
        """(completion, position) of every row."""
        return [(c, t) for c, m in enumerate(self.lengths) for t in range(m)]

    def config(self, rule: str) -> Config:
        """A run with this selection."""
        options: dict[str, Any] = {"keep": float(self.keep), "scope": self.scope}
        if rule in ("all", "first_n"):
            options = {"num_tokens": 1 + self.seed % 5} if rule == "first_n" else {}
        elif rule not in ("random", "probability_gap", "extreme_advantage"):
            options["normalization"] = self.normalization
        return replace(_CONFIG, selection=_SELECTION.validate_python({"rule": rule, **options}))

    def counts(self, rule: str) -> list[int]:
        """Rows to keep of each completion, or of all: the budget, while usable rows last."""
        unusable = self.bad | (self.certain if rule == "local_oracle" else frozenset())
        is_whole = self.scope == "batch" and rule not in ("all", "first_n")
        groups = Counter(0 if is_whole else c for c, _ in self.names)
        left = Counter(0 if is_whole else c for i, (c, _) in enumerate(self.names) if i in unusable)
        budgets = {"all": lambda m: m, "first_n": lambda m: 1 + self.seed % 5}
        ends = 2 if rule == "extreme_advantage" else 1
        budget = budgets.get(rule, lambda m: ends * reference.budget(self.keep, m))
        return [min(budget(m), m - left[g]) for g, m in sorted(groups.items())]


def random_case(seed: int) -> Case:
    """1 to 6 completions of 1 to 12 tokens; one in five has ties, one in three bad rows."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, 12) for _ in range(rng.randint(1, 6))]
    size = sum(lengths)
    logits = 2 * torch.randn(2, size, VOCAB, generator=torch.Generator().manual_seed(seed))
    has_ties = rng.random() < 0.2
    if has_ties:
        logits[:, : size // 2] = logits[:, :1].clone()
    bad, certain = frozenset[int](), frozenset[int]()
    if rng.random() < 0.33:
        rows = rng.sample(range(size), rng.randint(1, size))
        bad, certain = frozenset(rows[::2]), frozenset(rows[1::2])
    for row in bad:
        value = rng.choice([torch.nan, torch.inf, -torch.inf])
        logits[rng.randint(0, 1), row, rng.randrange(VOCAB)] = value
    for row in certain:
        logits[0, row, rng.randrange(VOCAB)] = 2000.0
    # Any share: a rank may have no completion at all.
    shares = [rng.randrange(NUM_RANKS) for _ in lengths]
    options = rng.choice(KEEPS), rng.choice(["completion", "batch"]), rng.choice(NORMALIZATIONS)
    return Case(lengths, shares, logits, bad, certain, *options, has_ties, seed)


def statistics(logits: Tensor, tokens: Tensor) -> TokenStats:
    """All statistics of rows of logits."""
    student, teacher = (LazyLogits(z, EYE) for z in logits)
    return token_stats(student, teacher, tokens, extras=tuple(EXTRAS))


def read_directly(case: Case) -> StepRows:
    """What one process without padding knows."""
    names = torch.tensor(case.names)
    stats = statistics(case.logits, names[:, 1] % VOCAB)
    # A step's table is float64 whatever the statistics are computed in.
    table = TokenStats.unstack(stats.stack(), tuple(EXTRAS))
    return StepRows(table, names[:, 0], names[:, 1], torch.arange(len(names)), names[:, 1])


def read_share(case: Case, rank: int) -> tuple[list[Batch], TokenStats]:
    """One rank's completions in any order, from padded micro-batches of any size.

    Ids name rows: 1 + the row's index among all rows.
    """
    rng = random.Random(case.seed * NUM_RANKS + rank)
    mine = [c for c, r in enumerate(case.rank) if r == rank]
    order = rng.sample(mine, len(mine))
    size = rng.randint(1, max(len(order), 1))
    sides: tuple[Side, Side] = ("left", "right")
    parts = [order[i : i + size] for i in range(0, len(order), size)] or [[]]
    batches = [collate([rollout(case, c) for c in p], PAD, rng.choice(sides), p) for p in parts]
    return batches, TokenStats.cat([read_padded(case, batch) for batch in batches])


def rollout(case: Case, completion: int) -> Rollout:
    """The prompt is 1 to 3 tokens long."""
    start = sum(case.lengths[:completion])
    ids = tuple(range(start + 1, start + 1 + case.lengths[completion]))
    return Rollout(Prompt("p", "x"), 0, (PROMPT,) * (1 + completion % 3), ids)


def read_padded(case: Case, batch: Batch) -> TokenStats:
    """Statistics of a rectangle whose other places are far from anything inside."""
    following = batch.input_ids.roll(-1, 1)
    is_predictor = (following > PAD) & (following < PROMPT)
    is_predictor[:, -1:] = False
    padded = torch.full((2, *following.shape, VOCAB), OUTSIDE)
    padded[0, ..., 0] = -OUTSIDE
    padded[:, is_predictor] = case.logits[:, following[is_predictor] - 1]
    rows = torch.stack([batch.flatten(z) for z in padded])
    return statistics(rows, batch.position % VOCAB)


# --- faults, to show that they would be seen ------------------------------------------------------

Shared = tuple[list[Batch], TokenStats]
Chooser = Callable[[Config, StepRows, int], TokenSelection]


def leak_a_row(case: Case, shared: Shared) -> Shared:
    """One row of the prompt or of padding counts as the last one of its completion."""
    batches, stats = shared
    last = batches[-1]
    if not last.num_rows:
        return shared
    more = replace(
        last,
        tokens=torch.cat([last.tokens, last.tokens[-1:]]),
        completion=torch.cat([last.completion, last.completion[-1:]]),
        position=torch.cat([last.position, last.position[-1:] + 1]),
    )
    outside = torch.full((2, 1, VOCAB), OUTSIDE)
    outside[0, ..., 0] = -OUTSIDE
    leaked = TokenStats.cat([stats, statistics(outside, torch.zeros(1).long())])
    return [*batches[:-1], more], leaked


def shift_order(case: Case, shared: Shared) -> Shared:
    """Statistics are those of the row before."""
    batches, stats = shared
    return batches, TokenStats.unstack(stats.stack().roll(1, 1), tuple(EXTRAS))


def choose_per_rank(case: Case) -> Chooser:
    """Each rank normalises and chooses among its own rows, the budgets being the same."""

    def chosen(config: Config, gathered: StepRows, step: int) -> TokenSelection:
        rank = torch.tensor(case.rank)[gathered.completion]
        scores, kept = torch.zeros(len(rank), dtype=torch.float64), []
        for r in range(NUM_RANKS):
            own = (rank == r).nonzero().squeeze(1)
            part = StepRows(
                gathered.stats[own],
                gathered.completion[own],
                gathered.position[own],
                own,
                gathered.tokens[own],
            )
            found = choose(config, part, step)
            scores[own] = found.importance
            kept.append(own[found.rows])
        rows = torch.cat(kept).sort().values
        return TokenSelection(rows, scores, 0, torch.ones(len(rows), dtype=torch.float64))

    return chosen


FAULTS = ("none", "leak", "shift", "per_rank")


# --- the sweep ------------------------------------------------------------------------------------


@dataclass
class Report:
    """What one rank saw: violations by kind, of all pairs of batch and rule."""

    fault: str
    violations: list[tuple[int, str, str]]
    """Batch, rule and kind."""
    digests: list[str]
    """Of every gathered table: all ranks must know the same."""


def sweep(fault: str, ranks: Ranks, num_batches: int) -> Report:
    """Every rule on every batch; of two ranks each judges half of the pairs."""
    report = Report(fault, [], [])
    for number in range(num_batches):
        case = random_case(number)
        shared = read_share(case, ranks.index)
        shared = {"leak": leak_a_row, "shift": shift_order}.get(fault, lambda _, x: x)(case, shared)
        gathered = ranks.rows(*shared)
        digest = hashlib.sha256(gathered.stats.stack().numpy().tobytes())
        digest.update(torch.stack([gathered.completion, gathered.position]).numpy().tobytes())
        report.digests.append(digest.hexdigest()[:16])
        chooser = choose_per_rank(case) if fault == "per_rank" else choose
        direct = read_directly(case)
        kinds = {("*", kind) for kind in wrong_rows(case, gathered, shared)}
        for i, rule in enumerate(RULES):
            if (number + i) % ranks.count == ranks.index:
                kinds |= {(rule, k) for k in wrong_choice(case, rule, chooser, gathered, direct)}
        report.violations += [(number, *kind) for kind in sorted(kinds)]
    return report


def wrong_rows(case: Case, gathered: StepRows, shared: Shared) -> Iterator[str]:
    """What is wrong with the gathered rows themselves."""
    batches, stats = shared
    pairs = torch.stack([gathered.completion, gathered.position], 1).tolist()
    if [tuple(pair) for pair in pairs] != case.names:
        yield "rows"
    own = torch.cat([torch.stack([b.completion, b.position], 1) for b in batches]).tolist()
    mine = same(gathered.stats.stack()[:, gathered.local], stats.stack())
    if [pairs[i] for i in gathered.local.tolist()] != own or not mine:
        yield "here"


def wrong_choice(
    case: Case, rule: str, chooser: Chooser, gathered: StepRows, direct: StepRows
) -> Iterator[str]:
    """What is wrong with a rule's choice among the gathered rows."""
    config = case.config(rule)
    found, expected = chooser(config, gathered, case.seed), choose(config, direct, case.seed)
    if not same(found.importance, expected.importance):
        yield "importance"
    if found.rows.tolist() != expected.rows.tolist():
        yield "kept"
    counts = case.counts(rule)
    # `choose` is judged by plain counting, not by itself.
    names = [case.names[row] for row in expected.rows.tolist()]
    kept = Counter(c if len(counts) == len(case.lengths) else 0 for c, _ in names)
    if [kept[g] for g in range(len(counts))] != counts or len(set(names)) != len(names):
        yield "count"
    if not case.bad.isdisjoint(expected.rows.tolist()):
        yield "bad"


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN being NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def main(num_batches: int, out: Path) -> None:
    torch.set_num_threads(1)
    with process_group():
        ranks = Ranks(Accelerator(cpu=True))
        reports = [sweep(f, ranks, num_batches if f == "none" else CONTROLS) for f in FAULTS]
        text = json.dumps([report.__dict__ for report in reports])
        (out / f"rank{ranks.index}.json").write_text(text)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
