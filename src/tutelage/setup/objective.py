"""The objective of a run: which statistics, weights, gate and terms its method needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tutelage.config.method import (
    AdaptiveObjective,
    EOPDObjective,
    FireWeighting,
    GRPOObjective,
    IDAWeighting,
    JSDObjective,
    KLObjective,
    NoWeighting,
    ObjectiveConfig,
    OPSAObjective,
    PacedWeighting,
    RewardWeighting,
    SampledObjective,
    SelectKDWeighting,
    SkewObjective,
    TopKObjective,
    TrOPDObjective,
)
from tutelage.config.schema import Config
from tutelage.config.selection import (
    AllTokens,
    ExtremeTokens,
    GapTokens,
    InfluenceTokens,
    SelectionConfig,
)
from tutelage.core import RULES, TokenStats
from tutelage.core.policy import ClippedPolicy, group_advantages, sharpening_advantages
from tutelage.core.rules import Rule, extreme_advantage, influence, probability_gap
from tutelage.core.terms import (
    JSD,
    ForwardKL,
    ReverseKL,
    SampledReverseKL,
    SkewReverseKL,
    Term,
    TopKForwardKL,
    TopKReverseKL,
)
from tutelage.core.weighting import (
    entropy_gate,
    fire_weights,
    ida_weights,
    outside_trust_region,
    paced_weights,
    reward_weights,
    selectkd_weights,
)
from tutelage.errors import ConfigError

DIAGNOSTICS = ("teacher_top_mass",)
"""Extra statistics that every step with a teacher reports."""

_OF_SAMPLED_TOKENS = (SampledObjective, GRPOObjective, OPSAObjective)
"""Objectives that need log p of the sampled tokens before the step, and nothing else of scoring."""

ADVANTAGE = "advantage"
"""Name of the rows' advantages among the extra statistics of a step."""


def rule_of(selection: SelectionConfig) -> Rule:
    """The configured rule, with its options."""
    match selection:
        case GapTokens(b=b):
            return probability_gap(b)
        case ExtremeTokens(end=end):
            return extreme_advantage(end)
        case InfluenceTokens(combine=combine, usefulness=usefulness):
            return influence(combine, usefulness)
    return RULES[selection.rule]


def needs_teacher(config: Config) -> bool:
    """Whether steps have a teacher forward: all but those of rewards or of the student alone."""
    objective = config.objective
    has_none = isinstance(objective, OPSAObjective) or (
        isinstance(objective, GRPOObjective) and objective.distillation_weight == 0
    )
    return not (
        has_none
        and not rule_of(config.selection).needs_teacher
        and isinstance(config.weighting, NoWeighting | PacedWeighting | RewardWeighting)
    )


def graded_by(config: Config) -> str | None:
    """The setting that needs a verdict on every completion of a step; None if none does."""
    if isinstance(config.objective, GRPOObjective):
        return "objective.kind = 'grpo'"
    if isinstance(config.weighting, PacedWeighting | RewardWeighting):
        return f"weighting.kind = {config.weighting.kind!r}"
    return None


def needed_extras(config: Config) -> tuple[str, ...]:
    """Names of the extra statistics that the method and its diagnostics need."""
    if not needs_teacher(config):
        return ()
    names = [*DIAGNOSTICS, *rule_of(config.selection).extras]
    if isinstance(config.objective, AdaptiveObjective):
        names.append("head_share")
    if isinstance(config.weighting, SelectKDWeighting):
        names.append("is_in_teacher_top5")
    if isinstance(config.weighting, IDAWeighting):
        names.append("entropy_direction")
    return tuple(dict.fromkeys(names))


def needs_scoring(config: Config) -> bool:
    """Whether a pass over all tokens has to come before learning.

    Without selection and weights, the learning pass itself yields the statistics, and a gate that
    looks at one token at a time opens and shuts within it.
    """
    return not (
        isinstance(config.selection, AllTokens)
        and isinstance(config.weighting, NoWeighting)
        and _is_plain(config.objective)
    )


