"""docs/results/why.md from the published JSON alone: what the rules keep, and how that moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum
from typing import Any

import torch
from torch import Tensor

from claims_arms import ARMS, Arm
from claims_markdown import signed, table
from claims_statistics import mean_interval, spearman
from tutelage.config.method import KLObjective, NoWeighting
from tutelage.config.selection import AllTokens

NUM_TEXTS = 6
"""Texts that are named of each rule."""
LEAST_COUNT = 10
"""Tokens of a text below which its ratio is chance."""

INTRODUCTION = """\
# By what the rules win or lose

Which tokens the rules keep of the same completions of one seed: {prompts} held-out prompts,
completed by the student before training. Generated from `benchmarks/results/claims-{name}.json`
and, of the real model, `claims-lm.json` by `python benchmarks/claims/claims.py --page`; do not edit
it. Who wins is on [the page of the claims](claims.md) and [that of the real model](claims-lm.md);
the formulas are in [the equations](../equations.md).

* **KL, gradient**: share of all tokens' reverse KL, and of the norms of their logit gradients
  (of the exact reverse KL), that lies on the kept ones.
* **preferred**: texts of tokens by how many times as often the rule keeps them as it keeps any
  token (texts of at least {least} tokens; ␣ is a space, ↵ a line break). **Preferred behind**: the
  same by the text of the token before; (start) is the start of the completion.

At 20 % `extreme_advantage` keeps fewer tokens than the other rules: 10 % at each end, each rounded
down."""


def why_page(results: dict[str, Any], of_models: Mapping[str, Any] | None = None) -> str:
    """The whole page as Markdown.

    Args:
        results: of the embedded tasks.
        of_models: what the JSON of claims_lm.py holds of choices, by task, size, device and pair.
    """
    design = results["design"]
    parts = [
        INTRODUCTION.format(
            prompts=design["num_choice_prompts"], name=design["name"], least=LEAST_COUNT
        )
    ]
    for setting in design["choice_settings"]:
        cells = [c for c in results["cells"] if c["setting"] == setting and c.get("choices")]
        start = next(c["choices"] for c in cells if c["arm"] == "start")
        trained = {c["arm"]: c["choices"] for c in cells if c["arm"] != "start"}
        parts += [
            f"## Setting `{setting}`",
            _explained(setting, results["cells"], _rate(results, setting)),
            _kept(start),
            _overlap(start["overlap"]),
            _moved(trained, results["arms"][setting]),
        ]
    for found in (of_models or {}).values():
        trained = {arm: found["arms"][arm] for arm in found["arms"] if arm != "start"}
        start = found["arms"]["start"]
        parts += [
            f"## SmolLM2-135M, `{found['task']}`",
            f"{found['num_prompts']} problems that no arm is judged on, seed {found['seed']}, "
            "exact loss (`opsa-20` trains without a teacher).",
            _kept(start),
            _overlap(start["overlap"]),
            _moved(trained),
        ]
    return "\n\n".join(parts) + "\n"


def _rate(results: dict[str, Any], setting: str) -> float:
    """Of all arms with the exact loss; some were also run at half and double of it."""
    rate: float = results["learning_rate"][setting]["exact"]["chosen"]
    return rate


def _explained(setting: str, cells: Sequence[dict[str, Any]], rate: float) -> str:
    """How far the KL that an arm's tokens hold, and their number, tell how well it ends."""
    arms = [name for name, arm in ARMS.items() if _selects(arm)]
    what = ("arm", setting, rate)
    mine = {
        (cell["arm"], cell["seed"]): cell
        for cell in cells
        if (cell["kind"], cell["setting"], cell["learning_rate"]) == what and cell["arm"] in arms
    }
    names = sorted({arm for arm, _ in mine}, key=arms.index)
    seeds = sorted({seed for _, seed in mine})

    def column(figure: str, seed: int) -> Tensor:
        return torch.tensor([float(mine[name, seed][figure]) for name in names])

    found = {
        figure: torch.tensor(
            [[spearman(column(figure, seed), column("mean", seed))] for seed in seeds]
        )
        for figure in ("kl_kept", "tokens_trained")
    }
    by_kl, by_number = found["kl_kept"], found["tokens_trained"]
    return (
        f"### What goes with a good end\n\nOver the {len(names)} arms that select tokens with the "
        "exact loss, Spearman's rank correlation of mean@8 with the share of the KL that was kept "
        f"in training is {_in_words(by_kl)}, with the number of tokens trained "
        f"{_in_words(by_number)}; the first minus the second {_in_words(by_kl - by_number)}. Mean "
        f"over {len(seeds)} seeds, with the 95 % t-interval over them. Arms of one rule at several "
        "budgets are not independent."
    )


def _selects(arm: Arm) -> bool:
    """Whether an arm differs from all tokens with the exact loss in its selection alone."""
    is_plain = isinstance(arm.objective, KLObjective) and arm.rollouts == "live"
    is_weighted = not isinstance(arm.weighting, NoWeighting)
    return is_plain and not is_weighted and not isinstance(arm.selection, AllTokens)


