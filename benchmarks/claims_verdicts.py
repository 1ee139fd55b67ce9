"""One verdict a claim, by rules that were fixed before the runs.

A claim is taken apart into comparisons. Each of them has a 95 % interval and is judged by one of
three tests; the claim is *supported* when all of its comparisons are, *contradicted here* when at
least one is contradicted and none supported, and *not supported* otherwise. No correction is made
for the number of comparisons: a claim needs all of its own, which errs on the strict side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from claims_probe import OSCILLATION_RATES
from claims_statistics import mean_interval
from claims_table import Table
from tutelage.evaluation.metrics import Interval

Verdict: TypeAlias = Literal["supported", "not supported", "contradicted here"]

MARGIN = 0.02
"""Accuracy that still counts as a match, 2 points: about the width of what five seeds resolve."""
NEARLY_MARGIN = 0.03
"""How far below zero the interval of a "nearly" may reach, 3 points."""
SHARE_MARGIN = 0.05
"""Share of Q3 tokens by which entropy may exceed chance and still be blind to them."""


def beats(interval: Interval) -> Verdict:
    """Better: the interval of the difference lies above 0; contradicted if it lies below."""
    if interval.low > 0:
        return "supported"
    return "contradicted here" if interval.high < 0 else "not supported"


def matches(interval: Interval) -> Verdict:
    """Matches or beats: not worse than `MARGIN`; contradicted if certainly worse than that."""
    if interval.low >= -MARGIN:
        return "supported"
    return "contradicted here" if interval.high < -MARGIN else "not supported"


def nearly(interval: Interval) -> Verdict:
    """Nearly matches: at most 2 points below, and the interval at most 3."""
    if interval.value >= -MARGIN and interval.low > -NEARLY_MARGIN:
        return "supported"
    return "contradicted here" if interval.high < -MARGIN else "not supported"


def is_blind(interval: Interval) -> Verdict:
    """Keeps no more of Q3 than chance does, give or take `SHARE_MARGIN`."""
    if interval.high <= SHARE_MARGIN:
        return "supported"
    return "contradicted here" if interval.low > SHARE_MARGIN else "not supported"


TESTS: dict[str, Callable[[Interval], Verdict]] = {
    "beats": beats,
    "matches": matches,
    "nearly": nearly,
    "is_blind": is_blind,
}
"""The tests by the name under which a comparison asks for them."""


@dataclass(frozen=True)
class Comparison:
    """One difference that a claim is about; positive speaks for the claim unless a test differs."""

    label: str
    unit: str
    test: str
    interval: Interval

    @property
    def verdict(self) -> Verdict:
        return TESTS[self.test](self.interval)


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """Verdict of a claim from those of its comparisons; see the module."""
    found = set(verdicts)
    if found == {"supported"}:
        return "supported"
    is_against = "contradicted here" in found and "supported" not in found
    return "contradicted here" if is_against else "not supported"


def _accuracy(table: Table, setting: str, a: str, b: str, test: str) -> Comparison:
    interval = table.difference(setting, a, b, "mean")
    return Comparison(f"mean@8, {setting}: {a} minus {b}", "points", test, interval)


def t1(table: Table) -> list[Comparison]:
    """Sampling half of the tokens by entropy is as good as all; in two settings, both needed."""
    return [
        _accuracy(table, setting, "entropy_sample-50", "all", "matches")
        for setting in ("overconfident", "scarce")
        if table.has(setting, "entropy_sample-50", "all")
    ]


def t2(table: Table) -> list[Comparison]:
    """Soft-OR is at least as good as entropy: like with like, at all three budgets."""
    return [
        _accuracy(table, "overconfident", f"soft_or{how}-{n}", f"entropy{how}-{n}", "matches")
        for how in ("", "_sample")
        for n in (50, 20, 10)
    ]


def t3(table: Table) -> list[Comparison]:
    """Q3 alone nearly matches all tokens, and is better than plain divergence: both halves."""
    return [
        *(_accuracy(table, "overconfident", f"q3-{n}", "all", "nearly") for n in (20, 10)),
        *(
            _accuracy(table, "overconfident", f"q3-{n}", f"divergence-{n}", "beats")
            for n in (20, 10)
        ),
    ]


def t4(table: Table) -> list[Comparison]:
    """The lowest half by Soft-OR is worse than a random half."""
    return [_accuracy(table, "overconfident", "random-50", "bottom-50", "beats")]


def t5(table: Table) -> list[Comparison]:
    """Entropy overlooks Q3 and Soft-OR does not; at small budgets, where there is a choice."""
    found = []
    for n in (20, 10):
        for a, b, test in (
            (f"soft_or-{n}", f"entropy-{n}", "beats"),
            (f"entropy-{n}", f"random-{n}", "is_blind"),
        ):
            interval = table.difference("overconfident", a, b, "q3_kept_first")
            label = f"share of Q3 kept at step 1: {a} minus {b}"
            found.append(Comparison(label, "points", test, interval))
    return found


def t6(table: Table, correlations: dict[str, Any]) -> list[Comparison]:
    """Soft-OR tells a token's worth better than either of its parts, however it is measured."""
    return [
        Comparison(
            f"{kind} correlation with {target}: soft_or minus {rival}",
            "correlation",
            "beats",
            Interval(*correlations[f"{target}_{kind}"]["soft_or_minus"][rival]),
        )
        for target in ("decrease", "gradient")
        for kind in ("spearman", "pearson")
        for rival in ("entropy", "divergence")
    ]


