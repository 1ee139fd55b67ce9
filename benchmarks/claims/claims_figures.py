"""Figures of the claims page, from the published JSON alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from claims_arms import BUDGETS, TUNED, Loss, loss_of
from claims_markdown import SCALE
from claims_verdicts import MARGIN, SHARE_MARGIN

INK, GRID = "#3d4248", "#e3e5e8"
# Okabe and Ito's hues; every verdict and rule has a marker of its own besides.
LOOKS = {
    "supported": ("#009E73", "o"),
    "not supported": ("#E69F00", "s"),
    "cannot tell": ("#999999", "D"),
    "contradicted here": ("#D55E00", "X"),
}
RULE_LOOKS = {
    "random": ("#000000", "x"),
    "entropy": ("#E69F00", "s"),
    "entropy_sample": ("#E69F00", "d"),
    "soft_or": ("#0072B2", "o"),
    "soft_or_sample": ("#0072B2", "h"),
    "q3": ("#009E73", "^"),
    "divergence": ("#D55E00", "v"),
    "probability_gap": ("#CC79A7", "P"),
    "influence": ("#56B4E9", "*"),
    "lowest_logprob": ("#999999", "D"),
    "extreme_advantage": ("#56B4E9", "p"),
}
MARGINS = {"matches": -MARGIN, "nearly": -MARGIN, "is_blind": SHARE_MARGIN}


def draw_all(results: dict[str, Any], folder: Path) -> None:
    """One SVG a claim, and the overview by budget."""
    # The same JSON gives the same bytes: no date, no random names of elements.
    matplotlib.rcParams.update({"svg.hashsalt": "claims", "svg.fonttype": "none", "font.size": 9})
    for name, claim in results["claims"].items():
        if not claim["comparisons"]:
            continue
        figure = worth(results, claim) if name == "T6" else forest(claim["comparisons"])
        _save(figure, folder / f"claims-{name}.svg")
    _save(budgets(results), folder / "claims-budgets.svg")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight", facecolor="white")


def forest(comparisons: Sequence[dict[str, Any]]) -> Figure:
    """The comparisons of a claim: value, interval, and the line each is judged against.

    Every unit has axes of its own.
    """
    units = list(dict.fromkeys(c["unit"] for c in comparisons))
    groups = [[c for c in comparisons if c["unit"] == unit] for unit in units]
    height = 0.36 * len(comparisons) + 0.7 * len(units)
    figure = Figure(figsize=(7.0, height))
    sizes = [len(group) + 0.5 for group in groups]
    grid = {"height_ratios": sizes, "hspace": 2.0 / (height / len(units))}
    panels = figure.subplots(len(units), 1, gridspec_kw=grid, squeeze=False)
    for axes, group in zip(panels.flat, groups, strict=True):
        _forest(axes, group)
    _legend(panels.flat[0], comparisons)
    return figure


def _forest(axes: Axes, comparisons: Sequence[dict[str, Any]]) -> None:
    for place, comparison in enumerate(comparisons):
        scale = SCALE.get(comparison["unit"], 1.0)
        i = comparison["interval"]
        low, value, high = (scale * i[name] for name in ("low", "value", "high"))
        color, marker = LOOKS[comparison["verdict"]]
        axes.plot([low, high], [place, place], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot(value, place, marker, color=color, markersize=7)
        if comparison["test"] in MARGINS:
            limit = scale * MARGINS[comparison["test"]]
            axes.plot([limit, limit], [place - 0.4, place + 0.4], color=INK, linestyle=":")
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(comparisons)), [c["label"] for c in comparisons])
    axes.set_ylim(len(comparisons) - 0.5, -0.5)
    axes.set_xlabel(comparisons[0]["unit"])
    _tidy(axes)


def _legend(axes: Axes, comparisons: Sequence[dict[str, Any]]) -> None:
    for verdict in dict.fromkeys(c["verdict"] for c in comparisons):
        color, marker = LOOKS[verdict]
        axes.plot([], [], marker, color=color, label=verdict)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


def worth(results: dict[str, Any], claim: dict[str, Any]) -> Figure:
    """Correlation of every score with a token's worth, and the comparisons judged."""
    figure = Figure(figsize=(9.0, 6.5))
    ratios = {"height_ratios": (1.2, 1), "hspace": 0.45}
    axes, lower = figure.subplots(2, 1, gridspec_kw=ratios)
    table = results["token_worth"]
    columns = [f"{t}_{k}" for t in ("decrease", "gradient") for k in ("spearman", "pearson")]
    for shift, column in enumerate(columns):
        color = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00")[shift]
        for place, (low, value, high) in enumerate(_sorted(table[column]["score"].values())):
            y = place + 0.18 * (shift - 1.5)
            axes.plot([low, high], [y, y], color=color, linewidth=1.5)
            axes.plot(value, y, "os^v"[shift], color=color, markersize=4)
        target, kind = column.split("_")
        axes.plot([], [], "os^v"[shift], color=color, label=f"{kind.title()}, {target}")
    axes.set_yticks(range(len(table[columns[0]]["score"])), table[columns[0]]["score"])
    axes.invert_yaxis()
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("correlation with what a token is worth")
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _tidy(axes)
    _forest(lower, claim["comparisons"])
    _legend(lower, claim["comparisons"])
    return figure


