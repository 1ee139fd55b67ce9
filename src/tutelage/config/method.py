"""The method of a run: objective and weighting as configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from tutelage.config.bounds import STRICT, require


@dataclass(frozen=True)
class KLObjective:
    """Exact full-vocabulary a·reverse_kl + b·forward_kl of every kept token."""

    __pydantic_config__ = STRICT
    kind: Literal["kl"] = "kl"
    reverse_weight: float = 1.0
    """a, the weight of KL(student‖teacher)."""
    forward_weight: float = 0.0
    """b, the weight of KL(teacher‖student)."""

    def __post_init__(self) -> None:
        weights = (self.reverse_weight, self.forward_weight)
        require(
            min(weights) >= 0.0 and sum(weights) > 0.0,
            "objective.reverse_weight and forward_weight",
            "at least 0 and not both 0",
            weights,
            "Use 1 and 0 for plain on-policy distillation.",
        )


@dataclass(frozen=True)
class JSDObjective:
    """Generalised Jensen-Shannon divergence."""

    __pydantic_config__ = STRICT
    kind: Literal["jsd"]
    teacher_weight: float = 0.5
    """The teacher's share of the mixture, strictly between 0 and 1."""

    def __post_init__(self) -> None:
        require(
            0.0 < self.teacher_weight < 1.0,
            "objective.teacher_weight",
            "strictly between 0 and 1",
            self.teacher_weight,
            "Use objective.kind = 'kl' for the limits.",
        )


@dataclass(frozen=True)
class SkewObjective:
    """KL(p‖α p + (1 − α) q)."""

    __pydantic_config__ = STRICT
    kind: Literal["skew_reverse_kl"]
    alpha: float = 0.1
    """The student's share of the mixture, in [0, 1)."""

    def __post_init__(self) -> None:
        require(
            0.0 <= self.alpha < 1.0, "objective.alpha", "in [0, 1)", self.alpha, "0.1 is usual."
        )


@dataclass(frozen=True)
class AdaptiveObjective:
    """Adaptive KL: forward where the teacher's head disagrees, reverse where its tail does."""

    __pydantic_config__ = STRICT
    kind: Literal["akl"]


@dataclass(frozen=True)
class TopKObjective:
    """A divergence over one side's k likeliest ids and one bucket for the rest."""

    __pydantic_config__ = STRICT
    kind: Literal["topk"]
    direction: Literal["reverse", "forward"] = "reverse"
    k: int = 16
    """Ids with a bucket of their own, at least 1."""
    support: Literal["teacher", "student"] = "teacher"
    """Whose likeliest ids they are, of every token anew."""

    def __post_init__(self) -> None:
        require(self.k >= 1, "objective.k", "at least 1", self.k, "16 is usual.")


@dataclass(frozen=True)
class SampledObjective:
    """Reverse KL of the sampled token alone, as a PPO-clipped advantage ("k1")."""

    __pydantic_config__ = STRICT
    kind: Literal["sampled"]
    clip: float = 0.2
    """ε of the clip, above 0; binds after a step's first update and where older weights sampled."""
    old_logprobs: Literal["sampler", "step"] = "sampler"
    """Whose log-probabilities advantage and clip use where older weights sampled: theirs, or those
    of the student at the start of the step, so that the advantage is recomputed (Semi-OPD) and the
    clip binds after the first update alone."""

    def __post_init__(self) -> None:
        require(self.clip > 0, "objective.clip", "above 0", self.clip, "0.2 is usual.")


@dataclass(frozen=True)
class EOPDObjective:
    """Reverse KL, plus forward KL where the teacher's entropy is high (Entropy-Aware OPD)."""

    __pydantic_config__ = STRICT
    kind: Literal["eopd"]
    estimator: Literal["exact", "sampled"] = "exact"
    """exact: full-vocabulary reverse KL. sampled: PPO-clipped advantage of the sampled token."""
    fkl: Literal["full", "topk_tail", "topk_renorm"] = "full"
    """Forward KL over all ids, or the teacher's top k with a tail bucket or renormalized."""
    forward_weight: float = 1.0
    """α, the weight of the gated forward KL."""
    gate: Literal["hard", "soft", "percentile"] = "hard"
    """1[H ≥ τ], σ((H − τ)/width), or H at or above a quantile of the batch."""
    threshold: float = 0.8
    """τ in nats; for gate = "percentile" a share in [0, 1]."""
    width: float = 0.1
    """Softness of gate = "soft", nats, above 0."""
    k: int = 16
    """Ids of the top-k forms, at least 1."""
    clip: float = 0.2
    """ε of the sampled estimator's clip, above 0."""

    def __post_init__(self) -> None:
        is_share = self.gate == "percentile"
        require(
            self.threshold >= 0.0 and (self.threshold <= 1.0 or not is_share),
            "objective.threshold",
            "in [0, 1] for gate = 'percentile'" if is_share else "at least 0 nats",
            self.threshold,
            "0.8 is the paper's.",
        )
        for name in ("width", "k", "clip"):
            value = self.__dict__[name]
            require(value > 0, f"objective.{name}", "above 0", value, "Leave it out if unsure.")
        require(
            self.forward_weight >= 0,
            "objective.forward_weight",
            "at least 0",
            self.forward_weight,
            "0 is plain on-policy distillation.",
        )


