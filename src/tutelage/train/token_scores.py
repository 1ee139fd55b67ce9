"""`tutelage score`: statistics of every token of completions, without training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tutelage.config.schema import Config
from tutelage.config.teachers import NEED_ALL_IDS, LogprobServerTeacher
from tutelage.core import (
    RULES,
    PartialLogits,
    TeacherLogits,
    TokenSelection,
    TokenStats,
    counter_uniform,
    quadrant_table,
    quadrants,
    select_tokens,
)
from tutelage.core.rules import Rule
from tutelage.data.batch import micro_batches, without_rows
from tutelage.data.types import Rollout
from tutelage.errors import ConfigError, ModelError
from tutelage.models.privileged import read_beside
from tutelage.models.tokenizers import pad_id
from tutelage.rollout.replica_sampler import ReplicaSampler
from tutelage.setup.components import Components, build_components
from tutelage.setup.inputs import is_aligned
from tutelage.setup.numerics import plain_arithmetic
from tutelage.setup.objective import culprit, rule_of
from tutelage.setup.phases import PhaseCallback, counting, no_log, no_phases
from tutelage.setup.shares import ALONE, Shares
from tutelage.setup.validate import refuse_engine
from tutelage.train.score_request import ScoreRequest, rollouts_of
from tutelage.train.selection import is_one_of, ranking_options

UNKNOWN_ID = -1
"""Stands for an id that a teacher does not tell."""


@dataclass(frozen=True)
class Top:
    """The k likeliest ids of every row, most likely first, and their probabilities `[N, k]`."""

    student_ids: Tensor
    student: Tensor
    teacher_ids: Tensor
    teacher: Tensor


@dataclass(frozen=True)
class Scores:
    """Every token of some completions, in their order."""

    rollouts: list[Rollout]
    stats: TokenStats
    quadrant: Tensor
    """`[N]`, 1 to 4; 0 where a statistic is not finite."""
    selections: dict[str, TokenSelection]
    """What each rule would keep."""
    vocab_size: int
    tokens: list[str]
    """Text of each token `[N]`."""
    thresholds: str | tuple[float, float]
    top: Top | None = None
    """The likeliest tokens of both sides, if they were asked for."""

    def rows(self) -> Iterator[dict[str, Any]]:
        """One plain record a token."""
        columns = {
            "entropy_nats": self.stats.entropy,
            "normalized_entropy": self.stats.entropy / math.log(self.vocab_size),
            "reverse_kl_nats": self.stats.reverse_kl,
            "forward_kl_nats": self.stats.forward_kl,
            "teacher_entropy_nats": self.stats.teacher_entropy,
            "quadrant": self.quadrant,
        }
        for rule, selection in self.selections.items():
            columns[f"importance.{rule}"] = selection.importance
            columns[f"kept.{rule}"] = selection.mask
        values = zip(*(column.tolist() for column in columns.values()), strict=True)
        for place, text, row in zip(self._places(), self.tokens, values, strict=True):
            numbers = {n: _finite(x) for n, x in zip(columns, row, strict=True)}
            numbers["quadrant"] = numbers["quadrant"] or None
            yield {**place, "token": text, **numbers}

    def _places(self) -> Iterator[dict[str, Any]]:
        for rollout in self.rollouts:
            place = {"prompt_id": rollout.prompt.id, "sample": rollout.sample}
            for position, token in enumerate(rollout.generated_ids):
                yield {**place, "position": position, "token_id": token}

    def table(self) -> str:
        """Quadrants: share of tokens and of divergence, and the share that each rule keeps.

        Tokens with a non-finite statistic are in no quadrant; a last line counts them.
        """
        here = self.quadrant > 0
        quadrant, divergence = self.quadrant[here], self.stats.reverse_kl[here]
        masks = {rule: s.mask[here] for rule, s in self.selections.items()}
        tables = {
            rule: quadrant_table(quadrant, divergence, mask)
            for rule, mask in (masks or {"all": torch.ones_like(quadrant).bool()}).items()
        }
        first = next(iter(tables.values()))
        cut = "medians"
        if not isinstance(self.thresholds, str):
            cut = f"{self.thresholds[0]} and {self.thresholds[1]} nats"
        heads = "".join(f"  {rule:>12}" for rule in self.selections)
        kept = f"   kept by:{heads}" if self.selections else ""
        lines = [f"quadrant  tokens  KL mass{kept}   (cuts: {cut})"]
        for name, row in first.items():
            line = f"{name.upper():8}  {row['share']:6.1%}  {row['kl_mass']:7.1%}"
            if self.selections:
                line += " " * 11
                line += "".join(f"  {t[name]['kept_share']:12.1%}" for t in tables.values())
            lines.append(line)
        return "\n".join([*lines, *self._left_out()])

    def _left_out(self) -> Iterator[str]:
        """Who is missing from the table or could not be kept, and why."""
        total, num_bad = len(self.quadrant), int((self.quadrant == 0).sum())
        if num_bad:
            yield f"{num_bad} of {total} tokens have a statistic that is not finite: in no quadrant"
        for rule, selection in self.selections.items():
            if num := selection.num_nonfinite:
                yield f"{num} of {total} tokens have no finite score under {rule}: never kept"


@plain_arithmetic()
def score(
    config: Config,
    request: ScoreRequest,
    on_phase: PhaseCallback = no_phases,
    log: Callable[[str], None] = no_log,
    shares: Shares = ALONE,
) -> Scores:
    """Score the student's own completions of held-out prompts, or given ones.

    Args:
        config: names student, teacher, data and sampling.
        request: which completions, and which rules to report.
        on_phase: told what is being done.
        log: receives a line for what was left out of the prompts' records.
        shares: the processes that sample and score the completions together.

    Returns:
        Every token in the main process, and none in the others.

    Raises:
        TutelageError: models, data or request cannot be used.
    """
    refuse_unscored(config, request)
    with (
        loaded_components(config, on_phase, log, shares) as components,
        components.whole() as whole,
    ):
        rollouts = rollouts_of(config, whole, request, on_phase, log, shares)
        return score_rollouts(config, whole, rollouts, request, shares, on_phase)


def refuse_unscored(config: Config, request: ScoreRequest) -> None:
    """Refuses what the teacher does not tell of every token.

    Raises:
        ConfigError: a token has no teacher, or a rule needs ids that are not known of it.
    """
    if is_aligned(config):
        raise ConfigError(
            "tokens cannot be scored with teacher.vocabulary = 'aligned': only some of them have a "
            "teacher. Train, and look at the step's metrics."
        )
    teachers = (config.teacher, *config.teachers.values())
    unknown = [rule for rule in request.rules if rule in NEED_ALL_IDS]
    if unknown and any(isinstance(teacher, LogprobServerTeacher) for teacher in teachers):
        raise ConfigError(
            f"--rules {unknown[0]} needs every id of the teacher, got teacher.kind = "
            "'logprob_server', which gives the likeliest. Leave it out, or use a local teacher or "
            "a hidden_server."
        )


@contextmanager
def loaded_components(
    config: Config, on_phase: PhaseCallback, log: Callable[[str], None], shares: Shares
) -> Iterator[Components]:
    """Models, tokenizer and task, whose engine the processes share and close in the end."""
    refuse_engine(config, shares.count)
    components = build_components(config, on_phase=on_phase)
    for line in components.teacher.notices:
        log(line)
    try:
        if isinstance(components.sampler, ReplicaSampler):
            components.sampler.replicas.join(shares, log)
        yield components
    finally:
        components.sampler.close()


@dataclass(frozen=True)
class _Scored:
    """One completion and what both models say of its tokens, on the CPU."""

    rollout: Rollout
    table: Tensor
    """Its statistics, as `TokenStats.stack` has them `[6 + E, N]`."""
    top: Top | None


def score_rollouts(
    config: Config,
    components: Components,
    rollouts: Sequence[Rollout] | Mapping[int, Rollout],
    request: ScoreRequest,
    shares: Shares = ALONE,
    on_phase: PhaseCallback = no_phases,
) -> Scores:
    """Score every token of some rollouts with loaded models.

    Args:
        config: names batch sizes, seed and quadrant thresholds.
        components: student and teacher; the student has all weights.
        rollouts: at least one, with at least one token; of several processes, those that this one
            scores by their indices among all.
        request: rules to report, their budget, and how many of the likeliest tokens to return.
        shares: the processes, each of which runs as many forward passes.
        on_phase: told how many forward passes are done.

    Returns:
        All rollouts by their indices in the main process, and none in the others.

    Raises:
        ModelError: no token has finite statistics.
    """
    own = rollouts if isinstance(rollouts, Mapping) else dict(enumerate(rollouts))
    extras = tuple(dict.fromkeys(x for rule in request.rules for x in _rule(config, rule).extras))
    found = _scored(config, components, list(own.values()), request, extras, shares, on_phase)
    scored = shares.collect(dict(zip(own, found, strict=True)))
    if not scored:
        table = torch.zeros(6 + len(extras), 0, dtype=torch.float64)
        nothing = TokenStats.unstack(table, extras)
        size, cuts = components.student.vocab_size, config.quadrant_thresholds
        return Scores([], nothing, torch.zeros(0, dtype=torch.int64), {}, size, [], cuts)
    return _selected(config, components, scored, request, extras)


def _scored(
    config: Config,
    components: Components,
    rollouts: Sequence[Rollout],
    request: ScoreRequest,
    extras: tuple[str, ...],
    shares: Shares,
    on_phase: PhaseCallback,
) -> list[_Scored]:
    """The forward passes of some rollouts, in their order."""
    pad = pad_id(components.tokenizer, components.student.vocab_size)
    limit = config.micro_batch_tokens
    batches = micro_batches(rollouts, config.micro_batch_size, pad, max_tokens=limit)
    blanks = [without_rows(pad)] * (int(shares.max([len(batches)])[0]) - len(batches))
    tables, tops = [], []
    every = [*batches, *blanks]
    passed = counting(on_phase, "scoring: forward passes", len(every))
    with components.teacher.on_device(), torch.no_grad():
        for batch, read in zip(
            every, read_beside(every, rollouts, components.reading, pad), strict=True
        ):
            shares.check()
            here = batch.to(components.device)
            view = components.teacher.forward(read)
            if here.num_rows:
                view = components.teacher.to_device(view)
                logits = components.student.logits(here)
                stats = components.student(here, view, extras=extras, hidden=logits.hidden)
                tables.append(stats.stack().cpu())
                if request.num_top:
                    tops.append((*_top(logits, request.num_top), *_top(view, request.num_top)))
            passed(1)
    sizes = [len(rollout.generated_ids) for rollout in rollouts]
    if not sizes:
        return []
    # Copies, since a part of a tensor goes to another process with all of it.
    parts = [part.clone() for part in torch.split(torch.cat(tables, 1), sizes, 1)]
    columns = [map(torch.clone, torch.split(torch.cat(x), sizes)) for x in zip(*tops, strict=True)]
    likeliest: list[Top | None] = [Top(*rows) for rows in zip(*columns, strict=True)]
    return [
        _Scored(*row) for row in zip(rollouts, parts, likeliest or [None] * len(sizes), strict=True)
    ]


def _selected(
    config: Config,
    components: Components,
    scored: Sequence[_Scored],
    request: ScoreRequest,
    extras: tuple[str, ...],
) -> Scores:
    """All rollouts with their quadrants and what each rule would keep."""
    rollouts = [one.rollout for one in scored]
    stats = TokenStats.unstack(torch.cat([one.table for one in scored], 1), extras)
    if not bool(stats.is_finite().any()):
        raise ModelError(
            f"the statistics of all {len(stats)} tokens are not finite, so "
            f"{culprit(config, stats)} gives logits that are not numbers. Check its weights and "
            "dtype."
        )
    generated = [rollout.generated_ids for rollout in rollouts]
    completion = torch.cat([torch.full((len(ids),), i) for i, ids in enumerate(generated)])
    position = torch.cat([torch.arange(len(ids)) for ids in generated])
    tokens = [token for ids in generated for token in ids]
    tops = [one.top for one in scored if one.top is not None]
    texts = {token: components.tokenizer.decode([token]) for token in set(tokens)}
    uniform = counter_uniform((config.seed,), completion, position)
    options: dict[str, Any] = {"keep": request.keep, "uniform": uniform, "position": position}
    options |= ranking_options(config.selection)
    options["is_stop"] = is_one_of(torch.tensor(tokens), components.stops)
    rules = {name: _rule(config, name) for name in request.rules}
    return Scores(
        rollouts,
        stats,
        _quadrants(stats, config.quadrant_thresholds),
        {name: select_tokens(stats, completion, r, **options) for name, r in rules.items()},
        components.student.vocab_size,
        [texts[token] for token in tokens],
        config.quadrant_thresholds,
        _all(tops) if tops else None,
    )


def _rule(config: Config, name: str) -> Rule:
    """A rule by its name, with the run's options where the run uses it."""
    own = config.selection
    return rule_of(own) if name == own.rule else RULES[name]


