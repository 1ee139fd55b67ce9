"""Panels as the page embeds them: data for its script, and the same in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tutelage.report import text
from tutelage.report.embed import embedded
from tutelage.report.panels import LINE_STYLES, Curve, Panel

_FLAT = 0.01
"""A curve whose values differ by no more than this share of the largest is a number."""
_DIGITS = 9
"""Significant digits of an embedded value."""


@dataclass(frozen=True)
class FlatView:
    """A panel without movement: what each curve stays at."""

    title: str
    unit: str
    values: tuple[tuple[str, str, str], ...]
    """(label, mean, range in words)."""


def panel_context(panels: Sequence[Panel]) -> dict[str, Any]:
    """What the template needs to show panels: curves, and numbers where nothing moves."""
    moving = [panel for panel in panels if not is_flat(panel)]
    return {
        "panels": moving,
        "flat_panels": [_flat_view(panel) for panel in panels if is_flat(panel)],
        "panel_data": embedded([_panel_data(panel) for panel in moving]) if moving else None,
    }


def is_flat(panel: Panel) -> bool:
    """Whether no curve of the panel moves by more than a hundredth of its values."""
    return all(_is_flat(curve) for curve in panel.curves)


def _is_flat(curve: Curve) -> bool:
    values = [value for _, value in curve.points]
    return max(values) - min(values) <= _FLAT * max(map(abs, values))


def _flat_view(panel: Panel) -> FlatView:
    shown = text.percent if panel.is_share else text.number
    rows = []
    for curve in panel.curves:
        values = [value for _, value in curve.points]
        ends = [shown(min(values)), shown(max(values))]
        is_one = ends[0] == ends[1]
        rows.append((curve.label, shown(fmean(values)), "" if is_one else " to ".join(ends)))
    return FlatView(panel.title, panel.unit, tuple(rows))


def _panel_data(panel: Panel) -> dict[str, Any]:
    return {
        "stacked": panel.is_stacked,
        "share": panel.is_share,
        "zero": panel.starts_at_zero,
        "words": panel.alt,
        "curves": [_curve_data(curve) for curve in panel.curves],
    }


def _curve_data(curve: Curve) -> dict[str, Any]:
    return {
        "label": curve.label,
        "color": curve.color,
        "dash": LINE_STYLES.index(curve.line_style),
        "reference": curve.is_reference,
        "x": [_short(x) for x, _ in curve.points],
        "y": [_short(y) for _, y in curve.points],
        "band": [[_short(value) for value in edge] for edge in curve.band],
    }


def _short(value: float) -> float:
    rounded = float(f"{value:.{_DIGITS}g}")
    return int(rounded) if rounded.is_integer() else rounded