ESTIMATORS = (("eopd", "all"), ("eopd_sampled", "opd_sampled"))
"""EOPD against what it adds to, exact and as published."""


def _eopd(table: Table, setting: str, metric: str, unit: str, sign: int = 1) -> list[Comparison]:
    """EOPD minus what it adds to, or the other way round for a metric that should fall."""
    found = []
    for pair in ESTIMATORS:
        a, b = pair[::sign]
        if table.has(setting, a, b):
            interval = table.difference(setting, a, b, metric)
            label = f"{metric}, {setting}: {a} minus {b}"
            found.append(Comparison(label, unit, "beats", interval))
    return found


def e1(table: Table) -> list[Comparison]:
    """EOPD keeps entropy and diversity: both higher than without it, where they had collapsed."""
    return [
        *_eopd(table, "collapsed", "entropy", "nats"),
        *_eopd(table, "collapsed", "distinct", "completions"),
    ]


def e2(table: Table) -> list[Comparison]:
    """Lower forward KL where the teacher's entropy is high; in two settings, both needed."""
    return [
        *_eopd(table, "collapsed", "high_forward_kl", "nats", -1),
        *_eopd(table, "overconfident", "high_forward_kl", "nats", -1),
    ]


def e3(table: Table) -> list[Comparison]:
    """Higher pass@8 wherever it does not saturate: hidden starts, and the scarce setting."""
    return [
        *_eopd(table, "collapsed", "hidden_pass", "points"),
        *_eopd(table, "scarce", "pass", "points"),
    ]


def e4(table: Table) -> list[Comparison]:
    """More top-1 changes under a flat teacher than under a peaked one, at every rate tried."""
    return [
        Comparison(
            f"top-1 changes per step of 100 categoricals, rate {rate}: flat minus peaked teacher",
            "changes",
            "beats",
            mean_interval(
                table.seedwise("oscillation", f"changes_flat_{rate}")
                - table.seedwise("oscillation", f"changes_peaked_{rate}")
            ),
        )
        for rate in OSCILLATION_RATES
    ]


def e5(table: Table) -> list[Comparison]:
    """The renormalised top-k moves away from a flat teacher; the tail removes half of that."""
    kl = {
        form: table.seedwise("bias", f"forward_kl_{form}")
        for form in ("start", "full", "tail", "renorm")
    }
    lost = table.seedwise("bias", "entropy_start") - table.seedwise("bias", "entropy_renorm")
    cured = 0.5 * (kl["renorm"] - kl["full"]) - (kl["tail"] - kl["full"])
    return [
        Comparison("entropy lost under renorm", "nats", "beats", mean_interval(lost)),
        Comparison(
            "forward KL after renorm minus before",
            "nats",
            "beats",
            mean_interval(kl["renorm"] - kl["start"]),
        ),
        Comparison(
            "half of renorm's excess forward KL minus the tail's",
            "nats",
            "beats",
            mean_interval(cured),
        ),
    ]


CLAIMS: dict[str, str] = {
    "T1": "Entropy sampling at 50 % matches or beats all tokens.",
    "T2": "Soft-OR is at least as good as entropy at equal budget.",
    "T3": "Q3 at 10–20 % nearly matches all tokens and beats divergence at the same budget.",
    "T4": "The bottom 50 % are worse than a random 50 %.",
    "T5": "Entropy is blind to Q3; Soft-OR is not.",
    "T6": "Soft-OR tells what a token is worth better than entropy or divergence alone.",
    "E1": "EOPD keeps the student's entropy and diversity.",
    "E2": "EOPD lowers forward KL on tokens where the teacher's entropy is high.",
    "E3": "EOPD raises pass@8.",
    "E4": "One-sample reverse KL oscillates more under a high-entropy teacher.",
    "E5": "The renormalised top-k is biased on flat teachers; a tail bucket cures it.",
}
_FUNCTIONS: dict[str, Callable[[Table], list[Comparison]]] = {
    "T1": t1,
    "T2": t2,
    "T3": t3,
    "T4": t4,
    "T5": t5,
    "E1": e1,
    "E2": e2,
    "E3": e3,
    "E4": e4,
    "E5": e5,
}


def judge(table: Table, correlations: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every claim with its verdict and comparisons, as plain JSON values."""
    judged = {}
    for name, claim in CLAIMS.items():
        parts = t6(table, correlations) if name == "T6" else _FUNCTIONS[name](table)
        judged[name] = {
            "claim": claim,
            "rule": (t6 if name == "T6" else _FUNCTIONS[name]).__doc__,
            "verdict": overall(part.verdict for part in parts),
            "comparisons": [{**asdict(part), "verdict": part.verdict} for part in parts],
        }
    return judged
