"""docs/claims.md from the published JSON alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from claims_figures import SCALE

CAVEATS = """\
## Read this first

* **The damage creates Q3 by construction.** The overconfident student was trained on wrong
  arithmetic until it was sure of it. Confidently wrong tokens are what it has to unlearn, and rules
  that look for them meet their best case.
* **The students are copies of the teacher** (`small` apart): the same architecture and nearly the
  same weights, damaged for a minute. Every token's lesson is within reach. Real pairs are not so.
* **Learning rates were tuned once, on the all-token arm of `overconfident`, and then shared.** A
  rule with a rate of its own could do better; the section on sensitivity shows half and double.
  `collapsed` takes half of that rate and `small` a quarter, because the all-token arm lost most of
  its accuracy at the full one; even so both end below their start, so E1 to E3 are judged on
  students that distillation also damages, and "`small` does not improve" rests on one rate.
* **The design was trimmed while the full run went on**, for want of time: `random-50`,
  `soft_or-50`, `random-10` and `q3-10` of `collapsed`, `random-50` and `soft_or-50` of `small`, and
  the third sensitivity seed. Every finished cell is in the results; no verdict rests on a trimmed
  one. But whether Q3 or EOPD ruins the collapsed student under `q3-10+eopd` is therefore open.
* **"Not supported" often means that five seeds are too few**: several intervals are wider than the
  margin of their test.
* **This says nothing about large models.** It is one synthetic task, half a million parameters and
  a few hundred rollouts. A verdict here is about the claim on this task; it neither confirms nor
  refutes what anybody measured elsewhere.
* **The rules of the verdicts were fixed before the runs**, in `benchmarks/claims_verdicts.py`; the
  history of that file and the commit below show it. Intervals are not corrected for the number of
  comparisons; a claim needs all of its comparisons instead.
* **Arms dropped on the way.** The machine was busy, and while the run went on these were taken out
  of the design: the arms of `collapsed` that only select, `random-50` and `soft_or-50` of `small`,
  and the third seed of the sensitivity run. No verdict rests on them."""

METHOD = """\
## How it was measured

All arms of a setting and seed share starting weights, prompts of every step and the random numbers
of sampling; they differ in the loss alone. They take equal numbers of steps, so arms that keep
fewer tokens train on fewer. Every arm is measured on the same {problems} held-out problems with
{samples} completions each at temperature 1.

* **mean@8, pass@8**: a completion is right only if every step of it is.
* **hidden start**: of the right completions only those count that begin with one particular item,
  which the prompt does not tell. pass@8 then does not saturate and asks for varied work: a student
  that knows one order solves one problem in five.
* **distinct**: different right completions per problem among 8.
* **reverse KL, forward KL, entropy**: nats, means over the tokens of the student's own completions
  of the held-out problems; *high* forward KL: only where the teacher's entropy is at least 0.8.
* **KL kept**: share of the batch's reverse KL on the kept tokens, mean over steps. Where it is
  100 % at 50 %, rules differ only in which solved tokens they add.
* **local_oracle** is a ratio of two numbers that both vanish on solved tokens; nothing keeps it
  from ranking those first.
* **Q3**: entropy at most 0.5 and reverse KL above 0.5 nats; kept share at the first step.
* **Intervals** are 95 %, bootstrapped over seeds and problems at once ({seeds} seeds), or t where a
  figure has one number a seed. Differences are paired by seed and problem.

