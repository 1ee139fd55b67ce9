"""The verdicts of claims_lm.py beside what papers say and what the embedded tasks gave."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from claims_lm_rules import CLAIMS, OTHER_RULES, SOURCES
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
        rows.append([*row, in_words(mine.values(), theirs.values())])
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


def in_words(here: Iterable[str], there: Iterable[str]) -> str:
    """How the verdicts here differ from the paper, which makes the claim, and from those there."""
    mine, theirs = set(here), set(there)
    if not mine:
        return "not run here"
    decided, elsewhere = mine & {FOR, AGAINST}, theirs & {FOR, AGAINST}
    said = [_PAPER[frozenset(decided)]]
    if not theirs:
        return said[0]
    if decided == elsewhere:
        said.append("agrees with the embedded tasks")
    elif not decided:
        said.append("says nothing about the embedded tasks' verdicts")
    elif not elsewhere:
        said.append("the embedded tasks do not decide it")
    else:
        said.append("**differs from the embedded tasks** in some settings")
    return "; ".join(said)


_PAPER = {
    frozenset(()): "undecided here, neither for nor against the paper",
    frozenset((FOR,)): "agrees with the paper",
    frozenset((AGAINST,)): "**differs from the paper**",
    frozenset((FOR, AGAINST)): "**differs from the paper** in one setting, agrees in another",
}
"""By the verdicts that are decided in any setting here."""
