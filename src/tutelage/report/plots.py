"""The curves of a run, drawn with matplotlib: one small SVG per panel, and one PNG of all."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tutelage.errors import MissingExtraError
from tutelage.report import text
from tutelage.report.records import EvaluationRecord, RunRecord, StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 400
PHASES = {"rollout_s": "rollout", "teacher_s": "teacher", "score_s": "score", "learn_s": "learn"}

Points: TypeAlias = list[tuple[float, float]]
ColorName: TypeAlias = Literal["blue", "orange", "green", "purple"]


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


LIGHT = Theme(ink="#3d4248", grid="#e3e5e8", background="#ffffff", blue="#0072B2")
DARK = Theme(ink="#c3c8ce", grid="#353a40", background="#1b1e22", blue="#56B4E9")


@dataclass(frozen=True)
class Curve:
    """One line of a panel."""

    label: str
    points: Points
    color: ColorName
    band: Sequence[tuple[float, float, float]] = ()
    """(step, low, high) of an interval around the line."""
    is_reference: bool = False
    """True for a level to compare with, drawn dashed across the panel."""


@dataclass(frozen=True)
class Panel:
    """One small plot: a title with its unit, its curves, and a sentence that describes them."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    is_stacked: bool = False
    starts_at_zero: bool = True
    is_share: bool = False

    @property
    def alt(self) -> str:
        """What the panel shows, in words, for readers who do not see it."""
        return f"{self.title} ({self.unit}). " + " ".join(map(self._sentence, self.curves))

    def _sentence(self, curve: Curve) -> str:
        (first_step, first), (last_step, last) = curve.points[0], curve.points[-1]
        if curve.is_reference or len(curve.points) == 1:
            return f"{curve.label}: {self._value(last)}."
        return (
            f"{curve.label}: {self._value(first)} at step {first_step:.0f}, "
            f"{self._value(last)} at step {last_step:.0f}."
        )

    def _value(self, value: float) -> str:
        return text.percent(value) if self.is_share else text.number(value)


def panels_of(record: RunRecord) -> list[Panel]:
    """The panels for which the run has values, in reading order.

    Args:
        record: the run.

    Returns:
        Between none and six panels: accuracy, divergence, loss, entropy, kept share, seconds.
    """
    steps = record.steps
    divergence = [
        _curve(steps, "reverse KL", "blue", lambda s: s.reverse_kl_nats),
        _curve(steps, "forward KL", "orange", lambda s: s.forward_kl_nats),
    ]
    entropy = [
        _curve(steps, "student", "blue", lambda s: s.entropy_nats),
        _curve(steps, "teacher", "orange", lambda s: s.teacher_entropy_nats),
    ]
    loss = [_curve(steps, "loss", "blue", lambda s: s.loss)]
    kept = [_curve(steps, "kept", "green", lambda s: s.keep)]
    panels = [
        Panel("Accuracy", "share of samples", _accuracy(record), is_share=True),
        Panel("Divergence from the teacher", "nats per token", _present(divergence)),
        Panel("Loss", "per kept token", _present(loss), starts_at_zero=False),
        Panel("Entropy", "nats per token", _present(entropy)),
        Panel("Kept tokens", "share of completion tokens", _present(kept), is_share=True),
        Panel("Time", "seconds a step, stacked", _seconds(steps), is_stacked=True),
    ]
    return [panel for panel in panels if panel.curves]


