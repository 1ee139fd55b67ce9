"""What is compared on a real language model, and when a claim holds: fixed before the first cell.

A setting is a task, a size of run and a loss (exact or sampled); every claim is judged once a
setting, by the tests of `claims_verdicts`. Metrics are accuracy (mean over problems and samples)
unless a difference names another. Differences are paired by seed and problem; their intervals are
those of `claims_statistics.mean_interval` (seeds and problems) at the level of the size, 95 % or,
where verdicts were looked at more than once, `Scale.level`. A claim is *supported* when all
of its differences are, *contradicted here* when one is contradicted and none supported.

Added after three seeds had been run on a CPU: a difference *cannot tell* where there is nothing to
lose (`claims_verdicts.obstacle`), the intervals include the t-interval over seeds, and three more
seeds of every arm, chosen because the intervals of three decided almost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ARMS: dict[str, tuple[str, ...]] = {
    "all": ("selection.rule=all",),
    "random-10": ("selection.rule=random", "selection.keep=0.1"),
    "random-40": ("selection.rule=random", "selection.keep=0.4"),
    "soft_or-20": ("selection.rule=soft_or", "selection.keep=0.2"),
    "gap-20": ("selection.rule=probability_gap", "selection.keep=0.2"),
    "opsa-20": ("selection.rule=lowest_logprob", "selection.keep=0.2", "objective.kind=opsa"),
    # Its sampled advantages are recomputed with each step's student, as Semi-OPD's are.
    "stored": ("selection.rule=all", "rollouts.source=stored"),
    "random-20": ("selection.rule=random", "selection.keep=0.2"),
    "gap-40": ("selection.rule=probability_gap", "selection.keep=0.4"),
    "soft_or-50": ("selection.rule=soft_or", "selection.keep=0.5"),
    "entropy_sample-50": ("selection.rule=entropy_sample", "selection.keep=0.5"),
    "q3-10": ("selection.rule=q3", "selection.keep=0.1"),
    "divergence-10": ("selection.rule=divergence", "selection.keep=0.1"),
    "influence-1": ("selection.rule=influence", "selection.keep=0.01"),
    "eopd": ("selection.rule=all",),
}
"""Settings of an arm beside those of its loss, the most wanted first."""
MINIMUM = ("all", "random-10", "random-40", "soft_or-20", "gap-20", "opsa-20", "stored")
"""What a CPU runs first."""
LATER = ("entropy_sample-50", "q3-10", "divergence-10", "influence-1", "eopd")
"""What a CPU runs after that: arms of T1, T3, E3 and I1. They were added when the verdicts of the
other claims were known, which these arms have no part in."""
OWN_LOSS = ("opsa-20",)
"""Arms whose objective is neither loss (no teacher at all); run once, compared in both settings."""
TUNED = {"exact": "all", "sampled": "all", "own": OWN_LOSS[0]}
"""The arm that the rate of a loss is tuned on, by the loss under which cells are kept."""
CONTROLS = ("all", "random-40")
"""Arms that are run once more under other seeds (A/A): nothing but chance tells the two apart."""

LOSSES: dict[str, tuple[str, ...]] = {
    "exact": ("objective.kind=kl",),
    "sampled": ("objective.kind=sampled",),
}
EOPD: dict[str, tuple[str, ...]] = {
    "exact": ("objective.kind=eopd",),
    "sampled": ("objective.kind=eopd", "objective.estimator=sampled", "objective.fkl=topk_renorm"),
}
"""The published form is the sampled one."""

METRICS = {
    "mean": ("accuracy", "points"),
    "pass": ("pass@k", "points"),
    "reverse_kl": ("held-out reverse KL", "nats"),
    "forward_kl": ("held-out forward KL", "nats"),
    "entropy": ("entropy", "nats"),
    "tokens": ("length", "tokens"),
    "truncated": ("cut off", "points"),
    "other_loss": ("loss on other texts", "nats"),
}
"""What a figure is called, and its unit; of the divergences and the last less is better."""


@dataclass(frozen=True)
class Difference:
    """A figure of arm `a` minus that of arm `b`, in any setting; positive speaks for the claim."""

    a: str
    b: str
    test: str
    metric: str = "mean"

    @property
    def label(self) -> str:
        return f"{METRICS[self.metric][0]}: {self.a} minus {self.b}"

    @property
    def unit(self) -> str:
        return METRICS[self.metric][1]


Differences = tuple[Difference, ...]


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper and what it is taken to mean here."""

    text: str
    rule: str
    differences: Differences
    beside: Differences = ()
    """Shown, but not counted."""


def _each(arms: Sequence[str], other: str, test: str, metric: str = "mean") -> Differences:
    return tuple(Difference(arm, other, test, metric) for arm in arms)


