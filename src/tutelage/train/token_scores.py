"""`tutelage score`: statistics of every token of completions, without training."""

from __future__ import annotations

import difflib
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tutelage.config.schema import Config
from tutelage.core import (
    RULES,
    LazyLogits,
    TokenSelection,
    TokenStats,
    counter_uniform,
    quadrant_table,
    quadrants,
    select_tokens,
)
from tutelage.data.batch import micro_batches
from tutelage.data.columns import notes_of
from tutelage.data.prompts import load_completions
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import ConfigError, DataError, ModelError
from tutelage.models.tokenizers import encode_completion, encode_prompt, pad_id
from tutelage.rollout.request import RolloutRequest
from tutelage.setup.components import Components, agent_of, build_components
from tutelage.setup.inputs import prompt_format
from tutelage.setup.numerics import plain_arithmetic
from tutelage.setup.objective import culprit
from tutelage.setup.phases import PhaseCallback, counting, no_log, no_phases
from tutelage.train.selection import ranking_options


@dataclass(frozen=True)
class ScoreRequest:
    """What `tutelage score` is asked for."""

    num_prompts: int = 8
    """Held-out prompts that the student completes; not used with `completions`."""
    rules: tuple[str, ...] = ()
    """Selection rules whose importance and choice each row reports."""
    keep: float = 0.2
    """Budget of the rules, in (0, 1]."""
    completions: str | None = None
    """JSONL file of prompts with completions to score instead of sampling."""
    num_top: int = 0
    """Likeliest tokens of student and teacher to return for every row."""

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise ConfigError(f"--num-prompts must be at least 1, got {self.num_prompts}.")
        if not 0.0 < self.keep <= 1.0:
            raise ConfigError(f"--keep must be in (0, 1], got {self.keep}.")
        unknown = [rule for rule in self.rules if rule not in RULES]
        if unknown:
            near = difflib.get_close_matches(unknown[0], RULES, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            names = ", ".join(RULES)
            raise ConfigError(f"--rules must be among {names}, got {unknown[0]!r}.{hint}")


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
) -> Scores:
    """Score the student's own completions of held-out prompts, or given ones.

    Args:
        config: names student, teacher, data and sampling.
        request: which completions, and which rules to report.
        on_phase: told what is being done.
        log: receives a line for what was left out of the prompts' records.

    Raises:
        TutelageError: models, data or request cannot be used.
    """
    with loaded_components(config, on_phase) as components:
        rollouts = rollouts_of(config, components, request, on_phase, log)
        on_phase("scoring")
        return score_rollouts(config, components, rollouts, request)


@contextmanager
def loaded_components(config: Config, on_phase: PhaseCallback) -> Iterator[Components]:
    """Models, tokenizer and task, whose engine is closed in the end."""
    components = build_components(config, on_phase=on_phase)
    try:
        yield components
    finally:
        components.sampler.close()


def score_rollouts(
    config: Config, components: Components, rollouts: list[Rollout], request: ScoreRequest
) -> Scores:
    """Score every token of some rollouts with loaded models.

    Args:
        config: names batch sizes, seed and quadrant thresholds.
        components: student and teacher.
        rollouts: at least one, with at least one token.
        request: rules to report, their budget, and how many of the likeliest tokens to return.

    Raises:
        ModelError: no token has finite statistics.
    """
    extras = tuple(dict.fromkeys(x for rule in request.rules for x in RULES[rule].extras))
    pad = pad_id(components.tokenizer, components.student.vocab_size)
    limit = config.micro_batch_tokens
    batches = micro_batches(rollouts, config.micro_batch_size, pad, max_tokens=limit)
    tables, tops = [], []
    with components.teacher.on_device(), torch.no_grad():
        for batch in batches:
            here = batch.to(components.device)
            view = components.teacher.to_device(components.teacher.forward(here))
            logits = components.student.logits(here)
            tables.append(components.student(here, view, extras=extras, hidden=logits.hidden))
            if request.num_top:
                tops.append((*_top(logits, request.num_top), *_top(view, request.num_top)))
    stats = TokenStats.unstack(TokenStats.cat(tables).stack().cpu(), extras)
    if not bool(stats.is_finite().any()):
        raise ModelError(
            f"the statistics of all {len(stats)} tokens are not finite, so "
            f"{culprit(config, stats)} gives logits that are not numbers. Check its weights and "
            "dtype."
        )
    completion = torch.cat([batch.completion for batch in batches])
    position = torch.cat([batch.position for batch in batches])
    tokens = torch.cat([batch.tokens for batch in batches]).tolist()
    texts = {token: components.tokenizer.decode([token]) for token in set(tokens)}
    uniform = counter_uniform((config.seed,), completion, position)
    options: dict[str, Any] = {"keep": request.keep, "uniform": uniform, "position": position}
    options |= ranking_options(config.selection)
    return Scores(
        rollouts,
        stats,
        _quadrants(stats, config.quadrant_thresholds),
        {r: select_tokens(stats, completion, r, **options) for r in request.rules},
        components.student.vocab_size,
        [texts[token] for token in tokens],
        config.quadrant_thresholds,
        Top(*map(torch.cat, zip(*tops, strict=True))) if tops else None,
    )