def render_svg(panel: Panel, theme: Theme) -> bytes:
    """One panel as an SVG document.

    Args:
        panel: what to draw.
        theme: colours for a light or dark page.

    Returns:
        UTF-8 SVG, the same bytes for the same input.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    # Text stays text, so the page's reader sees system fonts; the salt fixes generated ids.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "tutelage", "font.family": "sans-serif"}
    buffer = io.BytesIO()
    with _matplotlib().rc_context(settings):
        figure = _figure(4.6, 2.7)
        _draw(figure.add_subplot(), panel, theme)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def render_png(panels: Sequence[Panel]) -> bytes:
    """All panels on one light sheet, two to a row, as a PNG.

    Args:
        panels: at least one panel.

    Returns:
        PNG bytes.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    num_rows = (len(panels) + 1) // 2
    buffer = io.BytesIO()
    _matplotlib()
    figure = _figure(10.0, 3.0 * num_rows)
    figure.set_facecolor(LIGHT.background)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(num_rows, 2, index + 1)
        axes.set_title(
            f"{panel.title}, {panel.unit}", loc="left", fontsize=10, color=LIGHT.ink, pad=20
        )
        _draw(axes, panel, LIGHT)
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def points_per_mark(num_steps: int) -> int:
    """How many steps each drawn point averages, so that long runs stay small on the page."""
    return -(-num_steps // MAX_POINTS)


def _curve(
    steps: Sequence[StepRecord],
    label: str,
    color: ColorName,
    value: Callable[[StepRecord], float | None],
) -> Curve:
    points = [(float(s.step), v) for s in steps if (v := value(s)) is not None]
    return Curve(label, _thinned(points), color)


def _thinned(points: Points) -> Points:
    size = points_per_mark(len(points)) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def _present(curves: Sequence[Curve]) -> tuple[Curve, ...]:
    return tuple(curve for curve in curves if curve.points)


def _accuracy(record: RunRecord) -> tuple[Curve, ...]:
    student, teacher = record.evaluations_of("student"), record.evaluations_of("teacher")
    means: Points = [(float(e.step), e.mean_at_k) for e in student if e.mean_at_k is not None]
    passes: Points = [(float(e.step), e.pass_at_k) for e in student if e.pass_at_k is not None]
    levels: Points = [(float(e.step), e.mean_at_k) for e in teacher if e.mean_at_k is not None]
    return _present(
        [
            Curve("mean@k", means, "blue", band=_mean_band(student)),
            Curve("pass@k", passes, "green"),
            Curve("teacher mean@k", levels[-1:], "orange", is_reference=True),
        ]
    )


def _mean_band(evaluations: Sequence[EvaluationRecord]) -> list[tuple[float, float, float]]:
    return [
        (float(e.step), e.mean_at_k_low, e.mean_at_k_high)
        for e in evaluations
        if e.mean_at_k_low is not None and e.mean_at_k_high is not None
    ]


def _seconds(steps: Sequence[StepRecord]) -> tuple[Curve, ...]:
    timed = [step for step in steps if step.seconds]
    colors: tuple[ColorName, ...] = ("blue", "orange", "purple", "green")

    def phase_seconds(step: StepRecord, phase: str) -> float:
        return (step.seconds or {}).get(phase) or 0.0

    return tuple(
        Curve(label, _thinned([(float(s.step), phase_seconds(s, phase)) for s in timed]), color)
        for (phase, label), color in zip(PHASES.items(), colors, strict=True)
        if any(phase_seconds(step, phase) for step in timed)
    )


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report", "The report") from error
    return matplotlib


def _figure(width: float, height: float) -> Figure:
    # The figure is made without pyplot: no global state, no display, nothing to close.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="none")


def _draw(axes: Axes, panel: Panel, theme: Theme) -> None:
    _style(axes, theme)
    if panel.is_stacked:
        _draw_stack(axes, panel, theme)
    else:
        for curve in panel.curves:
            _draw_curve(axes, curve, theme.color(curve.color))
    if panel.is_share:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(lambda value, _position: f"{100 * value:.0f} %")
    elif panel.starts_at_zero:
        axes.set_ylim(bottom=0, top=1.06 * axes.get_ylim()[1])
    if len(panel.curves) > 1:
        _legend(axes, len(panel.curves), theme)


def _legend(axes: Axes, num_curves: int, theme: Theme) -> None:
    """Above the plot area, where it covers no data."""
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=num_curves,
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
    axes.plot(steps, values, color=color, lw=1.6, marker=marker, ms=4, label=curve.label)
    if curve.band:
        band_steps, lows, highs = zip(*curve.band, strict=True)
        axes.fill_between(band_steps, lows, highs, color=color, alpha=0.18, linewidth=0)


def _draw_stack(axes: Axes, panel: Panel, theme: Theme) -> None:
    steps = [step for step, _ in panel.curves[0].points]
    heights = [[value for _, value in curve.points] for curve in panel.curves]
    labels = [curve.label for curve in panel.curves]
    colors = [theme.color(curve.color) for curve in panel.curves]
    axes.stackplot(steps, heights, labels=labels, colors=colors, alpha=0.85, linewidth=0)


def _style(axes: Axes, theme: Theme) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.grid)
    axes.tick_params(length=0, labelsize=8, colors=theme.ink)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("step", fontsize=8, color=theme.ink)