def _against(arm: str, others: Sequence[str], test: str) -> Differences:
    return tuple(Difference(arm, other, test, "mean") for other in others)


CLAIMS: dict[str, Claim] = {
    "T1": Claim(
        "Entropy sampling at 50 % matches or beats all tokens.",
        "Half of the tokens, sampled by entropy, are as good as all.",
        _each(["entropy_sample-50"], "all", "matches"),
    ),
    "T3": Claim(
        "Q3 at 10 % nearly matches all tokens and beats divergence at the same budget.",
        "Both halves are needed.",
        (*_each(["q3-10"], "all", "nearly"), *_each(["q3-10"], "divergence-10", "beats")),
    ),
    "E3": Claim(
        "EOPD raises pass@k.",
        "Higher pass@k than the same loss without its forward KL.",
        _each(["eopd"], "all", "beats", "pass"),
        (*_each(["eopd"], "all", "matches"), *_each(["eopd"], "all", "beats", "entropy")),
    ),
    "D1": Claim(
        "The 20–40 % of tokens with the largest probability gap beat all tokens.",
        "Ahead of all tokens at 20 %; 40 % stand beside.",
        _each(["gap-20"], "all", "beats"),
        (*_each(["gap-20"], "all", "matches"), *_each(["gap-40"], "all", "beats")),
    ),
    "D2": Claim(
        "Soft-OR at 20–50 % does not beat all tokens.",
        "All tokens match Soft-OR at 20 %; 50 % stand beside.",
        _against("all", ["soft_or-20"], "matches"),
        (*_each(["soft_or-20"], "all", "matches"), *_against("all", ["soft_or-50"], "matches")),
    ),
    "D3": Claim(
        "Soft-OR is no better than twice as many random tokens.",
        "40 % random tokens match 20 % by Soft-OR; equal budgets and half of it stand beside.",
        _each(["random-40"], "soft_or-20", "matches"),
        _each(["random-20", "random-10"], "soft_or-20", "matches"),
    ),
    "D4": Claim(
        "The probability gap beats Soft-OR at equal budget.",
        "Ahead at 20 %.",
        _each(["gap-20"], "soft_or-20", "beats"),
    ),
    "D5": Claim(
        "A student trained on few random tokens gains less than on all tokens.",
        "All tokens are ahead of 10 % random ones; 40 % stand beside.",
        _against("all", ["random-10"], "beats"),
        _against("all", ["random-40"], "beats"),
    ),
    "I1": Claim(
        "1 % of the tokens, by influence, match all tokens.",
        "One token of each completion is as good as all.",
        _each(["influence-1"], "all", "matches"),
        _each(["influence-1"], "random-10", "beats"),
    ),
    "F1": Claim(
        "Stored rollouts of the initial student are no worse than live ones.",
        "Completions drawn once, before the first step, match those of each step's student.",
        _each(["stored"], "all", "matches"),
    ),
    "O1": Claim(
        "Sharpening without any teacher (OPSA) does what distillation does.",
        "The 20 % least likely tokens with their own objective match all tokens with a teacher.",
        _each(["opsa-20"], "all", "matches"),
        _each(["opsa-20"], "start", "beats"),
    ),
}
"""A claim is judged in the settings where all of its differences were run with every seed; a
difference that stands beside is shown where it was run."""

SOURCES = {
    "D5": "Sparse OPD (arXiv 2609.04565): 15.6 for one random token of a completion against 27.5 "
    "for all. No paper claims it of 10 %.",
}
"""Who makes the claims that `claims_rules` has not, and what was measured there."""
PAPER_LOSS = dict.fromkeys(("D1", "D2", "D4", "E3", "F1"), "sampled")
"""The loss of the paper, where it is known; with the other one a verdict is about another thing."""
NO_PAPER = ("D5",)
"""Claims that nobody has published in this form."""
OTHER_RULES = {
    "T3": "there 20 % counts as well",
    "E3": "there pass@8, and of hidden starts where variety collapsed",
    "D1": "there 40 % counts as well",
    "D2": "there 40 % counts as well",
    "D3": "there against as many random tokens, not twice as many",
    "D4": "there 40 % counts as well",
    "O1": "there against all tokens with the sampled loss alone",
}
"""How the rule of the same name in `claims_rules` differs."""


def overrides(arm: str, loss: str) -> tuple[str, ...]:
    """Settings of an arm under a loss; an arm of its own loss has its objective already."""
    if arm in OWN_LOSS:
        return ARMS[arm]
    recomputed = ("objective.old_logprobs=step",) if (arm, loss) == ("stored", "sampled") else ()
    return (*ARMS[arm], *(EOPD if arm == "eopd" else LOSSES)[loss], *recomputed)


def loss_of(arm: str, loss: str) -> str:
    """The loss under which an arm's cell is kept."""
    return "own" if arm in OWN_LOSS else loss