def _is_plain(objective: ObjectiveConfig) -> bool:
    """Whether the objective of a token depends on that token's two distributions alone."""
    if isinstance(objective, EOPDObjective):
        is_exact = objective.estimator == "exact" and objective.fkl == "full"
        return is_exact and objective.gate != "percentile"
    return isinstance(objective, KLObjective | JSDObjective | SkewObjective | TopKObjective)


def scores_teacher(config: Config) -> bool:
    """Whether the pass over all tokens uses the teacher's head too.

    Without, the statistics that need a teacher are known of the kept tokens only.
    """
    objective = config.objective
    looks_at_student = (
        not rule_of(config.selection).needs_teacher
        and (_is_plain(objective) or isinstance(objective, _OF_SAMPLED_TOKENS))
        and isinstance(config.weighting, NoWeighting | PacedWeighting | RewardWeighting)
    )
    is_described = config.diagnostics == "all" and needs_teacher(config)
    return is_described or not looks_at_student


def gate_of(objective: ObjectiveConfig, stats: TokenStats, uniform: Tensor | None = None) -> Tensor:
    """How far the forward KL of each row is switched on `[N]`: EOPD's and TrOPD's; else 0.

    Args:
        objective: the configured one.
        stats: of all rows of the global batch.
        uniform: numbers in (0, 1) `[N]` that decide which rows are outside of TrOPD's trust region.
    """
    match objective:
        case EOPDObjective(threshold=threshold, gate=gate, width=width):
            return entropy_gate(stats.teacher_entropy, threshold, gate, width)
        case TrOPDObjective():
            if uniform is None:
                raise ValueError("TrOPD draws at random and needs `uniform`, one per row.")
            return outside_trust_region(stats, uniform)
    return torch.zeros_like(stats.teacher_entropy)


def row_weights(
    config: Config, stats: TokenStats, completion: Tensor, is_correct: Sequence[bool | None]
) -> Tensor:
    """Loss weights of the configured weighting over the global batch `[N]`.

    Args:
        config: the run.
        stats: statistics of all rows.
        completion: completion index of each row `[N]`.
        is_correct: verdict on every completion of the step, for paced and reward weights.

    Raises:
        ConfigError: the weighting needs verdicts that the task does not give.
    """
    match config.weighting:
        case NoWeighting():
            return torch.ones_like(stats.entropy)
        case SelectKDWeighting(outside=outside):
            return selectkd_weights(stats, outside)
        case IDAWeighting():
            return ida_weights(stats)
        case FireWeighting(drop=drop):
            return fire_weights(stats, completion, drop)
        case PacedWeighting():
            verdicts = _verdicts(config, is_correct).to(stats.entropy.device)
            return paced_weights(verdicts, config.sampling.num_samples)[completion]
        case RewardWeighting(beta=beta):
            verdicts = _verdicts(config, is_correct).to(stats.entropy.device)
            return reward_weights(verdicts, beta)[completion]


def with_advantages(
    config: Config,
    stats: TokenStats,
    completion: Tensor,
    rewards: Sequence[float | None],
    kept: Tensor,
) -> TokenStats:
    """The statistics, with each row's advantage where that is not the teacher's.

    Args:
        config: the run.
        stats: of all rows of the global batch.
        completion: completion index of each row `[N]`.
        rewards: of every completion of the step, a prompt's side by side.
        kept: rows to train on `[K]`; the others have no advantage without a reward, and 0.

    Raises:
        ConfigError: the task did not grade every completion.
    """
    match config.objective:
        case GRPOObjective(scale=scale):
            _require_grades(config, rewards)
            table = torch.tensor(rewards, dtype=torch.float64, device=stats.entropy.device)
            found = group_advantages(table, config.sampling.num_samples, scale)[completion]
        case OPSAObjective():
            found = torch.zeros_like(stats.entropy, dtype=torch.float64)
            found[kept] = sharpening_advantages(stats.entropy[kept])
        case _:
            return stats
    return replace(stats, extras={**stats.extras, ADVANTAGE: found})


def _require_grades(config: Config, grades: Sequence[object]) -> None:
    if None in grades:
        setting = graded_by(config)
        raise ConfigError(
            f"{setting} needs a verdict on every completion, but the task cannot grade them all. "
            f"Set data.grader, or use another {str(setting).partition('.')[0]}."
        )


