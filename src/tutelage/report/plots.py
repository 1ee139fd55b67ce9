"""Pictures of curves as files, drawn with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tutelage.report.panels import ColorName, Curve, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours that depend on the background; curves are named by what they mean.

    The hues are Okabe and Ito's, told apart with every common kind of colour blindness.
    """

    ink: str
    grid: str
    background: str
    blue: str
    orange: str = "#E69F00"
    green: str = "#009E73"
    purple: str = "#CC79A7"

    def color(self, name: ColorName) -> str:
        """The shade of a named hue on this background."""
        match name:
            case "blue":
                return self.blue
            case "orange":
                return self.orange
            case "green":
                return self.green
            case "purple":
                return self.purple
            case "ink":
                return self.ink


_LOW_SHARE = 0.3
"""Shares that stay below it get an axis of their own length."""
LIGHT = Theme(ink="#3d4248", grid="#e3e5e8", background="#ffffff", blue="#0072B2")


def render(
    draw: Callable[[Axes, Theme], None],
    theme: Theme,
    kind: Literal["svg", "png"] = "svg",
    size: tuple[float, float] = (4.6, 2.7),
) -> bytes:
    """One picture.

    Args:
        draw: puts the picture on empty axes.
        theme: colours for a light or dark page.
        kind: an SVG is transparent, a PNG stands on the theme's background.
        size: width and height in inches.

    Returns:
        UTF-8 SVG, the same bytes for the same input, or a PNG of 200 dots an inch.
    """
    import matplotlib

    # Text stays text, so the page's reader sees system fonts; the salt fixes generated ids.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "tutelage", "font.family": "sans-serif"}
    buffer = io.BytesIO()
    with matplotlib.rc_context(settings):
        figure = _figure(*size)
        draw(figure.add_subplot(), theme)
        if kind == "svg":
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        else:
            figure.savefig(buffer, format="png", dpi=200, facecolor=theme.background)
    return buffer.getvalue()


def _figure(width: float, height: float) -> Figure:
    # The figure is made without pyplot: no global state, no display, nothing to close.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="none")


def draw_panel(panel: Panel, axes: Axes, theme: Theme) -> None:
    """Curves over steps."""
    style(axes, theme)
    axes.set_xlabel("step", fontsize=8, color=theme.ink)
    axes.locator_params(axis="x", integer=True)
    if panel.is_stacked:
        _draw_stack(axes, panel, theme)
    else:
        for curve in panel.curves:
            _draw_curve(axes, curve, theme.color(curve.color))
    if panel.is_share:
        _share_axis(axes)
    elif panel.starts_at_zero:
        axes.set_ylim(bottom=0, top=1.06 * axes.get_ylim()[1])
    if panel.has_legend and len(panel.curves) > 1:
        legend(axes, len(panel.curves), theme)


def _share_axis(axes: Axes) -> None:
    """From 0 to 100 %, unless that would press everything to the ground."""
    top = axes.get_ylim()[1]
    top = 1.06 * top if 0 < top < _LOW_SHARE else 1.02
    axes.set_ylim(-0.02 * top, top)
    axes.yaxis.set_major_formatter(lambda value, _position: f"{100 * value:.3g} %")


def legend(axes: Axes, num_curves: int, theme: Theme) -> None:
    """Above the plot area, where it covers no data."""
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=min(num_curves, 4),
        frameon=False,
        fontsize=8,
        labelcolor=theme.ink,
        handlelength=1.2,
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def _draw_curve(axes: Axes, curve: Curve, color: str) -> None:
    if curve.is_reference:
        axes.axhline(curve.points[-1][1], color=color, ls="--", lw=1.4, label=curve.label)
        return
    steps, values = zip(*curve.points, strict=True)
    marker = "o" if len(steps) <= 12 else ""
    axes.plot(
        steps, values, color=color, ls=curve.line_style, lw=1.6, marker=marker, ms=4,
        label=curve.label,
    )  # fmt: skip
    if curve.band:
        band_steps, lows, highs = zip(*curve.band, strict=True)
        axes.fill_between(band_steps, lows, highs, color=color, alpha=0.18, linewidth=0)


def _draw_stack(axes: Axes, panel: Panel, theme: Theme) -> None:
    steps = [step for step, _ in panel.curves[0].points]
    heights = [[value for _, value in curve.points] for curve in panel.curves]
    labels = [curve.label for curve in panel.curves]
    colors = [theme.color(curve.color) for curve in panel.curves]
    axes.stackplot(steps, heights, labels=labels, colors=colors, alpha=0.85, linewidth=0)


def style(axes: Axes, theme: Theme) -> None:
    """Quiet axes in the colours of the page."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.grid)
    axes.tick_params(length=0, labelsize=8, colors=theme.ink)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
