"""docs/results/claims.md from the published JSON alone."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from claims_controls import PROMISED
from claims_markdown import difference, percent, signed, table, unsigned
from claims_text import CAVEATS, CUT, METHOD, SETTINGS
from claims_verdicts import RESOLUTION

COLUMNS = (
    ("mean", "mean@8 %", 100.0, 1),
    ("pass", "pass@8 %", 100.0, 1),
    ("hidden_pass", "hidden-start pass@8 %", 100.0, 1),
    ("distinct", "distinct", 1.0, 2),
    ("reverse_kl", "reverse KL", 1.0, 3),
    ("forward_kl", "forward KL", 1.0, 3),
    ("entropy", "entropy", 1.0, 3),
)


def page(results: dict[str, Any]) -> str:
    """The whole page as Markdown."""
    claims, design = results["claims"], results["design"]
    parts = [
        "# Which claims hold on the embedded tasks?",
        _introduction(results),
        _verdicts(claims, list(design["arms"])),
        _against(claims, results["earlier"]),
        _caveats(results),
        METHOD.format(
            problems=design["num_problems"],
            samples=design["num_samples"],
            seeds=f"{len(design['seeds'])} seeds",
        ),
        _controls(results["controls"]),
        "## The claims one by one",
        *(_claim(name, claim) for name, claim in claims.items()),
        _token_worth(results["token_worth"]),
        "## All arms",
        "![mean@8 by budget](images/claims-budgets.svg)",
        *(_setting(name, arms, results) for name, arms in results["arms"].items()),
        _learning_rates(results),
        CUT.format(seeds=len(design["sensitivity_seeds"])),
        _provenance(results),
    ]
    return "\n\n".join(parts) + "\n"


def _caveats(results: dict[str, Any]) -> str:
    judged = sum(len(claim["comparisons"]) for claim in results["claims"].values())
    figures = [figures for arms in results["arms"].values() for figures in arms.values()]
    listed = sum(name in figures for figures in figures for name in ("minus_all", "minus_random"))
    *others, last = (
        f"{100 * least:.0f} points" if unit == "points" else f"{least:g} {unit}"
        for unit, least in RESOLUTION.items()
    )
    resolution = f"{', '.join(others)} or {last}"
    verdicts = [v for claim in results["claims"].values() for v in claim["verdicts"].values()]
    decided = sum(verdict in ("supported", "contradicted here") for verdict in verdicts)
    return CAVEATS.format(
        judged=judged,
        listed=listed,
        resolution=resolution,
        num_verdicts=len(verdicts),
        decided=decided,
        false=_expected(results["controls"], results["claims"]),
        q3=_in_q3(results["cells"], "coins"),
    )


def _in_q3(cells: Sequence[dict[str, Any]], setting: str) -> str:
    """What Q3 is of the tokens of the first step, and of their reverse KL: a mean over seeds."""
    mine = [c for c in cells if (c["kind"], c["setting"], c["arm"]) == ("arm", setting, "all")]
    if not mine:
        return "how many of its tokens are in Q3 was not measured"
    share, kl = (fmean(c[name] for c in mine) for name in ("q3_share_first", "q3_kl_first"))
    return (
        f"{100 * share:.0f} % of its tokens are in Q3 and hold {100 * kl:.0f} % of the reverse KL"
    )


def _expected(controls: Sequence[dict[str, Any]] | None, claims: dict[str, Any]) -> str:
    """How many verdicts would be false, at the rates of arms compared with themselves."""
    num_verdicts = len(
        {
            (name, part["group"])
            for name, claim in claims.items()
            for part in claim["comparisons"]
            if part["test"] == "beats"
        }
    )
    rates = [row["beats"][0] for one in controls or () for row in one["all"]]
    if not rates:
        return "an unmeasured number of verdicts would be false"
    least, most = (f"{num_verdicts * rate:.1f}" for rate in (min(rates), max(rates)))
    return (
        f"{least} to {most} of the {num_verdicts} verdicts with a test *beats* would be false if "
        "other figures were as mean@8, pass@8 and entropy, in which the rates were measured"
    )


def _introduction(results: dict[str, Any]) -> str:
    note = ""
    if results["design"]["name"] != "full":
        note = (
            "\n\n**This is the quick check: too few seeds for verdicts that mean anything.** Run "
            "`make claims` for the real one."
        )
    if results["not_run"]:
        note += (
            f"\n\n**Cut short**: {len(results['not_run'])} runs are missing; the JSON names them."
        )
    return (
        "Claims about which tokens to train on and how: of TIP (T1 to T6), EOPD (E1 to E5), "
        "DIAL-OPD (D1 to D4), IER-OPD (I1), Sparse OPD (S1), OPSA (O1, O2), Semi-OPD (F1), IDA-OPD "
        "(A1), TrOPD (R1) and of earlier measurements of this project (P1 to P5), tested with "
        "seeds, controls and intervals. By what the rules win or lose is on [a page of its "
        "own](why.md). This page is generated from "
        f"`benchmarks/results/claims-{results['design']['name']}.json` by "
        "`python benchmarks/claims/claims.py --page`; do not edit it. TIP's claim about agents has "
        "[a page of its own](claims-agents.md)." + note
    )


def _verdicts(claims: dict[str, Any], settings: Sequence[str]) -> str:
    places = [*settings, "toy"]
    rows = [
        [
            f"[{name}](#{name.lower()})",
            claim["claim"],
            f"**{claim['agreement']}**",
            *(_in_setting(shown(claim), place) for place in places),
        ]
        for name, claim in claims.items()
    ]
    heads = ["", "claim", "in all", *(f"`{place}`" for place in places)]
    return (
        "## Verdicts\n\n"
        "One verdict a setting, with the exact loss and, behind *sampled*, with the loss of the "
        "sampled token. *Settings disagree*: supported in one and contradicted in another. *Cannot "
        "tell*: a match where all tokens gain nothing over the start, or a pass@8 that has no room "
        "to rise; such a setting does not count towards *in all*.\n\n"
        f"{table(heads, rows)}"
    )


def shown(claim: dict[str, Any]) -> dict[str, str]:
    """A claim's verdicts by setting and loss; where parts of it disagree, that is said."""
    contradicted = {c["group"] for c in claim["comparisons"] if c["verdict"] == "contradicted here"}
    return {
        place: PARTLY if verdict == "not supported" and place in contradicted else verdict
        for place, verdict in claim["verdicts"].items()
    }


