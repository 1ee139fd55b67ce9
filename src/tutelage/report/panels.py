"""Which curves a run has: what to draw, and the same in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal, TypeAlias

from tutelage.report import text
from tutelage.report.records import HighEntropy, RunRecord, StepRecord

MAX_POINTS = 1000

Points: TypeAlias = list[tuple[float, float]]
ColorName: TypeAlias = Literal["blue", "orange", "green", "purple", "ink"]
LineStyle: TypeAlias = Literal["-", "--", ":"]
PHASES: dict[str, ColorName] = {
    "rollout": "blue", "teacher": "orange", "score": "purple", "learn": "green"
}  # fmt: skip
HUES: tuple[ColorName, ...] = ("blue", "orange", "green", "purple", "ink")
_UNKNOWN = HighEntropy()
LINE_STYLES: tuple[LineStyle, ...] = ("-", "--", ":")


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
    line_style: LineStyle = "-"


@dataclass(frozen=True)
class Panel:
    """One small plot: a title with its unit, its curves, and a sentence that describes them."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    is_stacked: bool = False
    starts_at_zero: bool = True
    is_share: bool = False
    has_legend: bool = True
    """False where the page has one key for all its panels."""

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
        Accuracy, divergence, reward, loss, entropy, kept share, EOPD's shares and divergences,
        measures of conversations, seconds and memory, as far as they were measured.
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
    reward = [
        _curve(steps, "mean reward", "green", lambda s: s.reward_mean),
        _curve(steps, "prompts of one reward", "ink", lambda s: s.no_signal_share),
    ]
    loss = [_curve(steps, "loss", "blue", lambda s: s.loss)]
    kept = [_curve(steps, "kept", "green", lambda s: s.keep)]
    panels = [
        Panel("Accuracy", "share of samples", _accuracy(record), is_share=True),
        Panel("Divergence from the teacher", "nats per token", _present(divergence)),
        Panel("Reward", "mean, and share of prompts", _present(reward), is_share=True),
        Panel("Loss", "per kept token", _present(loss), starts_at_zero=False),
        Panel("Entropy", "nats per token", _present(entropy)),
        Panel("Kept tokens", "share of completion tokens", _present(kept), is_share=True),
        *_high_entropy(steps),
        *_conversations(steps),
        Panel("Time", "seconds a step, stacked", _seconds(steps), is_stacked=True),
        Panel("Accelerator memory", "GiB, peak of each phase", _device_memory(steps)),
        Panel("Main memory", "GiB, peak so far", _present([_main_memory(steps, "process")])),
    ]
    return [panel for panel in panels if panel.curves]


def panels_across(runs: Sequence[tuple[str, RunRecord]]) -> list[Panel]:
    """The same measures of several runs, one curve a run on common axes.

    Args:
        runs: (name, run) in the order of their colours.

    Returns:
        The panels for which any run has values.
    """

    def across(value: Callable[[StepRecord], float | None]) -> tuple[Curve, ...]:
        curves = [_curve(record.steps, name, "blue", value) for name, record in runs]
        return told_apart(curves)

    accuracy = [_mean_at_k(record, name) for name, record in runs]
    held_out = [_held_out(record, name) for name, record in runs]
    panels = [
        Panel("Accuracy", "mean@k", told_apart(accuracy), is_share=True),
        Panel("Held-out reverse KL", "nats per token", told_apart(held_out)),
        Panel("Reverse KL", "nats per token", across(lambda s: s.reverse_kl_nats)),
        Panel("Entropy", "nats per token", across(lambda s: s.entropy_nats)),
        Panel("Reward", "mean of completions", across(lambda s: s.reward_mean), is_share=True),
        Panel("Loss", "per kept token", across(lambda s: s.loss), starts_at_zero=False),
        Panel("Kept tokens", "share of completion tokens", across(lambda s: s.keep), is_share=True),
        Panel("Success", "share of conversations", across(lambda s: s.success_share),
              is_share=True),
        Panel("Score", "mean of conversations", across(lambda s: s.score_mean)),
        Panel("Turns", "a conversation", across(lambda s: s.turns_mean)),
        Panel("Tokens a turn", "generated tokens", across(lambda s: s.tokens_per_turn)),
        Panel("Tool errors", "share of calls", across(lambda s: s.tool_error_share), is_share=True),
        Panel("Time", "seconds a step", across(_total_seconds)),
        Panel("Main memory", "GiB, peak so far",
              told_apart([_main_memory(record.steps, name) for name, record in runs])),
    ]  # fmt: skip
    return [replace(panel, has_legend=False) for panel in panels if panel.curves]


