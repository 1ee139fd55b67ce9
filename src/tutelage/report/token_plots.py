"""Plots of recorded tokens: the entropy–KL map, both entropies, and what rules keep."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tutelage.report.plots import Theme, legend, style
from tutelage.report.records import TokenRecord
from tutelage.report.tokens import (
    QUADRANTS,
    Row,
    cuts_of,
    jaccard,
    kept_share,
    quadrant,
    shared_rules,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_BINS = 32
"""Bins of the map along each axis, as on the page."""


def highest(rows: Sequence[Row]) -> tuple[float, float]:
    """Ends of the map's axes, entropy and divergence in nats."""
    return max([1e-3, *(r.entropy for r in rows)]), max([1e-3, *(r.reverse_kl for r in rows)])


def map_bins(rows: Sequence[Row], ends: tuple[float, float]) -> Counter[tuple[int, int]]:
    """Tokens in each bin (entropy, divergence); bins are equal on axes of square roots."""
    return Counter((_bin(r.entropy, ends[0]), _bin(r.reverse_kl, ends[1])) for r in rows)


def draw_map(rows: Sequence[Row], config: dict[str, Any], ends: tuple[float, float],
               axes: Axes, theme: Theme) -> None:  # fmt: skip
    """Density over student entropy and reverse KL, with the quadrants' thresholds and shares."""
    cuts, bins = cuts_of(rows, config), map_bins(rows, ends)
    style(axes, theme)
    _root_axes(axes, ends)
    edges = [[top * (i / NUM_BINS) ** 2 for i in range(NUM_BINS + 1)] for top in ends]
    shade = [[math.nan] * NUM_BINS for _ in range(NUM_BINS)]
    most = math.log1p(max(bins.values()))
    for (i, j), count in bins.items():
        shade[j][i] = 0.15 + 0.85 * math.log1p(count) / most
    axes.pcolormesh(*edges, shade, cmap=_ramp(theme), vmin=0, vmax=1, rasterized=False)
    axes.axvline(cuts[0], color=theme.ink, ls="--", lw=1)
    axes.axhline(cuts[1], color=theme.ink, ls="--", lw=1)
    _corners(axes, Counter(quadrant(row, cuts) for row in rows), theme)
    _labels(axes, theme, "student entropy h, nats", "reverse KL δ, nats")


def draw_entropies(records: Sequence[TokenRecord], axes: Axes, theme: Theme) -> None:
    """Student against teacher entropy, one mark a token, by whether the EOPD gate is open."""
    style(axes, theme)
    points = [
        (teacher, student, gate or 0.0)
        for record in records
        for teacher, student, gate in zip(
            record.teacher_entropy, record.entropy, record.gate, strict=True
        )
        if teacher is not None and student is not None
    ]
    looks = {
        True: ("^", theme.orange, "EOPD gate: open"),
        False: ("o", theme.blue, "EOPD gate: closed"),
    }
    for is_open, (marker, color, label) in looks.items():
        here = [(x, y) for x, y, gate in points if (gate >= 0.5) == is_open]
        xs, ys = zip(*here, strict=True) if here else ((), ())
        axes.scatter(xs, ys, s=9, marker=marker, color=color, alpha=0.6, lw=0, label=label)
    top = max([0.1, *(max(x, y) for x, y, _ in points)])
    _root_axes(axes, (top, top))
    axes.plot([0, top], [0, top], color=theme.ink, ls="--", lw=1)
    _labels(axes, theme, "teacher entropy H(q), nats", "student entropy H(p), nats")
    legend(axes, 2, theme)


def draw_overlap(records: Sequence[TokenRecord], rows: Sequence[Row], axes: Axes,
                 theme: Theme) -> None:  # fmt: skip
    """Jaccard index of what every two rules keep."""
    rules = shared_rules(records)
    _matrix(rules, rules, [[jaccard(rows, a, b) for b in rules] for a in rules], axes, theme)


def draw_kept(records: Sequence[TokenRecord], rows: Sequence[Row], config: dict[str, Any],
              axes: Axes, theme: Theme) -> None:  # fmt: skip
    """Share of each quadrant that every rule keeps."""
    rules, cuts = shared_rules(records), cuts_of(rows, config)
    parts = {q: [row for row in rows if quadrant(row, cuts) == q] for q in QUADRANTS}
    names = [f"Q{q} {QUADRANTS[q]}" for q in QUADRANTS]
    _matrix(names, rules, [[kept_share(parts[q], r) for r in rules] for q in parts], axes, theme)


def _matrix(names: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]],
            axes: Axes, theme: Theme) -> None:  # fmt: skip
    style(axes, theme)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    shown = [[math.nan if value is None else value for value in row] for row in values]
    # Half strength: the numbers stand on the shade and have to stay readable.
    axes.imshow(shown, cmap=_ramp(theme), vmin=0, vmax=2, aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(names)), names)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            label = "–" if value is None else f"{value:.2f}"
            axes.text(j, i, label, ha="center", va="center", fontsize=8, color=theme.ink)


def _corners(axes: Axes, counts: Counter[int], theme: Theme) -> None:
    total = counts.total()
    places = {1: (0.98, 0.97), 2: (0.98, 0.03), 3: (0.02, 0.97), 4: (0.02, 0.03)}
    for q, (x, y) in places.items():
        axes.text(
            x, y, f"Q{q} {100 * counts[q] / total:.1f} %", transform=axes.transAxes, fontsize=8,
            ha="right" if x > 0.5 else "left", va="top" if y > 0.5 else "bottom",
            color=theme.ink, fontweight="bold",
            bbox={"facecolor": theme.background, "alpha": 0.8, "lw": 0, "pad": 1},
        )  # fmt: skip


def _bin(value: float, top: float) -> int:
    return min(NUM_BINS - 1, int(math.sqrt(max(value, 0.0) / top) * NUM_BINS))


def _root_axes(axes: Axes, ends: tuple[float, float]) -> None:
    """Square-root axes from zero: most tokens lie near it."""
    functions = (_root, partial(_power, 2))
    axes.set_xscale("function", functions=functions)
    axes.set_yscale("function", functions=functions)
    axes.set_xlim(0, ends[0])
    axes.set_ylim(0, ends[1])


def _root(values: Any) -> Any:
    return values.clip(0) ** 0.5


def _power(exponent: int, values: Any) -> Any:
    return values**exponent


def _labels(axes: Axes, theme: Theme, across: str, up: str) -> None:
    axes.set_xlabel(across, fontsize=8, color=theme.ink)
    axes.set_ylabel(up, fontsize=8, color=theme.ink)


def _ramp(theme: Theme) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("shade", [theme.background, theme.blue])
