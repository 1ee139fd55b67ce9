"""One verdict a claim and setting, by rules that were fixed before the runs.

A claim is taken apart into comparisons (`claims_rules`), in groups of one setting and kind of loss.
Each comparison has a 95 % interval and is judged by one of four tests. In a group the claim is
*supported* when all comparisons are, *contradicted here* when at least one is contradicted and none
supported, and *not supported* otherwise; where groups differ, that is said. A comparison *cannot
tell* where there is nothing to lose or no room to gain (`obstacle`). No correction is made for the
number of comparisons: *supported* needs all of a group's, which errs on the strict side, and
*contradicted here* needs one, which does not (`claims_controls` measures both).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from claims_arms import TUNED, Loss, loss_of
from claims_probe import OSCILLATION_RATES
from claims_rules import CLAIMS, PROBED, TOY, Claim, Difference
from claims_statistics import mean_interval
from claims_table import Table
from tutelage.evaluation.metrics import Interval

Verdict: TypeAlias = Literal["supported", "not supported", "contradicted here", "cannot tell"]

MARGIN = 0.02
"""Accuracy that still counts as a match, 2 points: about the width of what five seeds resolve."""
NEARLY_MARGIN = 0.03
"""How far below zero the interval of a "nearly" may reach, 3 points."""
SHARE_MARGIN = 0.05
"""Share of Q3 tokens by which entropy may exceed chance and still be blind to them."""
SATURATED = 0.9
"""A pass@k above which another arm has no room to be better by a difference that matters."""
RESOLUTION = {
    "points": MARGIN,
    "nats": 0.05,
    "completions": 0.2,
    "correlation": 0.05,
    "changes": 0.5,
}
"""The smallest difference that matters, by unit. It decides what is said, no verdict."""


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


def obstacle(
    test: str, metric: str, verdict: Verdict, gain: Interval | None, level: float
) -> str | None:
    """Why a comparison cannot tell, whatever its interval; None where it can.

    An arm that learns nothing matches all tokens where these gain nothing, and no arm beats one
    that solves nearly all problems. What is contradicted, or supported in spite of that, stays.

    Args:
        test: by which the two arms are compared.
        metric: in which.
        verdict: by the interval of their difference alone.
        gain: what all tokens with the arms' loss gain over the start, in that metric; None where
            the start has no such metric.
        level: the metric of the arm that is to be matched or beaten.
    """
    if test in ("matches", "nearly") and verdict == "supported":
        return "nothing to lose" if gain is not None and gain.low <= MARGIN else None
    is_full = metric in ("pass", "hidden_pass") and level >= SATURATED
    return "saturated" if test == "beats" and verdict == "not supported" and is_full else None


@dataclass(frozen=True)
class Comparison:
    """One difference that a claim is about; positive speaks for the claim unless a test differs."""

    label: str
    unit: str
    test: str
    interval: Interval
    num_seeds: int
    group: str = ""
    """What its verdict is about: a setting and kind of loss."""
    obstacle: str | None = None
    """Why it cannot tell; see `obstacle`."""

    @property
    def verdict(self) -> Verdict:
        return "cannot tell" if self.obstacle else TESTS[self.test](self.interval)

    @property
    def reading(self) -> str:
        """Whether "not supported" was measured, or is all that so wide an interval can say."""
        if self.obstacle:
            return self.obstacle
        i = self.interval
        least = SHARE_MARGIN if self.test == "is_blind" else RESOLUTION[self.unit]
        if self.verdict != "not supported":
            return "decided"
        if self.test == "beats" and i.high < least:
            return "a tie" if i.low > -least else "not ahead"
        if self.test in ("matches", "nearly") and i.high < 0:
            return "worse, perhaps by less than the margin"
        return "too noisy to say" if i.high - i.low > least else "at the limit"

    def as_table(self) -> dict[str, Any]:
        """Everything about it but its group as plain JSON values."""
        table = asdict(self) | {"verdict": self.verdict, "reading": self.reading}
        del table["group"], table["obstacle"]
        return table


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """Verdict of a claim from those of its comparisons; see the module."""
    found = set(verdicts)
    if found == {"supported"}:
        return "supported"
    if "contradicted here" in found and "supported" not in found:
        return "contradicted here"
    if "cannot tell" in found and found <= {"supported", "cannot tell"}:
        return "cannot tell"
    return "not supported"


def compare(table: Table, d: Difference) -> Comparison:
    """The measured difference, over every seed that both of its arms have."""
    interval = table.difference(d.setting, d.a, d.b, d.metric)
    num_seeds = len(table.seeds_of(d.setting, d.a, d.b))
    why = obstacle(
        d.test,
        d.metric,
        TESTS[d.test](interval),
        gain(table, d.setting, loss_of(d.a), d.metric),
        table.interval(d.setting, d.b, d.metric).value,
    )
    return Comparison(d.label, d.unit, d.test, interval, num_seeds, d.group, why)


def gain(table: Table, setting: str, loss: Loss, metric: str = "mean") -> Interval | None:
    """What all tokens gain over the start with a loss; None where the start has no such metric."""
    all_tokens = TUNED[loss]
    if not table.has(setting, "start", all_tokens):
        return None
    if not table.has_metric(setting, "start", metric):
        return None
    return table.difference(setting, all_tokens, "start", metric)


def _whole_groups(table: Table, differences: Sequence[Difference]) -> list[Comparison]:
    """Comparisons of the groups all of whose arms were run: a verdict needs all of a group's."""
    lacking = {d.group for d in differences if not table.has(d.setting, d.a, d.b)}
    return [compare(table, d) for d in differences if d.group not in lacking]