PARTLY = "not supported, a part contradicted"


def _in_setting(verdicts: dict[str, str], setting: str) -> str:
    sampled = verdicts.get(f"{setting}, sampled loss")
    found = [verdicts.get(setting), f"*sampled*: {sampled}" if sampled else None]
    return "; ".join(text for text in found if text)


def _against(claims: dict[str, Any], earlier: dict[str, Any]) -> str:
    """What contradicts the papers and this project's earlier verdicts, by name."""
    rows = [
        [f"[{name}](#{name.lower()})", claim["source"], _by_verdict(shown(claim))]
        for name, claim in claims.items()
    ]
    changes, not_asked = [], []
    for name, verdicts in earlier["claims"].items():
        for place, before in verdicts.items():
            now = claims[name]["verdicts"].get(place)
            text = f"[{name}](#{name.lower()}) in {place}: {before}"
            if now is None:
                not_asked.append(text)
            elif now != before:
                changes.append(f"* {text}, now {now}.")
    said = "\n".join(changes) or "Every verdict that is given again is the same now."
    if not_asked:
        said += f"\n\nGiven then and not asked again: {'; '.join(not_asked)}."
    return (
        "## Against what was published\n\n"
        f"{table(['', 'who says so', 'here'], rows)}\n\n"
        "P1 to P5 are what this project had measured on the ledger task before this benchmark "
        f"(`experiments/LOG.md`). {_against_notes(claims)}\n\n"
        f"Against this project's own verdicts of {earlier['date']} (commit `{earlier['commit']}`; "
        "five seeds, eight where claims rested on them; one rate for both losses; by a fault of "
        "the harness every arm had stored rollouts):\n\n"
        f"{said}"
    )


