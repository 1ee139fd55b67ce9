"""docs/results/claims-lm.md from the cells of claims_lm.py, whole or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import isfinite
from typing import Any

from claims_lm_design import SCALES, Scale, cell_of, cells, tuning_cells
from claims_lm_provenance import CONTINUE, pairs, provenance
from claims_lm_published import against
from claims_lm_rules import ARMS, CLAIMS, METRICS, TUNED
from claims_lm_table import (
    Table,
    controls,
    gain,
    judge,
    place_of,
    places,
    power,
    rates_of,
    summary,
    tables,
    tuned,
)
from claims_lm_text import CHANGES, HOW
from claims_markdown import table
from claims_verdicts import MARGIN, SATURATED


def page(results: dict[str, Any]) -> str:
    """The page as Markdown, whatever of the cells is there."""
    records = results["cells"]
    found = tables(records)
    judged = {table.name: judge(table) for table in found}
    parts = [
        "# Which rules win on a real language model?",
        "Teacher and student are SmolLM2-135M, trained by `scripts/build_lm_pair.py`. This page "
        "is generated from `benchmarks/results/claims-lm.json` by "
        "`python benchmarks/claims/claims_lm.py --page`; do not edit it. Arms, differences and the "
        "rules of the verdicts were committed before the first cell (`claims_lm_rules.py`). "
        f"{CHANGES}" + _looks(found),
        _missing(results),
        _verdicts(judged),
        _cannot_tell(found),
        against(judged),
        _power(found),
        _controls(found),
        *(_claims(table, judged[table.name]) for table in found),
        *(_arms(table) for table in found),
        _rates(results),
        pairs(results),
        provenance(results),
        HOW,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _looks(found: Sequence[Table]) -> str:
    """Seeds that were added after verdicts were known, and the level that pays for it."""
    again = {one.scale.name: one.scale for one in found if one.scale.num_looks > 1}
    return " ".join(
        f"Size `{scale.name}`: seeds were added for all arms after the verdicts of fewer seeds "
        f"were known, so that verdicts were looked at {scale.num_looks} times. Its intervals, "
        f"over all seeds, are of {_percent(scale)} and not of 95 % (Bonferroni)."
        for scale in again.values()
    )


def _percent(scale: Scale) -> str:
    return f"{100 * scale.level:g} %"


def _missing(results: dict[str, Any]) -> str:
    """Which cells are not there, by task and size."""
    records, lines = results["cells"], []
    for place in places(records):
        task, name, device, _ = place
        scale = SCALES[name]
        rates = rates_of(tuned(records, place))
        mine = [r for r in records if place_of(r) == place]
        there = set(map(cell_of, mine))
        planned = [*tuning_cells(scale, task), *cells(scale, task, rates)]
        lost = [cell for cell in planned if cell not in there]
        text = f"* {task} ({name}, {device}): {len(planned) - len(lost)} of {len(planned)} cells."
        if more := sum(cell.loss in rates for cell in there.difference(planned)):
            text += f" {more} more are in no table: their rate is no longer the chosen one."
        if lost:
            arms = Counter(f"{c.loss} {c.arm}" if c.kind == "arm" else "tuning" for c in lost)
            text += " Not run: " + ", ".join(f"{arm} ({n})" for arm, n in arms.items()) + "."
        untuned = [loss for loss, arm in TUNED.items() if arm in scale.arms and loss not in rates]
        if untuned:
            text += f" Not tuned yet, and not counted: the arms of {_losses(untuned)}."
        lines.append(text)
    if not lines:
        return f"**No cell has been run.** `{CONTINUE}` starts, and continues where it stopped."
    head = f"What has been run (`{CONTINUE}` continues; numbers of missing cells in brackets):"
    return head + "\n\n" + "\n".join([*lines, *_lacking(records)])


def _lacking(records: Sequence[dict[str, Any]]) -> list[str]:
    """What the benchmark is made for and no cell is of: a task, a kind of device, arms."""
    lines = []
    if not any(record["task"] == "gsm8k" for record in records):
        lines.append(
            "* **No pair of GSM8K was run.** `scripts/build_lm_pair.py --task gsm8k` makes one; "
            "the accuracy of its teacher is not known."
        )
    if not any(place_of(record)[2] != "cpu" for record in records):
        lines.append(
            "* **No cell was run on a GPU**: the larger size is not measured, which has more "
            "steps, problems, seeds and rates."
        )
    run = {record["arm"] for record in records}
    if arms := [arm for arm in ARMS if arm not in run]:
        names = ", ".join(f"`{arm}`" for arm in arms)
        lines.append(f"* Arms that were not run at all: {names}.")
    return lines


def _verdicts(judged: dict[str, Any]) -> str:
    if not judged:
        return ""
    rows = []
    for name, claim in CLAIMS.items():
        mine = [setting[name] for setting in judged.values()]
        known = {one["verdict"] for one in mine}
        split = "**settings disagree**" if {"supported", "contradicted here"} <= known else ""
        rows.append([name, claim.text, *map(_verdict, mine), split])
    heads = ["", "claim", *judged, ""]
    return (
        "## Verdicts\n\n" + table(heads, rows) + "\n\n"
        "A setting is a task, a loss and a size of run. A claim is judged where all of its "
        "differences have all seeds." + _undecided(judged)
    )


def _undecided(judged: dict[str, Any]) -> str:
    verdicts = {one["verdict"] for setting in judged.values() for one in setting.values()}
    if verdicts & {"supported", "contradicted here"} or verdicts == {None}:
        return ""
    return " **No claim is supported or contradicted by these cells.**"


def _verdict(one: dict[str, Any]) -> str:
    undecided = ("not supported", "cannot tell")
    if one["verdict"] in undecided:
        parts = {c["verdict"] for c in one["comparisons"]}
        readings = {c["reading"] for c in one["comparisons"] if c["verdict"] in undecided}
        if "contradicted here" in parts:
            readings.add("a part contradicted")
        return f"**{one['verdict']}** ({', '.join(sorted(readings))})"
    if one["verdict"]:
        return f"**{one['verdict']}**"
    seeds = min((c["num_seeds"] for c in one["comparisons"]), default=0)
    return f"not judged ({seeds} seeds)" if seeds else "not run"


def _cannot_tell(found: Sequence[Table]) -> str:
    """The rule that came after the cells, with what decides it in each setting."""
    gains = [(one.name, gain(one)) for one in found]
    told = "; ".join(
        f"{name}: {_signed([i.value, i.low, i.high], 'points')}"
        for name, i in gains
        if i is not None and isfinite(i.low)
    )
    if not told:
        return ""
    margin = f"{100 * MARGIN:g} points"
    return (
        "*Cannot tell (nothing to lose)*: *matches* or *nearly* would be supported by its "
        f"interval, but all tokens with that loss do not certainly gain more than {margin} over "
        "the start, and an arm that gains nothing could pass the same test. *Cannot tell "
        f"(saturated)*: *beats* is not supported, at a pass@k of {100 * SATURATED:g} % or more, "
        f"which leaves no room. Accuracy of all tokens minus that of the start: {told}."
    )


def _power(found: Sequence[Table]) -> str:
    rows, widths = [], {}
    for one in found:
        for metric, p in (power(one) or {}).items():
            factor, unit = (100, "points") if p["unit"] == "points" else (1, p["unit"])
            numbers = [f"{factor * p[n]:.3g} {unit}" for n in _POWER]
            needed = ["–", "–"]  # no verdict is given by a divergence
            if metric == "mean":
                widths[one.name] = p["half_width"]
                needed = [_above(p["half_width"]), _above(p["half_width"] - MARGIN)]
            row = [one.name, METRICS[metric][0], str(p["num_seeds"])]
            rows.append([*row, *numbers, *needed])
    if not rows:
        return (
            "## What the design can see\n\nNot known yet: it follows from the differences of at "
            "least two seeds."
        )
    heads = ["setting", "figure", "seeds", "sd of paired differences", "detectable", "half-width"]
    heads += ["*beats* needs", "*matches* needs"]
    margin = f"{100 * MARGIN:g} points"
    wide = [name for name, width in widths.items() if width > MARGIN]
    text = (
        "*sd*: the standard deviation over seeds of an arm's difference from all tokens, pooled "
        "over the arms. *Detectable*: the true difference for which a t-interval over the seeds "
        "(of 95 %, or as said above) excludes 0 in four of five cases. Verdicts are given "
        "by the wider, at each end, of that t-interval and of a bootstrap over seeds and problems, "
        "so that they need at least as much. *Half-width*: the median of those wider intervals "
        "over the same differences. At that half-width h an observed difference is *beats: "
        "supported* above h and *contradicted* below −h; *matches: supported* above h − "
        f"{margin} and *contradicted* below −h − {margin}."
    )
    if wide:
        text += (
            f" In {' and '.join(wide)} h is larger than the margin of {margin}: an arm that is "
            "observed to be exactly as accurate as the other one is not found to match it there, "
            "only one that is ahead."
        )
    return f"## What the design can see\n\n{table(heads, rows)}\n\n{text}"


def _above(accuracy: float) -> str:
    return f"above {100 * accuracy:+.1f} points".replace("-", "−")


_POWER = ("paired_sd", "detectable", "half_width")


def _controls(found: Sequence[Table]) -> str:
    rows = [
        [
            one.name,
            c["arm"],
            c["metric"],
            _signed(c["interval"], c["unit"]),
            str(c["num_seeds"]),
            "yes" if c["is_false_positive"] else "no",
        ]
        for one in found
        for c in controls(one)
    ]
    if not rows:
        return "## A/A controls\n\nNot run yet."
    heads = ["setting", "arm", "figure", "difference [interval]", "seeds", "told apart"]
    return (
        "## A/A controls\n\nThe same arm under two sets of seeds; nothing but chance can tell "
        "them apart.\n\n" + table(heads, rows)
    )


def _claims(one: Table, judged: dict[str, Any]) -> str:
    rows = [
        [
            name if part == "comparisons" else f"({name})",
            c["label"],
            _signed([c["interval"][key] for key in ("value", "low", "high")], c["unit"]),
            str(c["num_seeds"]),
            c["test"],
            c["verdict"] if c["num_seeds"] == len(one.scale.seeds) else "seeds are missing",
            c["reading"],
        ]
        for name, claim in judged.items()
        for part in ("comparisons", "beside")
        for c in claim[part]
    ]
    if not rows:
        return ""
    heads = [
        "claim",
        "difference",
        f"[{_percent(one.scale)}]",
        "seeds",
        "test",
        "verdict",
        "reading",
    ]
    note = "A claim in brackets: the difference stands beside it and does not count."
    return f"## Differences: {one.name}\n\n{table(heads, rows)}\n\n{note}"


def _arms(one: Table) -> str:
    rows = []
    for arm, figures in summary(one).items():
        trained = figures["tokens_trained"]
        kept = figures["kl_kept"]
        rows.append(
            [
                arm,
                str(figures["num_seeds"]),
                *(_value(figures[metric], METRICS[metric][1]) for metric in METRICS),
                "–" if trained is None else f"{trained:.0f}",
                "–" if kept is None else f"{100 * kept:.0f} %",
                f"{figures['seconds']:.0f}",
            ]
        )
    heads = ["arm", "seeds", *(title for title, _ in METRICS.values())]
    heads += ["tokens trained", "KL kept", "seconds a cell"]
    level = f"Intervals of {_percent(one.scale)} over seeds and problems."
    return f"## Arms: {one.name}\n\n{level}\n\n{table(heads, rows)}"


def _rates(results: dict[str, Any]) -> str:
    rows, edges = [], ""
    for place in places(results["cells"]):
        for loss, entry in tuned(results["cells"], place).items():
            title, unit = METRICS[entry["figure"]]
            factor, digits = (100, 1) if unit == "points" else (1, 4)
            grid = ", ".join(f"{r}: {factor * x:.{digits}f}" for r, x in entry["grid"].items())
            rows.append([*place[:3], _losses([loss]), f"{entry['chosen']:g}", title, grid])
            edges += _edge(f"{place[0]}, {_losses([loss])} ({place[1]})", entry)
    if not rows:
        return ""
    heads = ["task", "size", "device", "loss", "rate", "figure", "by rate (nats, or %)"]
    return (
        "## Learning rates\n\nThe rate of all arms of a loss is the one at which all tokens reach "
        "the lowest reverse KL on other problems of the test, under seeds of their own. OPSA, "
        "which has no teacher, takes the rate with its highest accuracy there. Differences "
        f"between neighbouring rates may be chance: a rate has one run, or two.{edges}"
        f"\n\n{table(heads, rows)}"
    )


def _losses(names: Sequence[str]) -> str:
    """Losses in words."""
    return " and ".join("OPSA" if name == "own" else f"{name} loss" for name in names)


def _edge(setting: str, entry: dict[str, Any]) -> str:
    """Says it where the best rate may lie outside of what was tried."""
    grid = [float(rate) for rate in entry["grid"]]
    for end, which, side in ((min(grid), "lowest", "below"), (max(grid), "highest", "above")):
        if entry["chosen"] == end:
            return f" `{setting}` takes the {which} rate of the grid: its best may lie {side}."
    return ""


# --- Markdown -------------------------------------------------------------------------------------


def _signed(triple: Sequence[float], unit: str) -> str:
    factor, digits = (100, 1) if unit == "points" else (1, 3)
    value, low, high = (f"{factor * x:+.{digits}f}" for x in triple)
    return f"{value} [{low}, {high}] {unit}".replace("-", "−")


def _value(triple: Sequence[float | None] | None, unit: str) -> str:
    if triple is None:
        return "–"
    factor, digits = {"points": (100, 1), "tokens": (1, 1)}.get(unit, (1, 3))
    value, *bounds = (None if x is None else f"{factor * x:.{digits}f}" for x in triple)
    text = str(value) if None in bounds else f"{value} [{bounds[0]}, {bounds[1]}]"
    return text.replace("-", "−")