A comparison is *supported* or *contradicted* by one of four tests: **beats** (interval above or
below 0), **matches** (interval above −2 points, or wholly below), **nearly** (at most 2 points
below and the interval above −3 points; contradicted if wholly below −2) and **is_blind** (at most 5
points above chance). A claim is supported when all of its comparisons are, contradicted here when
at least one is contradicted and none supported, and not supported otherwise."""

SETTINGS = {
    "overconfident": "The main comparison.",
    "scarce": "The same student with so few prompts and steps that pass@8 cannot reach 1. (Longer "
    "ledgers are no harder setting: the teacher, taught on at most five items, fails on six.) "
    "Four steps at the shared rate are few: an arm that ends below `start` did harm.",
    "collapsed": "A student that is right but knows one order of work, for the claims of EOPD.",
    "small": "A narrower student trained from scratch. On-policy distillation of this length does "
    "not improve it under any arm tried: a negative result, kept for that reason.",
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
        CAVEATS,
        METHOD.format(
            problems=results["design"]["num_problems"],
            samples=results["design"]["num_samples"],
            seeds=len(results["design"]["seeds"]),
        ),
        "## The claims one by one",
        *(_claim(name, claim) for name, claim in claims.items()),
        _token_worth(results["token_worth"]),
        "## All arms",
        "![mean@8 by budget](images/claims-budgets.svg)",
        *(_setting(name, arms, results) for name, arms in results["arms"].items()),
        _sensitivity(results),
        _provenance(results),
    ]
    return "\n\n".join(parts) + "\n"


def _introduction(results: dict[str, Any]) -> str:
    note = ""
    if results["design"]["name"] != "full":
        note = (
            "\n\n**This is the quick check: too few seeds for verdicts that mean anything.** Run "
            "`make claims` for the real one."
        )
    if results["not_run"]:
        note += "\n\nNot run, or not with every seed: " + ", ".join(results["not_run"]) + "."
    return (
        "Claims of two papers, TIP (token selection, T1 to T6) and EOPD (entropy-gated forward KL, "
        "E1 to E5), tested with seeds, controls and intervals. This page is generated from "
        f"`benchmarks/results/claims-{results['design']['name']}.json` by "
        "`python benchmarks/claims.py --page`; do not edit it." + note
    )


def _verdicts(claims: dict[str, Any]) -> str:
    rows = []
    for name, claim in claims.items():
        count = Counter(c["verdict"] for c in claim["comparisons"])
        tally = ", ".join(f"{n} {verdict}" for verdict, n in count.items())
        rows.append(
            [f"[{name}](#{name.lower()})", claim["claim"], f"**{claim['verdict']}**", tally]
        )
    return "## Verdicts\n\n" + table(["", "claim", "verdict", "comparisons"], rows)


def _claim(name: str, claim: dict[str, Any]) -> str:
    rows = []
    for comparison in claim["comparisons"]:
        scale, i = SCALE.get(comparison["unit"], 1.0), comparison["interval"]
        triple = [scale * i[key] for key in ("value", "low", "high")]
        number = signed(triple, 1 if scale == 100 else 3)
        text = f"{number} {comparison['unit']}"
        rows.append([comparison["label"], text, comparison["test"], comparison["verdict"]])
    columns = ["comparison", "difference [95 %]", "test", "verdict"]
    return (
        f"### {name}\n\n**{claim['claim']}** Verdict: **{claim['verdict']}**.\n\n"
        f"Rule: {claim['rule']}\n\n{table(columns, rows)}\n\n"
        f"![Comparisons of {name}](images/claims-{name}.svg)"
    )


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
        "correlation hangs on them. Changed after the first full run, verdict rules untouched: "
        "*decrease* was measured by a step of rate 0.01, which overshot for the tokens with the "
        "largest gradients.\n\n"
        f"{table(heads, rows)}\n\n"
        f"Mean decrease by quadrant, nats per unit of learning rate: {quadrants}."
    )


def _setting(name: str, arms: dict[str, Any], results: dict[str, Any]) -> str:
    setting = results["design"]["settings"][name]
    rate = results["learning_rate"]["chosen"] * setting["rate_scale"]
    rows = [[f"`{arm}`", *_figures(figures)] for arm, figures in arms.items()]
    heads = ["arm", *(title for _, title, _, _ in COLUMNS)]
    heads += ["mean@8 − all", "mean@8 − random", "tokens trained", "KL kept", "Q3 kept"]
    return (
        f"### Setting `{name}`\n\n{SETTINGS[name]} Student `{setting['student']}`, "
        f"{setting['num_steps']} steps of {setting['prompts_per_step']} rollouts, learning rate "
        f"{rate:g}, {len(results['design']['seeds'])} seeds. `start` is the student before "
        f"training.\n\n{table(heads, rows)}"
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


def _sensitivity(results: dict[str, Any]) -> str:
    found = results["sensitivity"]
    rate, grid = results["learning_rate"]["chosen"], results["learning_rate"]["mean_at_8"]
    heads = ["arm", *(f"rate × {float(factor):g}" for factor in found)]
    rows = [
        [f"`{arm}`", *(_percent(arms.get(arm)) for arms in found.values())] for arm in found["1.0"]
    ]
    tried = ", ".join(f"{key}: {100 * mean:.1f} %" for key, mean in grid.items())
    return (
        "## Learning rate\n\n"
        f"Tuned on the all-token arm of `overconfident` with two seeds of their own, mean@8: "
        f"{tried}. Chosen: {rate:g}. mean@8 in % at half, once and double that rate "
        f"({len(results['design']['sensitivity_seeds'])} seeds):\n\n{table(heads, rows)}"
    )


def _percent(triple: Sequence[float] | None) -> str:
    return "" if triple is None else unsigned([100 * x for x in triple], 1)


def _provenance(results: dict[str, Any]) -> str:
    environment = results["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items())
    return (
        "## Where the numbers come from\n\n"
        f"{environment['cpu']}, {environment['hardware']['cpu_count']} cores, one thread a "
        f"process; {results['core_minutes']:.0f} core-minutes; {versions}; commit "
        f"{', '.join(f'`{c[:12]}`' for c in results['commits'])}; {environment['date'][:10]}. "
        "The same seeds give the same numbers on the same kind of machine: "
        "`python benchmarks/claims.py --verify 4` runs four random cells again and compares "
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