def _against_notes(claims: dict[str, Any]) -> str:
    """Which of the notes' measurements the benchmark contradicts."""
    notes = [name for name in claims if name.startswith("P")]
    found = [
        f"[{name}](#{name.lower()}) in {_short(place)}"
        for name in notes
        for place, verdict in claims[name]["verdicts"].items()
        if verdict == "contradicted here"
    ]
    if not found:
        return "None of them is contradicted here."
    return f"Contradicted here: {', '.join(found)}."


def _by_verdict(verdicts: dict[str, str]) -> str:
    """The settings of each verdict, contradictions first."""
    order = ("contradicted here", "supported", PARTLY, "not supported", "cannot tell")
    found = {v: [place for place, other in verdicts.items() if other == v] for v in order}
    return "; ".join(
        f"{'**contradicted**' if v == order[0] else v} in {', '.join(map(_short, places))}"
        for v, places in found.items()
        if places
    )


def _short(group: str) -> str:
    return f"`{group.replace(', sampled loss', '+sampled')}`"


def _controls(found: Sequence[dict[str, Any]] | None) -> str:
    if not found:
        return "## False verdicts\n\nNot run: arms were not compared with themselves."

    def cells(row: dict[str, Any]) -> list[str]:
        share = row["matches_confirmed"]
        confirmed = "–" if share is None else f"{100 * share:.0f} %"
        rates = ("–" if row[test] is None else percent(row[test]) for test in PROMISED)
        return [str(row["group_size"]), *rates, confirmed]

    heads = ["seeds", *(f"{test}: false" for test in PROMISED), "matches: confirmed"]
    parts = []
    for one in found:
        claims = [[str(row["num_comparisons"]), str(row["num_disjoint"]), *cells(row)]
                  for row in one["all"]]  # fmt: skip
        singles = [[f"`{row['arm']}`", row["metric"], *cells(row)]
                   for row in one["rows"] if row["num_comparisons"] == 1]  # fmt: skip
        parts.append(
            f"In `{one['setting']}`, {one['num_cells']} seeds an arm, {one['num_draws']} draws an "
            "arm, metric and number of seeds. Over all arms, and those of the metrics in which "
            "claims ask a test, by comparisons of a claim; *disjoint*: draws that share no "
            "cell.\n\n"
            f"{table(['comparisons', 'disjoint', *heads], claims)}\n\n"
            f"Claims of one comparison, by arm and metric:\n\n"
            f"{table(['arm', 'metric', *heads], singles)}"
        )
    promised = ", ".join(f"{100 * p:g} % for *{test}*" for test, p in PROMISED.items())
    return (
        "## False verdicts\n\n"
        "Arms compared with themselves: disjoint groups of an arm's seeds were drawn, one as the "
        "baseline and the others as the arms of a claim, and judged by the code of the verdicts. "
        "*Seeds*: those of a group. *False*: *beats* supported or contradicted, *matches* "
        "contradicted. The 95 % interval of a single comparison promises at most "
        f"{promised}; a claim of several has one verdict and no promise. Intervals account for "
        "cells that draws share; at a share of 0 % or 100 % they are the exact binomial "
        "(Clopper–Pearson) ones, with the number of disjoint draws of one arm as the number of "
        "trials (that of a table over all arms, divided by their number): all arms have the same "
        "seeds. They are far wider than those of a share just above 0 %, of which it is known how "
        "much it varies with the cells. Metrics are mean@8, pass@8 and entropy. A dash: no claim "
        "asks that test of that metric. The two sides of a comparison have different prompts "
        "and samples, so that their differences vary more than those of paired arms: the last "
        "column, how often *matches* would be supported, is the power for a true match without "
        "pairing. An arm differs from itself in no problem, two arms may: of other problems, "
        "comparisons of two arms can be wrong more often.\n\n" + "\n\n".join(parts)
    )


