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
    mine, elsewhere = ({*verdicts.values()} & {FOR, AGAINST} for verdicts in (here, there))
    said = [_beside_paper(name, here)]
    if not there:
        return said[0]
    if not mine:
        decided = "decided in some of the embedded settings"
        said.append(decided if elsewhere else "the embedded tasks do not decide it")
    elif mine == elsewhere:
        said.append("agrees with the embedded tasks")
    elif not elsewhere:
        said.append("the embedded tasks do not decide it")
    else:
        said.append("**differs from the embedded tasks** in some settings")
    return "; ".join(said)


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
    found = {
        "sampled" if "sampled" in place else "exact" for place, v in here.items() if v == verdict
    }
    return " and the ".join(sorted(found))


_PAPER = {FOR: "agrees with the paper", AGAINST: "**differs from the paper**"}
