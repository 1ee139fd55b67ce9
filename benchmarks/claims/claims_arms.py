"""The arms: ways to train that differ in method alone, by name.

A name is what is kept and of how many percent of each completion, then what it is trained with:
`soft_or-20` by the exact reverse KL, `soft_or-20+sampled` by the sampled token alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from claims_choices import selection_of
from tutelage.config.method import (
    EOPDObjective,
    IDAWeighting,
    KLObjective,
    NoWeighting,
    ObjectiveConfig,
    OPSAObjective,
    SampledObjective,
    TrOPDObjective,
    WeightingConfig,
)
from tutelage.config.selection import (
    AllTokens,
    ExtremeTokens,
    GapTokens,
    InfluenceTokens,
    SelectionConfig,
)

Loss: TypeAlias = Literal["exact", "sampled"]
TUNED: dict[Loss, str] = {"exact": "all", "sampled": "all+sampled"}
"""The arm on which the learning rate of each kind of loss is tuned."""
BUDGETS = (50, 40, 20, 10, 5, 3, 1)
"""Percent of each completion's tokens that figures show; at least one is kept."""
BASELINES = ("start", "teacher")
"""Measured, never trained."""


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    selection: SelectionConfig = field(default_factory=AllTokens)
    objective: ObjectiveConfig = field(default_factory=KLObjective)
    loss: Loss = "exact"
    """Whose learning rate it takes: that of divergences, or of sampled tokens."""
    weighting: WeightingConfig = field(default_factory=NoWeighting)
    rollouts: Literal["live", "stored", "prefix"] = "live"
    """prefix: the teacher samples the first tokens in the first half of the steps."""


def _rule(rule: str, *budgets: int) -> list[Arm]:
    return [Arm(f"{rule}-{n}", selection_of(rule, n)) for n in budgets]


def _sampled(*arms: Arm) -> list[Arm]:
    """The same with the loss of the sampled token alone."""
    return [
        replace(
            arm,
            name=f"{arm.name}+sampled",
            loss="sampled",
            objective=SampledObjective("sampled")
            if isinstance(arm.objective, KLObjective)
            else EOPDObjective("eopd", "sampled", "topk_renorm"),
        )
        for arm in arms
    ]


_ALL = Arm("all")
_STORED = Arm("stored", rollouts="stored")
_RECOMPUTED = SampledObjective("sampled", old_logprobs="step")
_STORED_SAMPLED = Arm("stored+sampled", AllTokens(), _RECOMPUTED, "sampled", rollouts="stored")
_EOPD = Arm("eopd", objective=EOPDObjective("eopd"))
_RULES_OF_BOTH_LOSSES = (
    *_rule("random", 40, 20, 1),
    *_rule("soft_or", 40, 20),
    *_rule("probability_gap", 40, 20),
    Arm("extreme_max-1", ExtremeTokens("extreme_advantage", "max", 0.01)),
    Arm("extreme_min-1", ExtremeTokens("extreme_advantage", "min", 0.01)),
    *_rule("influence", 10, 1),
    *_rule("lowest_logprob", 20),
)
_VARIANTS = (
    Arm("log_gap-20", GapTokens("probability_gap", b=0.0, keep=0.2)),
    Arm("influence_rank-1", InfluenceTokens("influence", "none", keep=0.01)),
    Arm("influence_and-1", InfluenceTokens("influence", "soft_and", keep=0.01)),
    Arm(
        "influence_teachability-1",
        InfluenceTokens("influence", usefulness="teachability", keep=0.01),
    ),
    *_rule("extreme_advantage", 1),
)
"""Forms of a rule that are shown beside the one that a claim is judged by."""
_OPSA = Arm("opsa-20", selection_of("lowest_logprob", 20), OPSAObjective("opsa"), "sampled")
_TROPD = TrOPDObjective("tropd", "topk_renorm")
_IDA = Arm("ida", weighting=IDAWeighting("ida"))

ARMS = {
    arm.name: arm
    for arm in (
        *(_ALL, _STORED, _EOPD, *_RULES_OF_BOTH_LOSSES, *_VARIANTS),
        *_rule("random", 50, 10, 3),
        *_rule("soft_or", 50, 10, 3),
        *_rule("probability_gap", 10),
        *_rule("lowest_logprob", 10),
        *_rule("entropy", 50, 20, 10),
        *_rule("entropy_sample", 50, 20, 10),
        *_rule("soft_or_sample", 50, 20, 10),
        *_rule("q3", 20, 10),
        *_rule("divergence", 20, 10),
        *_rule("bottom", 50),
        *_sampled(_ALL, _EOPD, _IDA, *_RULES_OF_BOTH_LOSSES),
        *(_OPSA, _STORED_SAMPLED),
        Arm("tropd", AllTokens(), _TROPD, "sampled", rollouts="prefix"),
        Arm("tropd-live", AllTokens(), _TROPD, "sampled"),
        Arm("tropd-tail", AllTokens(), TrOPDObjective("tropd"), "sampled", rollouts="prefix"),
    )
}
"""Every arm by name. `eopd+sampled` is the published form: renormalised top 16. `stored+sampled`
recomputes its advantages with the student of each step, as Semi-OPD does."""


def loss_of(arm: str) -> Loss:
    """The kind of loss whose learning rate an arm takes; baselines take none."""
    return ARMS[arm].loss if arm in ARMS else "exact"


def random_arm(arm: str) -> str | None:
    """The random control of the same budget and loss; None where an arm has none.

    `extreme_advantage` has none: it keeps a token at each end of a completion.
    """
    rule, _, percent = arm.partition("+")[0].rpartition("-")
    control = f"random-{percent}" + "+sampled" * (loss_of(arm) == "sampled")
    has_control = rule not in ("random", "extreme_advantage") and control in ARMS
    return control if has_control else None
