"""Progress of a command: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from threading import RLock, Timer
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

DELAY_S = 2.0
"""Seconds after which a phase without counts is printed as a plain line."""
PERIOD_S = 30.0
"""Seconds without a plain line after which the present phase is printed again."""


class PlainPhases:
    """Phases as plain lines: at most eleven for a count, one for any other that lasts `DELAY_S`.

    What lasts longer is told again every `PERIOD_S`, also where nothing calls meanwhile.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._timer: Timer | None = None
        self._last: tuple[str, int] = ("", 0)
        self._last_time = 0.0
        self._lock = RLock()

    def __call__(self, text: str, done: int = 0, total: int = 0) -> None:
        """See `PhaseCallback`."""
        with self._lock:
            self.close()
            if text and not done:
                self._tell_later(DELAY_S, _phase(text, done, total) if total else text, 0.0)
            elif text:
                now, tenth = time.monotonic(), 10 * done // total
                if (text, tenth) != self._last or now - self._last_time >= PERIOD_S:
                    self._last, self._last_time = (text, tenth), now
                    self._show(_phase(text, done, total))
                if done < total:
                    self._tell_later(PERIOD_S, _phase(text, done, total), 0.0)

    def remind(self, text: str) -> None:
        """Begins something that is told only where it lasts `PERIOD_S`."""
        with self._lock:
            self.close()
            self._tell_later(PERIOD_S, text, 0.0)

    def close(self) -> None:
        """Ends the phase: a line that was not printed yet is dropped."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None

    def _tell_later(self, wait_s: float, text: str, elapsed_s: float) -> None:
        timer = Timer(wait_s, lambda: self._tell(timer, text, elapsed_s + wait_s))
        timer.daemon = True
        self._timer = timer
        timer.start()

    def _tell(self, timer: Timer, text: str, elapsed_s: float) -> None:
        with self._lock:
            if timer is self._timer:  # else its phase has ended
                self._show(text if elapsed_s < PERIOD_S else f"{text}, for {elapsed_s:.0f} s")
                self._tell_later(PERIOD_S, text, elapsed_s)


class PhaseReporter:
    """Shows the phases of a command on standard error; its results go to standard output."""

    def __init__(self) -> None:
        self._is_live = sys.stderr.isatty()
        self._plain = PlainPhases(self.log)

    def __enter__(self) -> PhaseReporter:
        return self

    def __exit__(self, *_: object) -> None:
        self("")

    def __call__(self, text: str, done: int = 0, total: int = 0) -> None:
        """See `PhaseCallback`."""
        if self._is_live:
            print(f"\r\x1b[K{_phase(text, done, total)}", end="", file=sys.stderr, flush=True)
        else:
            self._plain(text, done, total)

    def log(self, text: str) -> None:
        """Print one event."""
        start = "\r\x1b[K" if self._is_live else ""
        print(f"{start}{text}", file=sys.stderr, flush=True)


def _phase(text: str, done: int, total: int) -> str:
    return f"{text} {done} of {total}" if total else text


class Reporter:
    """Shows events and steps; use it as a context manager around a run."""

    def __init__(self, num_steps: int, as_json: bool = False) -> None:
        self.num_steps = num_steps
        self.as_json = as_json
        self.console = Console(stderr=as_json, highlight=False, soft_wrap=True)
        whole = Column(no_wrap=True)
        # The bar is the first to go where a line is short: all numbers fit into 80 columns.
        bar = [BarColumn(bar_width=16)] if self.console.width >= 100 else []
        self._progress = Progress(
            MofNCompleteColumn(table_column=whole),
            *bar,
            TimeRemainingColumn(compact=True, table_column=whole),
            TextColumn("{task.fields[line]}", table_column=Column(no_wrap=True, ratio=1)),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=num_steps, line="")
        self._last_line = time.monotonic()
        self._metrics = ""
        self._step = 0
        self._plain = PlainPhases(self.log)

    def __enter__(self) -> Reporter:
        if self.console.is_terminal:  # elsewhere rich before 15 ends it with an empty line
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._plain.close()
        if self.console.is_terminal:
            self._progress.stop()

    def log(self, text: str) -> None:
        """Print one event; model text never passes here, markup is off all the same."""
        self.console.print(text, markup=False)

    def phase(self, text: str, done: int = 0, total: int = 0) -> None:
        """Show what is done between steps, see `PhaseCallback`; no text: the last step."""
        if not text and not self.console.is_terminal and 0 < self._step < self.num_steps:
            self._plain.remind(f"step {self._step + 1}/{self.num_steps}")
        elif self.console.is_terminal:
            line = escape(_phase(text, done, total)) if text else self._metrics
            self._progress.update(self._task, line=line)
        else:
            self._plain(text, done, total)

    def on_step(self, metrics: dict[str, Any]) -> None:
        """Show one step's metrics."""
        if self.as_json:
            print(json.dumps(metrics, allow_nan=False), flush=True, file=sys.stdout)
        line = self._metrics = _line(metrics, 3)
        self._step = int(metrics["step"])
        self._progress.update(self._task, completed=metrics["step"], line=line)
        if not self.console.is_terminal and not self.as_json and self._is_due(metrics["step"]):
            seconds = sum(metrics["seconds"].values())
            line = _line(metrics, 4)
            self.log(f"step {metrics['step']}/{self.num_steps} {line} {seconds:.2f} s")

    def _is_due(self, step: int) -> bool:
        """Plain output: about twenty lines a run, and one at least every half minute."""
        now = time.monotonic()
        every = max(1, self.num_steps // 20)
        if step % every and step != self.num_steps and now - self._last_line < 30:
            return False
        self._last_line = now
        return True


def _line(metrics: dict[str, Any], digits: int) -> str:
    def nats(name: str) -> str:
        return "-" if metrics[name] is None else f"{metrics[name]:.{digits}f}"

    seconds = sum(metrics["seconds"].values())
    num_rows = metrics["num_rows"]
    # the loss of policy gradients is near 0 whatever they reach
    goal = f"reward {nats('reward_mean')}" if "reward_mean" in metrics else f"loss {nats('loss')}"
    return (
        f"{goal} KL {nats('reverse_kl_nats')} entropy {nats('entropy_nats')} "
        f"kept {metrics['num_kept'] / max(num_rows, 1):.0%} "
        f"{num_rows / max(seconds, 1e-9):.0f} tokens/s"
    )
