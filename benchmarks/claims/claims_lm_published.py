"""The verdicts of claims_lm.py beside what papers say and what the embedded tasks gave."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from claims_lm_rules import CLAIMS, NO_PAPER, OTHER_RULES, PAPER_LOSS, SOURCES
from claims_markdown import table
from claims_rules import CLAIMS as EMBEDDED_CLAIMS

EMBEDDED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "claims-full.json"
FOR, AGAINST = "supported", "contradicted here"


def against(judged: dict[str, Any]) -> str:
    """The section: of every claim its source, the verdicts here and there, and what differs."""
    if not judged:
        return ""
    there = embedded()
    rows = []
    for name, claim in CLAIMS.items():
        here = {place: found[name]["verdict"] for place, found in judged.items()}
        mine = {place: verdict for place, verdict in here.items() if verdict}
        theirs = there.get(name, {})
        told = by_verdict(theirs) or "not in the results"
        if theirs and name in OTHER_RULES:
            told += f" ({OTHER_RULES[name]})"
        row = [name, claim.text, source_of(name), by_verdict(mine) or "not run", told]
        rows.append([*row, in_words(name, mine, theirs)])
    heads = ["", "claim", "who says so", "here", "embedded tasks", "compared"]
    return (
        f"## Against what was published\n\n{table(heads, rows)}\n\n"
        "The embedded tasks' verdicts are those of [their page](claims.md) on claims of the same "
        "name; in brackets where the rule there is another one. *Not in the results*: "
        f"`benchmarks/results/{EMBEDDED.name}` has no verdict of that name."
    )


def source_of(name: str) -> str:
    """Who makes a claim, with the numbers of the paper."""
    return SOURCES.get(name) or EMBEDDED_CLAIMS[name].source


def embedded() -> dict[str, dict[str, str]]:
    """Verdicts on the embedded tasks by claim and setting."""
    if not EMBEDDED.exists():
        return {}
    claims = json.loads(EMBEDDED.read_text(encoding="utf-8"))["claims"]
    return {name: claim["verdicts"] for name, claim in claims.items()}


def by_verdict(verdicts: dict[str, str]) -> str:
    """The settings of each verdict, contradictions first."""
    order = sorted(set(verdicts.values()), key=lambda v: (v != AGAINST, v != FOR, v))
    return "; ".join(
        f"{'**contradicted**' if v == AGAINST else v} in "
        + ", ".join(f"`{place}`" for place, other in verdicts.items() if other == v)
        for v in order
    )


def in_words(name: str, here: Mapping[str, str], there: Mapping[str, str]) -> str:
    """How the verdicts here differ from the paper, which makes the claim, and from those there.

    Args:
        name: of the claim.
        here: verdicts by setting, which names its loss.
        there: of the embedded tasks.
    """
    if not here:
        return "not run here"
    said = _beside_paper(name, here)
    return f"{said}; {_beside_embedded(here, there)}" if there else said


def _beside_embedded(here: Mapping[str, str], there: Mapping[str, str]) -> str:
    """The same of the embedded tasks; only verdicts with the same loss are compared."""
    mine, theirs = _decided(here), _decided(there)
    if not theirs:
        return "the embedded tasks do not decide it"
    if not mine:
        return "decided in some of the embedded settings"
    common = {loss for loss, _ in mine} & {loss for loss, _ in theirs}
    if not common:
        return "the embedded tasks decide it with the other loss alone"
    if {one for one in mine if one[0] in common} == {one for one in theirs if one[0] in common}:
        return "agrees with the embedded tasks"
    return "**differs from the embedded tasks** in some settings"


def _decided(verdicts: Mapping[str, str]) -> set[tuple[str, str]]:
    """Losses with verdicts that are for or against."""
    return {(loss_of(place), v) for place, v in verdicts.items() if v in (FOR, AGAINST)}


def loss_of(place: str) -> str:
    """The loss of a setting, by its name here or on the embedded tasks."""
    return "sampled" if "sampled loss" in place else "exact"


def _beside_paper(name: str, here: Mapping[str, str]) -> str:
    """The same of the paper alone: with which losses it is decided, and whether with its own."""
    decided = {v: _losses(here, v) for v in (FOR, AGAINST) if v in here.values()}
    if not decided:
        return "undecided here" + (
            "" if name in NO_PAPER else ", neither for nor against the paper"
        )
    if name in NO_PAPER:
        return "decided here; no paper says it in this form"
    said = " and ".join(f"{_PAPER[v]} with the {losses} loss" for v, losses in decided.items())
    of_paper = PAPER_LOSS.get(name)
    if of_paper and not any(of_paper in losses for losses in decided.values()):
        return f"{said}, but not decided with the {of_paper} loss, which is the paper's"
    return said


def _losses(here: Mapping[str, str], verdict: str) -> str:
    return " and the ".join(sorted({loss for loss, v in _decided(here) if v == verdict}))


_PAPER = {FOR: "agrees with the paper", AGAINST: "**differs from the paper**"}