def _sorted(triples: Any) -> list[tuple[float, float, float]]:
    """(low, value, high) from the JSON's (value, low, high)."""
    return [(low, value, high) for value, low, high in triples]


def budgets(results: dict[str, Any]) -> Figure:
    """mean@8 of every rule by budget, a panel for each setting and loss, all tokens as a band."""
    panels_of = [
        (setting, loss, arms)
        for setting, arms in results["arms"].items()
        for loss, name in TUNED.items()
        if name in arms and any("-" in arm and loss_of(arm) == loss for arm in arms)
    ]
    rows = -(-len(panels_of) // 2)
    figure = Figure(figsize=(10.0, 3.5 * rows))
    grid = {"hspace": 0.35, "wspace": 0.2}
    panels = figure.subplots(rows, 2, gridspec_kw=grid, squeeze=False)
    for axes in panels.flat[len(panels_of) :]:
        axes.set_axis_off()
    for axes, (setting, loss, arms) in zip(panels.flat, panels_of, strict=False):
        _budgets(axes, arms, loss)
        axes.set_title(f"{setting}, {loss} loss", fontsize=10)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="center left", bbox_to_anchor=(0.91, 0.5))
    return figure


def _budgets(axes: Axes, arms: dict[str, Any], loss: Loss) -> None:
    value, low, high = arms[TUNED[loss]]["mean"]
    end = "" if loss == "exact" else "+sampled"
    axes.axhspan(100 * low, 100 * high, color=GRID)
    axes.axhline(100 * value, color=INK, linewidth=1, label="all tokens")
    axes.axhline(100 * arms["start"]["mean"][0], color=INK, linewidth=1, ls="--", label="start")
    for number, (rule, (color, marker)) in enumerate(RULE_LOOKS.items()):
        shift = 0.07 * (number - (len(RULE_LOOKS) - 1) / 2)
        names = {n: f"{rule}-{n}{end}" for n in BUDGETS}
        points = [(n, arms[name]["mean"]) for n, name in names.items() if name in arms]
        if not points:
            continue
        x = [BUDGETS.index(n) + shift for n, _ in points]
        y = [100 * mean[0] for _, mean in points]
        errors = [
            [100 * (m[0] - m[1]) for _, m in points],
            [100 * (m[2] - m[0]) for _, m in points],
        ]
        axes.errorbar(x, y, errors, color=color, marker=marker, linestyle="none", label=rule)
    axes.set_xticks(range(len(BUDGETS)), [f"{n} %" for n in BUDGETS])
    axes.set_xlim(-0.5, len(BUDGETS) - 0.5)
    axes.set_xlabel("tokens kept of each completion")
    axes.set_ylabel("mean@8 (%)")
    axes.set_ylim(bottom=0)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
