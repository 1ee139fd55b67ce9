"""Which tokens rules keep of the same completions: how much of the loss, and of which texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from claims_probe import score
from tutelage.config.schema import Config
from tutelage.config.selection import (
    ExtremeTokens,
    GapTokens,
    InfluenceTokens,
    RandomTokens,
    SampledTokens,
    SelectionConfig,
    SomeTokens,
)
from tutelage.rollout.request import RolloutRequest
from tutelage.rollout.sampler import TransformersSampler
from tutelage.setup.components import Components
from tutelage.setup.objective import rule_of
from tutelage.train.distributed import StepRows
from tutelage.train.selection import choose

SAMPLING_RULES = ("entropy_sample", "soft_or_sample")
COMPARED_PERCENT = 20
"""Budget at which the choices of all rules are compared."""
COMPARED_RULES = (
    *("random", "entropy", "soft_or", "q3", "divergence", "probability_gap", "extreme_advantage"),
    *("influence", "lowest_logprob", "teachability", "gradient_norm", "local_gain"),
)
_SAMPLING_SEED = 5
"""Keeps the completions apart from those of steps and probes."""


def selection_of(rule: str, percent: int) -> SelectionConfig:
    """A rule that keeps so many percent of each completion's tokens.

    `extreme_advantage` keeps half of them at each end, at least one.
    """
    keep = percent / 100
    match rule:
        case "random":
            return RandomTokens("random", keep)
        case "probability_gap":
            return GapTokens("probability_gap", keep=keep)
        case "extreme_advantage":
            return ExtremeTokens("extreme_advantage", "both", keep / 2)
        case "influence":
            return InfluenceTokens("influence", keep=keep)
        case _ if rule in SAMPLING_RULES:
            return SampledTokens(rule, keep)  # type: ignore[arg-type]
    return SomeTokens(rule, keep)  # type: ignore[arg-type]


def choices(components: Components, config: Config, num_prompts: int) -> dict[str, Any]:
    """What every rule keeps of the same completions at one budget, and how far they agree."""
    selections = {rule: selection_of(rule, COMPARED_PERCENT) for rule in COMPARED_RULES}
    rows = completions(components, config, num_prompts, selections)
    kept = {rule: _kept(components, config, rows, chosen) for rule, chosen in selections.items()}
    return {
        "num_tokens": len(rows.tokens),
        "rules": {rule: _described(components, rows, mask) for rule, mask in kept.items()},
        "overlap": {
            a: {b: float((x & y).sum() / x.sum()) for b, y in kept.items()} for a, x in kept.items()
        },
    }


def own_choice(components: Components, config: Config, num_prompts: int) -> dict[str, Any]:
    """What a run's own rule keeps, at its own budget, of the present student's completions."""
    rows = completions(components, config, num_prompts, {"": config.selection})
    return _described(components, rows, _kept(components, config, rows, config.selection))


def completions(
    components: Components,
    config: Config,
    num_prompts: int,
    selections: Mapping[str, SelectionConfig],
) -> StepRows:
    """Tokens of the student's completions of held-out prompts, with what the rules read."""
    extras = dict.fromkeys(name for s in selections.values() for name in rule_of(s).extras)
    sampler = TransformersSampler(components.student.model, components.tokenizer, num_prompts)
    prompts = components.task.held_out(num_prompts)
    seed = (config.seed, _SAMPLING_SEED)
    rollouts = sampler.sample(RolloutRequest(prompts, config.sampling, seed))
    return score(components, rollouts, tuple({**extras, "gradient_norm": None}))


def _kept(
    components: Components, config: Config, rows: StepRows, selection: SelectionConfig
) -> Tensor:
    return choose(replace(config, selection=selection), rows, 1, components.stops).mask


def _described(components: Components, rows: StepRows, kept: Tensor) -> dict[str, Any]:
    """How much of the tokens, the reverse KL and the logit gradients' norms is kept, and of which
    texts: `[kept, all]` by a token's own text, and by that of the token before it."""
    texts = [components.tokenizer.decode([token]) for token in rows.tokens.tolist()]
    is_first = (rows.position == 0).tolist()
    before = ["" if first else text for first, text in zip(is_first, ["", *texts], strict=False)]
    sizes = {
        "tokens": torch.ones_like(rows.stats.entropy),
        "kl": rows.stats.reverse_kl,
        "gradient": rows.stats.extras["gradient_norm"].sqrt(),
    }
    shares = {f"{name}_kept": float(x[kept].sum() / x.sum()) for name, x in sizes.items()}
    return {**shares, "texts": _counts(texts, kept), "before": _counts(before, kept)}


def _counts(names: Sequence[str], kept: Tensor) -> dict[str, list[int]]:
    found = Counter(name for name, is_kept in zip(names, kept.tolist(), strict=True) if is_kept)
    return {name: [found[name], count] for name, count in Counter(names).items()}