def told_apart(curves: Sequence[Curve]) -> tuple[Curve, ...]:
    """Curves in a colour and a line style of their own; those without values keep their turn."""
    styled = [
        replace(curve, color=HUES[i % len(HUES)], line_style=LINE_STYLES[i % len(LINE_STYLES)])
        for i, curve in enumerate(curves)
    ]
    return _present(styled)


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
    passes: Points = [(float(e.step), e.pass_at_k) for e in student if e.pass_at_k is not None]
    levels: Points = [(float(e.step), e.mean_at_k) for e in teacher if e.mean_at_k is not None]
    return _present(
        [
            _mean_at_k(record, "mean@k"),
            Curve("pass@k", passes, "green"),
            Curve("teacher mean@k", levels[-1:], "orange", is_reference=True),
        ]
    )


def _mean_at_k(record: RunRecord, label: str) -> Curve:
    student = record.evaluations_of("student")
    means: Points = [(float(e.step), e.mean_at_k) for e in student if e.mean_at_k is not None]
    band = [
        (float(e.step), e.mean_at_k_low, e.mean_at_k_high)
        for e in student
        if e.mean_at_k_low is not None and e.mean_at_k_high is not None
    ]
    return Curve(label, means, "blue", band)


def _held_out(record: RunRecord, label: str) -> Curve:
    found = [(float(e.step), e.held_out_reverse_kl_nats) for e in record.evaluations_of("student")]
    return Curve(label, [(step, kl) for step, kl in found if kl is not None], "blue")


def _high_entropy(steps: Sequence[StepRecord]) -> list[Panel]:
    """Share of high-entropy tokens and of open EOPD gates, and the divergences there."""
    shares = [
        _curve(steps, "student", "blue", lambda s: (s.high_entropy or _UNKNOWN).student_share),
        _curve(steps, "teacher", "orange", lambda s: (s.high_entropy or _UNKNOWN).teacher_share),
        _curve(steps, "EOPD gate: open", "purple", lambda s: s.gate_share),
    ]
    kls = [
        _curve(steps, "reverse KL", "blue", lambda s: (s.high_entropy or _UNKNOWN).reverse_kl_nats),
        _curve(steps, "forward KL", "orange",
               lambda s: (s.high_entropy or _UNKNOWN).forward_kl_nats),
        _curve(steps, "forward KL, gated", "purple", lambda s: s.gated_forward_kl_nats),
    ]  # fmt: skip
    return [
        Panel(
            "High-entropy tokens", "share with 0.8 nats or more", _present(shares), is_share=True
        ),
        Panel("KL where teacher entropy is high", "nats per token", _present(kls)),
    ]


def _conversations(steps: Sequence[StepRecord]) -> list[Panel]:
    """What the conversations of the steps reached, and how long they were."""
    success = [
        _curve(steps, "success", "green", lambda s: s.success_share),
        _curve(steps, "mean score", "blue", lambda s: s.score_mean),
    ]
    lengths = [
        _curve(steps, "turns", "blue", lambda s: s.turns_mean),
        _curve(steps, "tool calls", "orange", lambda s: s.tool_calls_mean),
    ]
    tokens = [_curve(steps, "tokens a turn", "blue", lambda s: s.tokens_per_turn)]
    inserted = [_curve(steps, "inserted tokens", "ink", lambda s: s.inserted_tokens_mean)]
    errors = [_curve(steps, "errors", "purple", lambda s: s.tool_error_share)]
    return [
        Panel("Success", "share of conversations, and score", _present(success), is_share=True),
        Panel("Turns and tool calls", "a conversation", _present(lengths)),
        Panel("Tokens a turn", "generated tokens", _present(tokens)),
        Panel("Inserted tokens", "a conversation, not trained on", _present(inserted)),
        Panel("Tool errors", "share of tool calls", _present(errors), is_share=True),
    ]


def _seconds(steps: Sequence[StepRecord]) -> tuple[Curve, ...]:
    timed = [step for step in steps if step.seconds]

    def spent(step: StepRecord, phase: str) -> float:
        return (step.seconds or {}).get(f"{phase}_s") or 0.0

    return tuple(
        Curve(phase, _thinned([(float(s.step), spent(s, phase)) for s in timed]), color)
        for phase, color in PHASES.items()
        if any(spent(step, phase) for step in timed)
    )


def _total_seconds(step: StepRecord) -> float | None:
    return sum(seconds or 0.0 for seconds in step.seconds.values()) if step.seconds else None


def _device_memory(steps: Sequence[StepRecord]) -> tuple[Curve, ...]:
    def peak(phase: str) -> Callable[[StepRecord], float | None]:
        return lambda step: _gib((step.peak_device_bytes or {}).get(phase))

    return _present([_curve(steps, phase, color, peak(phase)) for phase, color in PHASES.items()])


def _main_memory(steps: Sequence[StepRecord], label: str) -> Curve:
    # Zero stands for a system that does not tell.
    return _curve(
        steps, label, "blue", lambda s: _gib(max((s.peak_rss_bytes or {}).values(), default=0))
    )


def _gib(num_bytes: int | None) -> float | None:
    return num_bytes / 2**30 if num_bytes else None