def _top(logits: LazyLogits, k: int, num_rows: int = 256) -> tuple[Tensor, Tensor]:
    """Ids and probabilities of the k likeliest tokens of every row, on the CPU."""
    k, found = min(k, logits.vocab_size), []
    for start in range(0, len(logits), num_rows):
        block = logits.block(start, min(start + num_rows, len(logits)))
        high, ids = block.topk(k)
        found.append((ids.cpu(), (high - block.logsumexp(1, keepdim=True)).exp().cpu()))
    return torch.cat([ids for ids, _ in found]), torch.cat([shares for _, shares in found])


def rollouts_of(
    config: Config,
    components: Components,
    request: ScoreRequest,
    on_phase: PhaseCallback = no_phases,
    log: Callable[[str], None] = no_log,
) -> list[Rollout]:
    """The given completions, or the student's own of held-out prompts, by the run's engine."""
    rollouts = _rollouts_of(config, components, request, on_phase)
    prompts = {rollout.prompt.id: rollout.prompt for rollout in rollouts}
    for note in notes_of(prompts.values()):
        log(f"warning: {note}")
    return rollouts


def _rollouts_of(
    config: Config, components: Components, request: ScoreRequest, on_phase: PhaseCallback
) -> list[Rollout]:
    if request.completions is not None:
        pairs = load_completions(request.completions, prompt_format(config.data))
        number: dict[str, Iterator[int]] = defaultdict(itertools.count)
        return [_given(components, prompt, next(number[prompt.id]), text) for prompt, text in pairs]
    prompts = components.task.held_out(request.num_prompts)
    num_completions = len(prompts) * config.sampling.num_samples
    progress = counting(on_phase, "sampling: completions", num_completions)
    seed = (config.seed, 0)
    agent = agent_of(config, components.task)
    sampled = RolloutRequest(prompts, config.sampling, seed, progress=progress, agent=agent)
    return components.sampler.sample(sampled)


def _given(
    components: Components, prompt: Prompt, sample: int, completion: str | list[int]
) -> Rollout:
    ids = completion
    if isinstance(ids, str):
        ids = encode_completion(components.tokenizer, ids)
    beyond = [i for i in ids if i >= components.student.vocab_size]
    if beyond or not ids:
        raise DataError(
            f"completion of prompt {prompt.id!r} must have ids from 0 to "
            f"{components.student.vocab_size - 1}, got {beyond[:1] or 'none'}."
        )
    prompt_ids = encode_prompt(components.tokenizer, prompt, components.enable_thinking)
    return Rollout(prompt, sample, tuple(prompt_ids), tuple(ids))


def _quadrants(stats: TokenStats, thresholds: str | tuple[float, float]) -> Tensor:
    """Quadrant of every row, cut among the rows whose six statistics are finite; 0 elsewhere."""
    here = stats.is_finite()
    quadrant = torch.zeros(len(stats), dtype=torch.int64)
    quadrant[here] = quadrants(stats.entropy[here], stats.reverse_kl[here], thresholds)
    return quadrant


def _finite(value: float | bool | int) -> float | bool | int | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None
