"""Warnings of options of the method that are set and have no effect beside others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields

from tutelage.config.method import (
    EOPDObjective,
    GRPOObjective,
    ObjectiveConfig,
    SampledObjective,
    is_clipped,
    needs_sampler,
)
from tutelage.config.rollouts import has_older_weights
from tutelage.config.schema import Config
from tutelage.config.selection import InfluenceTokens, SampledTokens, SelectionConfig, SomeTokens

_NORMALIZED = ("soft_or", "soft_or_sample", "q3", "bottom")
"""Rules whose entropy and divergence are normalised as `selection.normalization` says."""


def unused_warnings(config: Config) -> Iterator[str]:
    """One line for every such option that is not at its default."""
    for table, settings, found in (
        ("selection", config.selection, _of_selection(config.selection)),
        ("objective", config.objective, _of_objective(config.objective)),
        ("objective", config.objective, _of_older_weights(config)),
    ):
        defaults = {f.name: f.default for f in fields(settings) if f.default is not MISSING}
        for name, beside in found:
            value = getattr(settings, name)
            if value != defaults[name]:
                cause = _said(config, table, settings, beside)
                yield f"{table}.{name} = {value!r} has no effect with {cause}. Leave it out"


def _said(
    config: Config, table: str, settings: SelectionConfig | ObjectiveConfig, beside: str
) -> str:
    """The setting that makes an option one without effect."""
    match beside:
        case "updates_per_step":
            return f"updates_per_step = {config.updates_per_step}"
        case "rollouts":
            return f"rollouts.source = {config.rollouts.source!r}"
    return f"{table}.{beside} = {getattr(settings, beside)!r}"


def _of_selection(selection: SelectionConfig) -> Iterator[tuple[str, str]]:
    """Options without effect, each with the option that makes it so."""
    match selection:
        case SomeTokens(rule=rule) | SampledTokens(rule=rule) if rule not in _NORMALIZED:
            yield "normalization", "rule"
        case InfluenceTokens(combine="none"):
            yield "usefulness", "combine"
            yield "normalization", "combine"
        case InfluenceTokens(usefulness="teachability"):
            yield "normalization", "usefulness"


def _of_objective(objective: ObjectiveConfig) -> Iterator[tuple[str, str]]:
    """Options without effect, each with the option that makes it so."""
    if isinstance(objective, EOPDObjective):
        if objective.gate != "soft":
            yield "width", "gate"
        if objective.fkl == "full":
            yield "k", "fkl"
        if objective.estimator == "exact":
            yield "clip", "estimator"


def _of_older_weights(config: Config) -> Iterator[tuple[str, str]]:
    """Options of the probability ratio where it is 1: the weights that sampled are the present.

    A clip binds after a step's first update and, unless the objective leaves them out, where older
    weights sampled.
    """
    objective, is_older = config.objective, has_older_weights(config)
    if isinstance(objective, SampledObjective) and not is_older:
        yield "old_logprobs", "rollouts"
    is_one = config.updates_per_step == 1 and not (is_older and needs_sampler(objective))
    if is_one and is_clipped(objective):
        is_grpo = isinstance(objective, GRPOObjective)
        for name in ("clip_low", "clip_high") if is_grpo else ("clip",):
            yield name, "updates_per_step"