def _in_words(values: Tensor) -> str:
    found = mean_interval(values)
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]".replace("-", "−")


def _kept(start: dict[str, Any]) -> str:
    rows = [
        [
            f"`{rule}`",
            *(_percent(found[f"{name}_kept"]) for name in ("tokens", "kl", "gradient")),
            *(_preferred(found, name) for name in ("texts", "before")),
        ]
        for rule, found in start["rules"].items()
    ]
    heads = ["rule", "tokens", "KL", "gradient", "preferred", "preferred behind"]
    by_kl = sorted(start["rules"].items(), key=lambda item: -item[1]["kl_kept"])
    order = ", ".join(f"`{rule}` {_percent(found['kl_kept'])}" for rule, found in by_kl)
    return (
        "### What is kept at an equal budget\n\n"
        f"20 % of each completion, {start['num_tokens']:,} tokens in all. From the most of the KL "
        f"to the least: {order}.\n\n{table(heads, rows)}"
    )


def _overlap(overlap: dict[str, dict[str, float]]) -> str:
    rows = [
        [f"`{a}`", *("" if a == b else f"{100 * share:.0f}" for b, share in others.items())]
        for a, others in overlap.items()
    ]
    return (
        "### How far the rules agree\n\n"
        "Percent of the tokens that the rule of the row keeps which the rule of the column keeps "
        f"too, at 20 %; the column of `random` is chance. {_most_alike(overlap)}\n\n"
        f"{table(['', *(f'`{rule}`' for rule in overlap)], rows)}"
    )


def _most_alike(overlap: Mapping[str, Mapping[str, float]]) -> str:
    """A sentence on the two rules that agree most, and on the one that is most on its own."""
    pairs = {(a, b): share for a, others in overlap.items() for b, share in others.items() if a < b}
    (a, b), share = max(pairs.items(), key=lambda item: item[1])
    nearest = {
        rule: max(share for other, share in others.items() if other != rule)
        for rule, others in overlap.items()
        if rule != "random"
    }
    alone = min(nearest, key=lambda rule: nearest[rule])
    return (
        f"`{a}` and `{b}` agree most ({_percent(share)}); `{alone}` has no rule that keeps more "
        f"than {_percent(nearest[alone])} of its tokens."
    )


def _moved(trained: Mapping[str, Any], figures: Mapping[str, Any] | None = None) -> str:
    """What each arm's own rule keeps after its own training, against before.

    Args:
        trained: choices by arm.
        figures: of every arm, with its difference from all tokens, where it is known here.
    """
    rows = []
    for arm, choices in trained.items():
        before, after = choices["before"], choices["after"]
        rows.append(
            [
                f"`{arm}`",
                *([] if figures is None else [_gain(figures[arm])]),
                _percent(after["tokens_kept"]),
                *(
                    f"{_percent(before[name])} → {_percent(after[name])}"
                    for name in ("kl_kept", "gradient_kept")
                ),
                _percent(_alike(before["texts"], after["texts"])),
                *(_preferred(after, name) for name in ("texts", "before")),
            ]
        )
    heads = ["arm", *([] if figures is None else ["mean@8 − all"])]
    heads += ["tokens", "KL", "gradient", "same texts", "preferred", "preferred behind"]
    return (
        "### How the choice moves with training\n\n"
        "What each arm's own rule keeps, at its own budget, of the completions of the same prompts "
        "by the untrained student → by the student that the arm trained. *Same texts*: by how much "
        "the texts of the kept tokens overlap before and after (the sum over texts of the smaller "
        "share); the arms of `random` show what two choices by chance have in common. Preferences "
        f"are those after training.\n\n{table(heads, rows)}"
    )


def _gain(figures: Mapping[str, Any]) -> str:
    """mean@8 minus that of all tokens with the same loss, in points; all seeds."""
    return signed([100 * x for x in figures["minus_all"]["mean"]])


def _alike(before: Mapping[str, Sequence[int]], after: Mapping[str, Sequence[int]]) -> float:
    """The overlap of two choices' shares of texts, in [0, 1]."""
    sums = [sum(kept for kept, _ in texts.values()) for texts in (before, after)]
    return fsum(  # exact, whatever the order of the texts
        min(before[text][0] / sums[0], after[text][0] / sums[1]) for text in before.keys() & after
    )


def _preferred(found: Mapping[str, Any], what: str) -> str:
    """Texts whose tokens are kept most often for their number, with the ratio to any token's."""
    rate = found["tokens_kept"]
    ratios = {
        text: kept / count / rate
        for text, (kept, count) in found[what].items()
        if count >= LEAST_COUNT and kept
    }
    best = sorted(ratios.items(), key=lambda item: (-item[1], item[0]))[:NUM_TEXTS]
    return " · ".join(f"`{_shown(text)}` {ratio:.1f}" for text, ratio in best)


def _shown(text: str) -> str:
    """A token's text that cannot end a cell of a table or a line."""
    return (
        text.replace(" ", "␣").replace("\n", "↵").replace("|", "¦").replace("`", "ˋ") or "(start)"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