def _claim(name: str, claim: dict[str, Any]) -> str:
    verdicts = "; ".join(f"{place}: **{v}**" for place, v in shown(claim).items()) or "Not run"
    text = (
        f"### {name}\n\n**{claim['claim']}** {verdicts}.\n\n"
        f"Source: {claim['source']}\n\nRule: {claim['rule']}"
    )
    if claim["comparisons"]:
        picture = f"![Comparisons of {name}](images/claims-{name}.svg)"
        text += f"\n\n{_comparisons(claim['comparisons'])}\n\n{picture}"
    if claim["beside"]:
        text += f"\n\nBeside it, not counted:\n\n{_comparisons(claim['beside'])}"
    return text


def _comparisons(comparisons: Sequence[dict[str, Any]]) -> str:
    rows = [
        [c["label"], difference(c), str(c["num_seeds"]), c["test"], c["verdict"], c["reading"]]
        for c in comparisons
    ]
    heads = ["comparison", "difference [95 %]", "seeds", "test", "verdict", "reading"]
    return table(heads, rows)


def _token_worth(worth: dict[str, Any]) -> str:
    columns = [f"{t}_{k}" for t in ("decrease", "gradient") for k in ("spearman", "pearson")]
    rows = [
        [rule, *(unsigned(worth[column]["score"][rule], 2) for column in columns)]
        for rule in worth[columns[0]]["score"]
    ]
    quadrants = ", ".join(
        f"{name.upper()} {entry['mean_decrease']:.1e} (n = {entry['num_tokens']})"
        for name, entry in worth["quadrants"].items()
    )
    heads = ["score", *(column.replace("_", ", ") for column in columns)]
    return (
        "### What a token is worth\n\n"
        f"{worth['num_tokens']} tokens drawn at random from the first batches of all seeds. "
        "*gradient*: squared norm of the gradient g of a token's reverse KL over all parameters. "
        "*decrease*: g·G, G being the gradient of the whole batch's mean reverse KL: by how much "
        "that mean falls, per unit of learning rate, in a small gradient step on the token alone. "
        "`random` is the control. Few of the tokens are in Q3, as few tokens are; Pearson's "
        "correlation hangs on them. Changed after a first full run, verdict rules untouched: "
        "*decrease* was measured by a step of rate 0.01, which overshot for the tokens with the "
        "largest gradients.\n\n"
        f"{table(heads, rows)}\n\n"
        f"Mean decrease by quadrant, nats per unit of learning rate: {quadrants}."
    )


def _setting(name: str, arms: dict[str, Any], results: dict[str, Any]) -> str:
    setting = results["design"]["settings"][name]
    design = results["design"]
    columns = [column for column in COLUMNS if column[0] in arms["start"]]
    rows = [[f"`{arm}`", *_figures(figures, columns)] for arm, figures in arms.items()]
    heads = ["arm", *(title for _, title, _, _ in columns)]
    rates = " and ".join(
        f"{entry['chosen']:g} ({loss} loss)"
        for loss, entry in results["learning_rate"][name].items()
    )
    heads += ["mean@8 − all", "mean@8 − random", "tokens trained", "KL kept", "Q3 kept"]
    return (
        f"### Setting `{name}`\n\n{SETTINGS[name]} Student `{setting['student']}`, "
        f"{setting['num_steps']} steps of {setting['prompts_per_step']} rollouts, learning rate "
        f"{rates}, {len(design['seeds'])} seeds. "
        f"`start` is the student before training. {_against_start(arms)}\n\n{table(heads, rows)}"
    )


def _against_start(arms: dict[str, Any]) -> str:
    """How many arms improved the student and how many harmed it."""
    triples = [f["minus_start"]["mean"] for f in arms.values() if "minus_start" in f]
    above, below = sum(low > 0 for _, low, _ in triples), sum(high < 0 for _, _, high in triples)
    return (
        f"Of {len(triples)} arms {above} end with a mean@8 above it, {below} below it, and for "
        f"{len(triples) - above - below} the interval holds 0."
    )


