"""docs/results/claims.md from the published JSON alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from claims_figures import SCALE
from claims_verdicts import RESOLUTION

CAVEATS = """\
## Read this first

* **The damage creates Q3 by construction.** The overconfident student was trained on wrong
  arithmetic until it was sure of it. Confidently wrong tokens are what it has to unlearn, and rules
  that look for them meet their best case.
* **Small students are best cases.** The students are copies of the teacher (`small` apart): the
  same architecture and nearly the same weights, damaged for a minute. Every token's lesson is
  within reach. Real pairs are not so.
* **This says nothing about large models.** It is one synthetic task, half a million parameters and
  a few hundred rollouts. A verdict here is about the claim on this task; it neither confirms nor
  refutes what anybody measured elsewhere.
* **Learning rates are tuned on the all-token arm alone**, setting by setting and by one rule (the
  lowest reverse KL on held-out prompts), and shared by all arms of the setting. A rule with a rate
  of its own could do better; half and double are shown below. An earlier run shared one rate, tuned
  by accuracy on `overconfident`, with a half and a quarter of it, set by hand, for `collapsed` and
  `small`, and took 20 steps everywhere but in `scarce`; the rules of the verdicts have not changed
  since.
* **"Not supported" is of two kinds**, told apart in the column *reading*. *A tie* and *not ahead*
  were measured: the interval leaves no room for a gain of {resolution}. *Too noisy to
  say* means that the interval is wider than the margin which decides: the seeds are too few. *At
  the limit*: narrower than that margin, and across the limit.
* **Many comparisons are made.** {judged} are judged, and the tables of arms hold {listed} more
  differences, none corrected for their number: one 95 % interval in twenty misses the truth, so
  about {expected} of the judged ones may. A claim needs all of its comparisons, which errs on the
  strict side for *supported*; a pair picked from the tables afterwards has no such protection.
* **The rules of the verdicts were fixed before the runs**, in
  `benchmarks/claims/claims_rules.py` and `claims_verdicts.py`; their history and the commit below
  show it."""

METHOD = """\
## How it was measured

All arms of a setting and seed share starting weights, prompts of every step and the random numbers
of sampling; they differ in the loss alone. They take equal numbers of steps, so arms that keep
fewer tokens train on fewer. Every arm is measured on the same {problems} held-out problems with
{samples} completions each at temperature 1. Every arm has {seeds} seeds; arms that a verdict rests
on have {more} more, because seeds, not problems, limit the intervals. Verdicts use all seeds that
both arms have, tables of arms the {seeds} common ones.

* **mean@8, pass@8**: a completion is right only if every step of it is.
* **hidden start**: of the right completions only those count that begin with one particular item,
  which the prompt does not tell. pass@8 then does not saturate and asks for varied work: a student
  that knows one order solves one problem in five.
* **distinct**: different right completions per problem among 8.
* **reverse KL, forward KL, entropy**: nats, means over the tokens of the student's own completions
  of the held-out problems; *high* forward KL: only where the teacher's entropy is at least 0.8.
* **KL kept**: share of the batch's reverse KL on the kept tokens, mean over steps. Where it is
  100 % at 50 %, rules differ only in which solved tokens they add.
* **local_oracle** is TIP's local weight computed exactly: a step length, which ranks solved tokens
  first. **local_gain** is what that step gains ([equations](../equations.md)).
* **Q3**: entropy at most 0.5 and reverse KL above 0.5 nats; kept share at the first step.
* **Intervals** are 95 %, bootstrapped over seeds and problems at once (for correlations: seeds and,
  within them, tokens), or t where a figure has one number a seed. Differences are paired by seed
  and problem.