@dataclass(frozen=True)
class TrOPDObjective:
    """The sampled token within a trust region, forward KL over the teacher's top k outside (TrOPD).

    A token is within with probability min(q/p, 1), p and q being those of the sampled token.
    """

    __pydantic_config__ = STRICT
    kind: Literal["tropd"]
    fkl: Literal["topk_tail", "topk_renorm"] = "topk_tail"
    """Forward KL over the teacher's top k with a tail bucket, or renormalized; the paper does not
    say which."""
    k: int = 64
    """Ids of the forward KL, at least 1."""
    clip: float = 0.2
    """ε of the clip within, above 0; binds as that of `sampled` does."""

    def __post_init__(self) -> None:
        require(self.k >= 1, "objective.k", "at least 1", self.k, "64 is the paper's.")
        require(self.clip > 0, "objective.clip", "above 0", self.clip, "0.2 is usual.")


@dataclass(frozen=True)
class GRPOObjective:
    """Policy gradient by rewards: each completion against the others of its prompt (GRPO).

    A completion's reward is 1 if the task's grader finds it right, else 0; of a conversation it is
    the environment's score. Needs sampling.num_samples of 2 or more.
    """

    __pydantic_config__ = STRICT
    kind: Literal["grpo"]
    scale: Literal["std", "none"] = "std"
    """Divide a prompt's advantages by the standard deviation of its rewards, or leave them."""
    clip_low: float = 0.2
    """How far a token's probability ratio may fall below 1, in (0, 1]; binds after a step's
    first update and where older weights sampled."""
    clip_high: float = 0.2
    """How far it may rise above 1, above 0; 0.28 is DAPO's."""
    distillation_weight: float = 0.0
    """Weight of the exact reverse KL to the teacher beside it, at least 0; with 0 steps have
    no teacher forward unless selection or weighting need one, and divergences are not logged."""

    def __post_init__(self) -> None:
        low, high, weight = self.clip_low, self.clip_high, self.distillation_weight
        require(0 < low <= 1, "objective.clip_low", "in (0, 1]", low, "0.2 is usual.")
        require(high > 0, "objective.clip_high", "above 0", high, "0.2 is usual.")
        hint = "0 trains on rewards alone."
        require(weight >= 0, "objective.distillation_weight", "at least 0", weight, hint)


@dataclass(frozen=True)
class OPSAObjective:
    """The student without a teacher: its sampled tokens lose probability, most where it is unsure.

    Meant for the least likely tokens: selection.rule = "lowest_logprob" with keep = 0.2. Steps have
    no teacher forward unless selection or weighting need one, and divergences are not logged.
    """

    __pydantic_config__ = STRICT
    kind: Literal["opsa"]
    clip: float = 0.2
    """ε of the clip, above 0; binds after a step's first update and where older weights sampled."""

    def __post_init__(self) -> None:
        require(self.clip > 0, "objective.clip", "above 0", self.clip, "0.2 is usual.")


ObjectiveConfig: TypeAlias = Annotated[
    KLObjective
    | JSDObjective
    | SkewObjective
    | AdaptiveObjective
    | TopKObjective
    | SampledObjective
    | EOPDObjective
    | TrOPDObjective
    | GRPOObjective
    | OPSAObjective,
    Field(discriminator="kind"),
]


def needs_sampler(objective: ObjectiveConfig) -> bool:
    """Whether an objective compares the student with the weights that sampled older rollouts."""
    return is_clipped(objective) and not (
        isinstance(objective, SampledObjective) and objective.old_logprobs == "step"
    )


def is_clipped(objective: ObjectiveConfig) -> bool:
    """Whether an objective has a clipped ratio of the sampled token's probabilities."""
    if isinstance(objective, EOPDObjective):
        return objective.estimator == "sampled"
    kinds = (SampledObjective, TrOPDObjective, GRPOObjective, OPSAObjective)
    return isinstance(objective, kinds)


@dataclass(frozen=True)
class NoWeighting:
    """Every kept token weighs the same."""

    __pydantic_config__ = STRICT
    kind: Literal["none"] = "none"


@dataclass(frozen=True)
class SelectKDWeighting:
    """Full weight where the student's likeliest id is among the teacher's five likeliest."""

    __pydantic_config__ = STRICT
    kind: Literal["selectkd"]
    outside: float = 0.01
    """Weight of the other tokens, at least 0."""

    def __post_init__(self) -> None:
        require(
            self.outside >= 0, "weighting.outside", "at least 0", self.outside, "0.01 is usual."
        )


@dataclass(frozen=True)
class IDAWeighting:
    """Less weight where the sampled token's advantage lowers the student's entropy (IDA-OPD)."""

    __pydantic_config__ = STRICT
    kind: Literal["ida"]


@dataclass(frozen=True)
class FireWeighting:
    """High where the student is uncertain and the teacher is not; poor completions are dropped."""

    __pydantic_config__ = STRICT
    kind: Literal["fire"]
    drop: float = 0.2
    """Share of completions with the lowest mean teacher log-probability to drop, in [0, 1)."""

    def __post_init__(self) -> None:
        require(0.0 <= self.drop < 1.0, "weighting.drop", "in [0, 1)", self.drop, "0 drops none.")


@dataclass(frozen=True)
class PacedWeighting:
    """s(1 − s) of each prompt, s being the student's pass rate; needs a graded task."""

    __pydantic_config__ = STRICT
    kind: Literal["paced"]


@dataclass(frozen=True)
class RewardWeighting:
    """softmax(reward/β)·n over the step's n completions, reward 1 for a correct one."""

    __pydantic_config__ = STRICT
    kind: Literal["reward"]
    beta: float = 1.0
    """Temperature, above 0; large values weigh all completions alike."""

    def __post_init__(self) -> None:
        require(self.beta > 0, "weighting.beta", "above 0", self.beta, "1.0 is usual.")


WeightingConfig: TypeAlias = Annotated[
    NoWeighting
    | SelectKDWeighting
    | IDAWeighting
    | FireWeighting
    | PacedWeighting
    | RewardWeighting,
    Field(discriminator="kind"),
]
