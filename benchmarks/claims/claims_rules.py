"""What each claim is taken to say: the differences it needs, fixed before the runs.

A claim about arms is a list of differences, each judged by one test of `claims_verdicts`. It is
judged on all of `differences`. What stands in `beside` is measured in the same way and shown, but
does not count: the same question put to other students, or what a reader has to know besides.
"""

from __future__ import annotations

from dataclasses import dataclass

METRICS = {
    "mean": ("mean@8", "points"),
    "pass": ("pass@8", "points"),
    "hidden_pass": ("hidden-start pass@8", "points"),
    "q3_kept_first": ("share of Q3 kept at step 1", "points"),
    "entropy": ("entropy", "nats"),
    "high_forward_kl": ("high forward KL", "nats"),
    "distinct": ("distinct", "completions"),
}
"""What a metric is called on the page, and its unit."""


@dataclass(frozen=True)
class Difference:
    """A metric of arm `a` minus that of arm `b`; positive speaks for the claim."""

    setting: str
    a: str
    b: str
    test: str
    metric: str = "mean"

    @property
    def label(self) -> str:
        return f"{METRICS[self.metric][0]}, {self.setting}: {self.a} minus {self.b}"

    @property
    def unit(self) -> str:
        return METRICS[self.metric][1]


Differences = tuple[Difference, ...]


@dataclass(frozen=True)
class Claim:
    """A sentence of the papers and what it is taken to mean here."""

    text: str
    rule: str
    differences: Differences = ()
    """Empty where no arms are compared: token scores and toys."""
    beside: Differences = ()


def _sampling_entropy(*settings: str) -> Differences:
    return tuple(Difference(s, "entropy_sample-50", "all", "matches") for s in settings)


def _soft_or(setting: str) -> Differences:
    return tuple(
        Difference(setting, f"soft_or{how}-{n}", f"entropy{how}-{n}", "matches")
        for how in ("", "_sample")
        for n in (50, 20, 10)
    )


def _q3(setting: str) -> Differences:
    return (
        *(Difference(setting, f"q3-{n}", "all", "nearly") for n in (20, 10)),
        *(Difference(setting, f"q3-{n}", f"divergence-{n}", "beats") for n in (20, 10)),
    )


def _bottom(setting: str) -> Differences:
    return (Difference(setting, "random-50", "bottom-50", "beats"),)


def _blind_spot(setting: str) -> Differences:
    return tuple(
        Difference(setting, a, b, test, "q3_kept_first")
        for n in (20, 10)
        for a, b, test in (
            (f"soft_or-{n}", f"entropy-{n}", "beats"),
            (f"entropy-{n}", f"random-{n}", "is_blind"),
        )
    )


ESTIMATORS = (("eopd", "all"), ("eopd_sampled", "opd_sampled"))
"""EOPD against what it adds to, exact and as published."""


def _eopd(setting: str, metric: str, test: str = "beats") -> Differences:
    return tuple(Difference(setting, a, b, test, metric) for a, b in ESTIMATORS)


def _lower_kl(setting: str) -> Differences:
    return tuple(Difference(setting, b, a, "beats", "high_forward_kl") for a, b in ESTIMATORS)


CLAIMS: dict[str, Claim] = {
    "T1": Claim(
        "Entropy sampling at 50 % matches or beats all tokens.",
        "Sampling half of the tokens by entropy is as good as all; in two settings, both needed.",
        _sampling_entropy("overconfident", "scarce"),
        _sampling_entropy("collapsed", "small"),
    ),
    "T2": Claim(
        "Soft-OR is at least as good as entropy at equal budget.",
        "Soft-OR is at least as good as entropy: like with like, at all three budgets.",
        _soft_or("overconfident"),
        (*_soft_or("scarce"), *_soft_or("collapsed"), *_soft_or("small")),
    ),
    "T3": Claim(
        "Q3 at 10–20 % nearly matches all tokens and beats divergence at the same budget.",
        "Q3 alone nearly matches all tokens, and is better than plain divergence: both halves.",
        _q3("overconfident"),
        (*_q3("scarce"), *_q3("collapsed"), *_q3("small")),
    ),
    "T4": Claim(
        "The bottom 50 % are worse than a random 50 %.",
        "The lowest half by Soft-OR is worse than a random half.",
        _bottom("overconfident"),
        (*_bottom("scarce"), *_bottom("collapsed"), *_bottom("small")),
    ),
    "T5": Claim(
        "Entropy is blind to Q3; Soft-OR is not.",
        "Entropy overlooks Q3 and Soft-OR does not; at small budgets, where there is a choice.",
        _blind_spot("overconfident"),
        _blind_spot("small"),
    ),
    "T6": Claim(
        "Soft-OR tells what a token is worth better than entropy or divergence alone.",
        "Soft-OR tells a token's worth better than either of its parts, however it is measured.",
    ),
    "E1": Claim(
        "EOPD keeps the student's entropy and diversity.",
        "EOPD keeps entropy and diversity: both higher than without it, where they had collapsed.",
        (*_eopd("collapsed", "entropy"), *_eopd("collapsed", "distinct")),
        _eopd("collapsed", "mean", "matches"),
    ),
    "E2": Claim(
        "EOPD lowers forward KL on tokens where the teacher's entropy is high.",
        "Lower forward KL where the teacher's entropy is high; in two settings, both needed.",
        (*_lower_kl("collapsed"), *_lower_kl("overconfident")),
        (*_lower_kl("scarce"), *_lower_kl("small")),
    ),
    "E3": Claim(
        "EOPD raises pass@8.",
        "Higher pass@8 wherever it does not saturate: hidden starts, and the scarce setting.",
        (*_eopd("collapsed", "hidden_pass"), *_eopd("scarce", "pass")),
        (*_eopd("overconfident", "pass"), *_eopd("small", "pass")),
    ),
    "E4": Claim(
        "One-sample reverse KL oscillates more under a high-entropy teacher.",
        "More top-1 changes under a flat teacher than under a peaked one, at every rate tried.",
    ),
    "E5": Claim(
        "The renormalised top-k is biased on flat teachers; a tail bucket cures it.",
        "The renormalised top-k moves away from a flat teacher; the tail removes half of that.",
    ),
}


def arms_of_claims() -> dict[str, tuple[str, ...]]:
    """The arms by setting that a verdict rests on."""
    found: dict[str, dict[str, None]] = {}
    for claim in CLAIMS.values():
        for difference in claim.differences:
            arms = found.setdefault(difference.setting, {})
            arms |= dict.fromkeys((difference.a, difference.b))
    return {setting: tuple(arms) for setting, arms in found.items()}