A comparison is *supported* or *contradicted* by one of four tests: **beats** (interval above or
below 0), **matches** (interval above −2 points, or wholly below), **nearly** (at most 2 points
below and the interval above −3 points; contradicted if wholly below −2) and **is_blind** (at most 5
points above chance). A claim is supported when all of its comparisons are, contradicted here when
at least one is contradicted and none supported, and not supported otherwise. What stands *beside* a
claim is measured and judged likewise and does not count."""

SETTINGS = {
    "overconfident": "The main comparison.",
    "scarce": "The harder setting: the same student with so few prompts and steps that pass@8 "
    "cannot reach 1. (Longer ledgers are none: the teacher, taught on at most five items, fails on "
    "six.)",
    "collapsed": "A student that is right but knows one order of work, for the claims of EOPD.",
    "small": "A narrower student trained from scratch.",
}
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
    claims = results["claims"]
    parts = [
        "# Which claims hold on the embedded task?",
        _introduction(results),
        _verdicts(claims),
        _caveats(results),
        METHOD.format(
            problems=results["design"]["num_problems"],
            samples=results["design"]["num_samples"],
            seeds=len(results["design"]["seeds"]),
            more=len(results["design"]["more_seeds"]),
        ),
        "## The claims one by one",
        *(_claim(name, claim) for name, claim in claims.items()),
        _token_worth(results["token_worth"]),
        "## All arms",
        "![mean@8 by budget](images/claims-budgets.svg)",
        *(_setting(name, arms, results) for name, arms in results["arms"].items()),
        _learning_rates(results),
        _provenance(results),
    ]
    return "\n\n".join(parts) + "\n"


def _caveats(results: dict[str, Any]) -> str:
    judged = sum(len(claim["comparisons"]) for claim in results["claims"].values())
    figures = [figures for arms in results["arms"].values() for figures in arms.values()]
    listed = sum(name in figures for figures in figures for name in ("minus_all", "minus_random"))
    resolution = f"{100 * RESOLUTION['points']:.0f} points or {RESOLUTION['nats']:g} nats"
    return CAVEATS.format(
        judged=judged, listed=listed, expected=round(judged / 20), resolution=resolution
    )


def _introduction(results: dict[str, Any]) -> str:
    note = ""
    if results["design"]["name"] != "full":
        note = (
            "\n\n**This is the quick check: too few seeds for verdicts that mean anything.** Run "
            "`make claims` for the real one."
        )
    if results["not_run"]:
        seeds = sorted({int(name.split(" seed ")[1].split()[0]) for name in results["not_run"]})
        note += (
            f"\n\n**Cut short**: {len(results['not_run'])} runs are missing, of seeds "
            f"{', '.join(map(str, seeds))}; the JSON names them."
        )
    return (
        "Claims of two papers, TIP (token selection, T1 to T6) and EOPD (entropy-gated forward KL, "
        "E1 to E5), tested with seeds, controls and intervals. This page is generated from "
        f"`benchmarks/results/claims-{results['design']['name']}.json` by "
        "`python benchmarks/claims/claims.py --page`; do not edit it. TIP's claim about agents has "
        "[a page of its own](claims-agents.md)." + note
    )


def _verdicts(claims: dict[str, Any]) -> str:
    rows = []
    for name, claim in claims.items():
        count = Counter(c["verdict"] for c in claim["comparisons"])
        tally = ", ".join(f"{n} {verdict}" for verdict, n in count.items())
        readings = Counter(
            c["reading"] for c in claim["comparisons"] if c["verdict"] == "not supported"
        )
        if readings:
            tally += f" ({', '.join(f'{n} {reading}' for reading, n in readings.items())})"
        contradicted = "; ".join(
            c["label"] for c in claim["comparisons"] if c["verdict"] == "contradicted here"
        )
        head = f"[{name}](#{name.lower()})"
        rows.append([head, claim["claim"], f"**{claim['verdict']}**", tally, contradicted])
    heads = ["", "claim", "verdict", "comparisons", "contradicted parts"]
    return "## Verdicts\n\n" + table(heads, rows)


def _claim(name: str, claim: dict[str, Any]) -> str:
    text = (
        f"### {name}\n\n**{claim['claim']}** Verdict: **{claim['verdict']}**.\n\n"
        f"Rule: {claim['rule']}\n\n{_comparisons(claim['comparisons'])}\n\n"
        f"![Comparisons of {name}](images/claims-{name}.svg)"
    )
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


def difference(comparison: dict[str, Any]) -> str:
    """A comparison's difference with its interval and unit."""
    scale, i = SCALE.get(comparison["unit"], 1.0), comparison["interval"]
    triple = [scale * i[key] for key in ("value", "low", "high")]
    return f"{signed(triple, 1 if scale == 100 else 3)} {comparison['unit']}"


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
    rows = [[f"`{arm}`", *_figures(figures)] for arm, figures in arms.items()]
    heads = ["arm", *(title for _, title, _, _ in COLUMNS)]
    heads += ["mean@8 − all", "mean@8 − random", "tokens trained", "KL kept", "Q3 kept"]
    return (
        f"### Setting `{name}`\n\n{SETTINGS[name]} Student `{setting['student']}`, "
        f"{setting['num_steps']} steps of {setting['prompts_per_step']} rollouts, learning rate "
        f"{results['learning_rate'][name]['chosen']:g}, {len(results['design']['seeds'])} seeds. "
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


def _figures(figures: dict[str, Any]) -> list[str]:
    cells = [
        unsigned([scale * x for x in figures[key]], digits) for key, _, scale, digits in COLUMNS
    ]
    for name in ("minus_all", "minus_random"):
        cells.append(signed([100 * x for x in figures[name]["mean"]]) if name in figures else "")
    if "tokens_trained" in figures:
        cells.append(f"{figures['tokens_trained'][0]:,.0f}")
        cells += [f"{100 * figures[name][0]:.0f} %" for name in ("kl_kept", "q3_kept_first")]
    else:
        cells += ["", "", ""]
    return cells


def _learning_rates(results: dict[str, Any]) -> str:
    return (
        "## Learning rates\n\n"
        "The all-token arm of every setting, with two seeds of their own: reverse KL on held-out "
        f"prompts, which decides, and mean@8. Chosen in bold.{_edges(results)}\n\n"
        f"{_grid(results)}\n\n"
        "The claims' differences again at half, once and double the setting's rate, where that was "
        f"run ({len(results['design']['seeds'])} seeds; once: all seeds):\n\n"
        f"{_sensitivity(results)}"
    )


def _edges(results: dict[str, Any]) -> str:
    """Settings whose best rate may lie outside of what was tried."""
    found = [
        f" `{setting}` takes the last of the rates on one side: its best may lie beyond."
        for setting, entry in results["learning_rate"].items()
        if entry["chosen"] in (min(map(float, entry["grid"])), max(map(float, entry["grid"])))
    ]
    return "".join(found)


def _grid(results: dict[str, Any]) -> str:
    rows = []
    for setting, entry in results["learning_rate"].items():
        row = [f"`{setting}`"]
        for rate, figures in entry["grid"].items():
            text = f"{figures['reverse_kl']:.3f} nats, {100 * figures['mean']:.1f} %"
            row.append(f"**{text}**" if float(rate) == entry["chosen"] else text)
        rows.append(row)
    rates = next(iter(results["learning_rate"].values()))["grid"]
    return table(["setting", *rates], rows)


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
        "`python benchmarks/claims/claims.py --verify 4` runs four random cells again and compares "
        "every number and a hash of the final weights. Every cell is in the JSON."
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def signed(triple: Sequence[float], digits: int = 1) -> str:
    """A difference with its sign and its interval."""
    value, low, high = triple
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]".replace("-", "−")


def unsigned(triple: Sequence[float], digits: int) -> str:
    """A value with its interval."""
    value, low, high = triple
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]".replace("-", "−")
