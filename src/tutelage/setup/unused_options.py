"""Warnings of options of a rule or of EOPD that are set and have no effect beside its others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields

from tutelage.config.method import EOPDObjective, ObjectiveConfig
from tutelage.config.schema import Config
from tutelage.config.selection import InfluenceTokens, SampledTokens, SelectionConfig, SomeTokens

_NORMALIZED = ("soft_or", "soft_or_sample", "q3", "bottom")
"""Rules whose entropy and divergence are normalised as `selection.normalization` says."""


def unused_warnings(config: Config) -> Iterator[str]:
    """One line for every such option that is not at its default."""
    for table, settings, found in (
        ("selection", config.selection, _of_selection(config.selection)),
        ("objective", config.objective, _of_objective(config.objective)),
    ):
        defaults = {f.name: f.default for f in fields(settings) if f.default is not MISSING}
        for name, beside in found:
            value = getattr(settings, name)
            if value != defaults[name]:
                yield (
                    f"{table}.{name} = {value!r} has no effect with {table}.{beside} = "
                    f"{getattr(settings, beside)!r}. Leave it out"
                )


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