def verdicts_of(comparisons: Iterable[Comparison]) -> dict[str, Verdict]:
    """The verdict of each group of a claim's comparisons."""
    groups: dict[str, list[Verdict]] = {}
    for comparison in comparisons:
        groups.setdefault(comparison.group, []).append(comparison.verdict)
    return {group: overall(verdicts) for group, verdicts in groups.items()}


def agreement(verdicts: Iterable[Verdict]) -> str:
    """What all groups say of a claim, or that they disagree."""
    found = set(verdicts)
    if len(found) > 1:
        found.discard("cannot tell")
    if len(found) < 2:
        return found.pop() if found else "not run"
    if {"supported", "contradicted here"} <= found:
        return "settings disagree"
    return "supported in part" if "supported" in found else "contradicted in part"


def _worth(table: Table, correlations: dict[str, Any]) -> list[Comparison]:
    return [
        Comparison(
            f"{kind} correlation with {target}: soft_or minus {rival}",
            "correlation",
            "beats",
            Interval(*correlations[f"{target}_{kind}"]["soft_or_minus"][rival]),
            len(table.probe_seeds),
            PROBED,
        )
        for target in ("decrease", "gradient")
        for kind in ("spearman", "pearson")
        for rival in ("entropy", "divergence")
    ]


def _oscillation(table: Table, when: str) -> list[Comparison]:
    title = {"changes": "top-1 changes", "late": "top-1 changes after burn-in"}[when]
    return [
        Comparison(
            f"{title} per step of 100 categoricals, rate {rate}: flat minus peaked teacher",
            "changes",
            "beats",
            mean_interval(
                table.seedwise("oscillation", f"{when}_flat_{rate}")
                - table.seedwise("oscillation", f"{when}_peaked_{rate}")
            ),
            len(table.probe_seeds),
            TOY,
        )
        for rate in OSCILLATION_RATES
    ]


def _bias(table: Table) -> list[Comparison]:
    kl = {
        form: table.seedwise("bias", f"forward_kl_{form}")
        for form in ("start", "full", "tail", "renorm")
    }
    lost = table.seedwise("bias", "entropy_start") - table.seedwise("bias", "entropy_renorm")
    cured = 0.5 * (kl["renorm"] - kl["full"]) - (kl["tail"] - kl["full"])
    measured = {
        "entropy lost under renorm": lost,
        "forward KL after renorm minus before": kl["renorm"] - kl["start"],
        "half of renorm's excess forward KL minus the tail's": cured,
    }
    return [
        Comparison(label, "nats", "beats", mean_interval(values), len(values), TOY)
        for label, values in measured.items()
    ]


def _measured(
    name: str, claim: Claim, table: Table, correlations: dict[str, Any]
) -> tuple[list[Comparison], list[Comparison]]:
    """What a claim is judged by, and what stands beside it."""
    match name:
        case "T6":
            return _worth(table, correlations), []
        case "E4":
            return _oscillation(table, "changes"), _oscillation(table, "late")
        case "E5":
            return _bias(table), []
    return _whole_groups(table, claim.differences), _whole_groups(table, claim.beside)


def judge(table: Table, correlations: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every claim with its verdict and comparisons, as plain JSON values."""
    judged = {}
    for name, claim in CLAIMS.items():
        parts, beside = _measured(name, claim, table, correlations)
        verdicts = verdicts_of(parts)
        judged[name] = {
            "claim": claim.text,
            "rule": claim.rule,
            "source": claim.source,
            "agreement": agreement(verdicts.values()),
            "verdicts": verdicts,
            "comparisons": [part.as_table() | {"group": part.group} for part in parts],
            "beside": [part.as_table() for part in beside],
        }
    return judged


def sensitivity(tables: dict[str, Table]) -> list[dict[str, Any]]:
    """The claims' differences that every table can measure, one table a learning rate."""
    return [
        {
            "claim": name,
            "label": d.label,
            "unit": d.unit,
            "test": d.test,
            "at": {factor: compare(table, d).as_table() for factor, table in tables.items()},
        }
        for name, claim in CLAIMS.items()
        for d in (*claim.differences, *claim.beside)
        if all(table.has(d.setting, d.a, d.b) for table in tables.values())
    ]