def _all(tops: Sequence[Top]) -> Top:
    rows = [(x.student_ids, x.student, x.teacher_ids, x.teacher) for x in tops]
    return Top(*map(torch.cat, zip(*rows, strict=True)))


def _top(logits: TeacherLogits, k: int, num_rows: int = 256) -> tuple[Tensor, Tensor]:
    """Ids and probabilities of the k likeliest tokens of every row, on the CPU.

    Of a teacher that tells fewer ids, those; the others are `UNKNOWN_ID`.
    """
    k, found = min(k, logits.vocab_size), []
    if isinstance(logits, PartialLogits):
        add = partial(functional.pad, pad=(0, max(0, k - logits.k)))
        ids, shares = logits.ids[:, :k].cpu(), logits.log_q[:, :k].exp().cpu()
        return add(ids, value=UNKNOWN_ID), add(shares, value=torch.nan)
    for start in range(0, len(logits), num_rows):
        block = logits.block(start, min(start + num_rows, len(logits)))
        high, ids = block.topk(k)
        found.append((ids.cpu(), (high - block.logsumexp(1, keepdim=True)).exp().cpu()))
    return torch.cat([ids for ids, _ in found]), torch.cat([shares for _, shares in found])


def _quadrants(stats: TokenStats, thresholds: str | tuple[float, float]) -> Tensor:
    """Quadrant of every row, cut among the rows whose six statistics are finite; 0 elsewhere."""
    here = stats.is_finite()
    quadrant = torch.zeros(len(stats), dtype=torch.int64)
    quadrant[here] = quadrants(stats.entropy[here], stats.reverse_kl[here], thresholds)
    return quadrant


def _finite(value: float | bool | int) -> float | bool | int | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None