def _verdicts(config: Config, is_correct: Sequence[bool | None]) -> Tensor:
    _require_grades(config, is_correct)
    return torch.tensor([bool(verdict) for verdict in is_correct])


def uniform_terms(objective: ObjectiveConfig) -> list[tuple[Term, Tensor | float]]:
    """Terms of an objective that needs no statistics, each with one weight for all rows."""
    match objective:
        case KLObjective(reverse_weight=a, forward_weight=b):
            return [(ReverseKL(), a), (ForwardKL(), b)]
        case JSDObjective(teacher_weight=teacher_weight):
            return [(JSD(teacher_weight), 1.0)]
        case SkewObjective(alpha=alpha):
            return [(SkewReverseKL(alpha), 1.0)]
        case TopKObjective(direction="reverse", k=k, support=support):
            return [(TopKReverseKL(k, support), 1.0)]
        case TopKObjective(k=k, support=support):
            return [(TopKForwardKL(k, support=support), 1.0)]
        case EOPDObjective() if _is_plain(objective):
            gate = partial(
                entropy_gate,
                threshold=objective.threshold,
                kind=objective.gate,
                width=objective.width,
            )
            return [(ReverseKL(), 1.0), (ForwardKL(gate), objective.forward_weight)]
    raise ValueError(f"objective {objective.kind!r} needs statistics of its rows.")


def row_terms(
    objective: ObjectiveConfig,
    stats: TokenStats,
    tokens: Tensor,
    old_logprobs: Tensor,
    weights: Tensor,
    gate: Tensor,
) -> list[tuple[Term, Tensor | float]]:
    """Terms of any objective with a weight for each of the K rows to train on.

    Args:
        objective: the configured one.
        stats: statistics of the K rows before the step.
        tokens: sampled ids `[K]`.
        old_logprobs: log-probabilities of those ids `[K]`, nats, by the weights that the objective
            compares with; see `needs_sampler`.
        weights: loss weights `[K]`.
        gate: how far the forward KL is switched on `[K]`, of EOPD and TrOPD.
    """
    w = weights
    match objective:
        case AdaptiveObjective():
            share = stats.extras["head_share"]
            return [(ForwardKL(), w * share), (ReverseKL(), w * (1 - share))]
        case GRPOObjective():
            bounds = (objective.clip_low, objective.clip_high)
            policy = ClippedPolicy(tokens, old_logprobs, stats.extras[ADVANTAGE], *bounds)
            teaching = [(ReverseKL(), w * objective.distillation_weight)]
            return [(policy, w), *(teaching if objective.distillation_weight else [])]
        case OPSAObjective(clip=clip):
            advantages = stats.extras[ADVANTAGE]
            return [(ClippedPolicy(tokens, old_logprobs, advantages, clip, clip), w)]
        case SampledObjective(clip=clip):
            return [(SampledReverseKL(tokens, old_logprobs, clip), w)]
        case TrOPDObjective(fkl=fkl, k=k, clip=clip):
            sampled = SampledReverseKL(tokens, old_logprobs, clip)
            outside = TopKForwardKL(k, tail=fkl == "topk_tail")
            return [(sampled, w * (1 - gate)), (outside, w * gate)]
        case EOPDObjective() if not _is_plain(objective):
            forward: Term = ForwardKL()
            if objective.fkl != "full":
                forward = TopKForwardKL(objective.k, tail=objective.fkl == "topk_tail")
            base: Term = ReverseKL()
            if objective.estimator == "sampled":
                base = SampledReverseKL(tokens, old_logprobs, objective.clip)
            return [(base, w), (forward, w * gate * objective.forward_weight)]
    return [(term, w * scale) for term, scale in uniform_terms(objective)]


def culprit(config: Config, stats: TokenStats) -> str:
    """Whose logits are to blame where no row has finite statistics."""
    if not bool(torch.isfinite(stats.entropy).any()):
        return f"the student {config.student.model!r}"
    return f"the teacher {config.teacher.model!r}"
