"""What the rules of several runs keep of the held-out prompts that all of them recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.report import text
from tutelage.report.records import RunRecord, TokenRecord
from tutelage.report.tokens import QUADRANTS, Row, cuts_of, quadrant, rows_of

HELD_OUT = "held-out"
_NUM_SHOWN = 6


@dataclass(frozen=True)
class _Arm:
    """One run on the shared prompts at one step."""

    name: str
    rule: str
    records: dict[str, TokenRecord]
    """By prompt."""

    @property
    def rows(self) -> list[Row]:
        return rows_of([*self.records.values()])

    def keeps(self, row: Row) -> bool:
        return self.rule == "all" or row.is_kept(self.rule)

    def kept_of(self, prompt_id: str) -> set[tuple[str, int]]:
        rows = rows_of([self.records[prompt_id]])
        return {(prompt_id, row.index) for row in rows if self.keeps(row)}


def kept_tables(runs: Sequence[tuple[str, RunRecord]]) -> list[text.Table]:
    """What each run's own rule keeps, and how far the rules agree on the same tokens.

    Args:
        runs: (name, run), the baseline first.

    Returns:
        The first table at the last step that all runs recorded. The second at the first such
        step, on the prompts which all completed alike; it is left out where there are none.
        Nothing at all unless every run has recorded tokens and the choice of its own rule.
    """
    steps = [{r.step for r in run.tokens if r.kind == HELD_OUT} for _, run in runs]
    shared = set.intersection(*steps)
    if not shared:
        return []
    first, last = (_arms(runs, step) for step in (min(shared), max(shared)))
    found = [_kept_table(last, max(shared), runs[0][1].config)] if last else []
    agreement = _agreement_table(first, min(shared)) if first else None
    return [*found, *([agreement] if agreement else [])]


def _arms(runs: Sequence[tuple[str, RunRecord]], step: int) -> list[_Arm]:
    """The runs on the prompts they share; none if one has no prompt or no choice to show."""
    arms = []
    for name, run in runs:
        here = [r for r in run.tokens if (r.step, r.kind, r.sample) == (step, HELD_OUT, 0)]
        arms.append(_Arm(name, _own_rule(run.config), {r.prompt_id: r for r in here}))
    prompts = set.intersection(*({*arm.records} for arm in arms))
    arms = [_Arm(a.name, a.rule, {p: a.records[p] for p in sorted(prompts)}) for a in arms]
    is_known = all(a.rule == "all" or a.rule in r.kept for a in arms for r in a.records.values())
    return arms if prompts and is_known and all(arm.rows for arm in arms) else []


def _own_rule(config: dict[str, Any]) -> str:
    match config.get("selection"):
        case {"rule": str(rule)}:
            return rule
    return "all"


def _kept_table(arms: Sequence[_Arm], step: int, config: dict[str, Any]) -> text.Table:
    cuts = cuts_of([row for arm in arms for row in arm.rows], config)

    def share(arm: _Arm, rows: Sequence[Row]) -> str:
        return text.percent(sum(map(arm.keeps, rows)) / len(rows)) if rows else text.MISSING

    def line(label: str, cell: Callable[[_Arm], str]) -> list[str]:
        return [label, *(cell(arm) for arm in arms)]

    def kept_of(number: int) -> Callable[[_Arm], str]:
        return lambda arm: share(arm, [r for r in arm.rows if quadrant(r, cuts) == number])

    rows = [
        line("", lambda arm: arm.name),
        line("rule", lambda arm: text.visible(arm.rule, 40)),
        line("tokens", lambda arm: text.number(len(arm.rows))),
        line("reverse KL, nats per token", lambda arm: text.number(_mean_kl(arm.rows))),
        line("kept tokens", lambda arm: share(arm, arm.rows)),
        line("KL mass on kept tokens", lambda arm: text.percent(_kept_mass(arm))),
        *(line(f"kept of Q{q}, {name}", kept_of(q)) for q, name in QUADRANTS.items()),
        line("kept most often", _most_kept),
    ]
    caption = (
        f"The {len(arms[0].records)} held-out prompts that all runs recorded, completed by each "
        f"student at step {step}. Quadrants are cut at {cuts[0]:.3g} nats of entropy and "
        f"{cuts[1]:.3g} nats of divergence for all of them."
    )
    return text.Table("What each rule keeps", rows, caption=caption)


def _agreement_table(arms: Sequence[_Arm], step: int) -> text.Table | None:
    """Jaccard index of the runs' own rules on the completions that are the same in all runs."""
    alike = [
        prompt for prompt in arms[0].records
        if len({_said(arm.records[prompt]) for arm in arms}) == 1
    ]  # fmt: skip
    if not alike:
        return None
    kept = [set().union(*(arm.kept_of(p) for p in alike)) for arm in arms]

    def overlap(a: set[tuple[str, int]], b: set[tuple[str, int]]) -> str:
        return f"{len(a & b) / len(a | b):.2f}" if a | b else text.MISSING

    names = [f"{arm.name}: {text.visible(arm.rule, 40)}" for arm in arms]
    rows = [["", *names]]
    rows += [
        [n, *(overlap(mine, other) for other in kept)] for n, mine in zip(names, kept, strict=True)
    ]
    caption = (
        f"Jaccard index on the {len(alike)} held-out completions that are the same in all runs at "
        f"step {step}: 1 where two rules keep the same tokens, 0 where they share none."
    )
    return text.Table("How far the rules agree", rows, caption=caption)


def _said(record: TokenRecord) -> tuple[tuple[int, ...], tuple[tuple[int, str], ...]]:
    """The tokens of a completion, and what was inserted between them."""
    return tuple(record.token), tuple(record.inserted or ())


def _mean_kl(rows: Sequence[Row]) -> float:
    return sum(row.reverse_kl for row in rows) / len(rows)


def _kept_mass(arm: _Arm) -> float | None:
    mass = sum(row.reverse_kl for row in arm.rows)
    return sum(r.reverse_kl for r in arm.rows if arm.keeps(r)) / mass if mass > 0 else None


def _most_kept(arm: _Arm) -> str:
    """Token texts by how often the rule keeps them, with that count."""
    texts = {key: value for record in arm.records.values() for key, value in record.texts.items()}
    counts = Counter(row.record.token[row.index] for row in arm.rows if arm.keeps(row))
    return " · ".join(
        f"{_shown(texts.get(str(token), f'id {token}'))} {count}"
        for token, count in counts.most_common(_NUM_SHOWN)
    )


def _shown(token: str) -> str:
    return text.visible(token, 20).replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