def _figures(figures: dict[str, Any], columns: Sequence[tuple[str, str, float, int]]) -> list[str]:
    cells = [
        unsigned([scale * x for x in figures[key]], digits) for key, _, scale, digits in columns
    ]
    for name in ("minus_all", "minus_random"):
        cells.append(signed([100 * x for x in figures[name]["mean"]]) if name in figures else "")
    trained = figures.get("tokens_trained")
    cells.append(f"{trained[0]:,.0f}" if trained else "")
    shares = (figures.get(name) for name in ("kl_kept", "q3_kept_first"))
    return [*cells, *(f"{100 * share[0]:.0f} %" if share else "" for share in shares)]


def _learning_rates(results: dict[str, Any]) -> str:
    return (
        "## Learning rates\n\n"
        "The all-token arm of every setting and loss, with seeds and held-out prompts of their "
        "own: the divergence that decides, and mean@8. Chosen in bold: the lowest reverse KL; in "
        "`collapsed`, whose reverse KL no rate lowers, the lowest forward KL among the rates that "
        f"keep four fifths of the best accuracy with the worst seed.{_edges(results)}\n\n"
        f"{_grid(results)}\n\n"
        "The claims' differences again at half, once and double the setting's rate, where that was "
        f"run ({len(results['design']['sensitivity_seeds'])} seeds; once: all seeds):\n\n"
        f"{_sensitivity(results)}"
    )


def _edges(results: dict[str, Any]) -> str:
    """Settings whose best rate may lie outside of what was tried."""
    found = [
        f" `{setting}` with the {loss} loss takes the last of the rates on one side: its best may "
        "lie beyond."
        for setting, losses in results["learning_rate"].items()
        for loss, entry in losses.items()
        if entry["chosen"] in (min(map(float, entry["grid"])), max(map(float, entry["grid"])))
    ]
    return "".join(found)


def _grid(results: dict[str, Any]) -> str:
    rows = []
    for setting, losses in results["learning_rate"].items():
        for loss, entry in losses.items():
            row = [f"`{setting}`, {loss} loss, {entry['by'].replace('_', ' ').replace('kl', 'KL')}"]
            for rate, figures in entry["grid"].items():
                text = f"{figures[entry['by']]:.3f} nats, {100 * figures['mean']:.1f} %"
                row.append(f"**{text}**" if float(rate) == entry["chosen"] else text)
            rows.append(row)
    return table(["setting", *(f"{rate:g}" for rate in results["design"]["grid"])], rows)


def _sensitivity(results: dict[str, Any]) -> str:
    rows = []
    for entry in results["sensitivity"]:
        row = [entry["claim"], entry["label"]]
        row += [f"{difference(c)}: {c['verdict']}" for c in entry["at"].values()]
        rows.append(row)
    factors = results["sensitivity"][0]["at"] if rows else ()
    return table(["", "comparison", *(f"rate × {float(factor):g}" for factor in factors)], rows)


def _provenance(results: dict[str, Any]) -> str:
    environment = results["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items())
    return (
        "## Where the numbers come from\n\n"
        f"{environment['cpu']}, {environment['hardware']['cpu_count']} cores, one thread a "
        f"process; {results['core_minutes']['cpu']:.0f} core-minutes of processor time, that is "
        f"{results['core_minutes']['cpu'] / 2:.0f} minutes on two cores "
        f"({results['core_minutes']['wall'] / 2:.0f} by the clock, beside other work); "
        f"{versions}; source `{results['source']}`, commit "
        f"{', '.join(f'`{c[:12]}`' for c in results['commits'])}; {environment['date'][:10]}. "
        "The same seeds give the same numbers on the same kind of machine: "
        "`python benchmarks/claims/claims.py --verify 4` runs four random cells again (`--verify "
        "all` every one) and compares every number and a hash of the final weights. Every cell is "
        "in the JSON."
    )
