"""SIGTERM and Ctrl-C in every phase: is the last whole step saved, and does the run go on from it?

Half of the trials after the first round send a second signal soon after, which ends the run at
once; it must still leave a folder from which the run continues to the same end.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

from tutelage.files.checksums import unseal
from tutelage.train.checkpoint import list_checkpoints

from . import forked, progress
from .record import Outcome

PHASES = (
    "build_components",
    "load moments",
    "sample",
    "teacher",
    "forward",
    "backward",
    "update",
    "log",
    "evaluate",
    "save",
    "save moments",
)
"""Points at which a signal comes; `load moments` is that of a continued run."""
SAVED = 130


def signal_at(place: int, number: int, second: int | None, note: Path) -> forked.Event:
    """Send this process a signal at a point, and perhaps another some points later."""

    def event(_name: str, count: int) -> None:
        if count == place:
            note.write_text(str(time.time()))
        if count == place or (second is not None and count == place + second):
            os.kill(os.getpid(), number)

    return event


class Trials(forked.Trials):
    """Trials with a run that is asked to stop."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        out = folder / "half"
        middle = self.points.index("after save") + 40
        forked.end(forked.start(folder, out, forked.kill_at(middle)), out)
        shutil.copytree(out, folder / "half-copy")
        self.resumed = forked.trace(folder, out)

    def one(self, number: int) -> progress.Result:
        """Signal, look, continue, compare."""
        rng = random.Random(number)
        phase = PHASES[number % len(PHASES)]
        out, note = self.folder / f"run-{number}", self.folder / f"run-{number}.time"
        is_resumed = phase == "load moments"
        points = self.resumed if is_resumed else self.points
        if is_resumed:
            shutil.copytree(self.folder / "half-copy", out)
            shutil.copy(self.folder / "half.rollouts", out.with_suffix(".rollouts"))
        places = [i for i, name in enumerate(points) if name.endswith(f"e {phase}")]  # before
        second = rng.randint(1, 12) if number >= len(PHASES) and rng.random() < 0.5 else None
        kind = rng.choice([signal.SIGTERM, signal.SIGINT])
        place = rng.choice(places)
        ended = forked.end(
            forked.start(self.folder, out, signal_at(place, kind, second, note)), out
        )
        latency = time.time() - float(note.read_text())  # from the signal to the end
        problems = self.again(out, self._stopped(out, ended, second))
        twice = second is not None
        return {"phase": phase, "twice": twice, "latency_s": latency, "problems": problems}

    def _stopped(self, out: Path, ended: forked.Ended, second: int | None) -> list[str]:
        # A second signal may meet a process that has saved and no longer listens.
        if ended.code != SAVED and not (second and ended.code == -signal.SIGTERM):
            return [f"exit code {ended.code}: {ended.text[-300:]}"]
        if second is not None:
            return []
        log = out / "metrics.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        done = max((json.loads(line)["step"] for line in lines), default=0)
        saved = [step for step, path in list_checkpoints(out) if unseal(path) == {"step": step}]
        if done and done not in saved:
            return [f"step {done} was logged, but saved are {saved}"]
        return [] if "Traceback" not in ended.text else ["a traceback"]


def run(size: int) -> Outcome:
    """`size` runs that were asked to stop."""
    with forked.models() as folder:
        trials = Trials(folder)
        results = progress.trials("signals", size, trials.one, least=40)
        # Without a handler, as many trainers are: nothing is saved.
        out = folder / "unheard"
        place = trials.points.index("before backward")

        def deaf(name: str, count: int) -> None:
            if count == place:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)

        ended = forked.end(forked.start(folder, out, deaf), out)
        unheard = ended.code != SAVED and not list_checkpoints(out)
    return Outcome(
        "after SIGTERM or SIGINT in any phase the last whole step is saved, and the run continues "
        "to the same end",
        trials=size,
        failures=sum(bool(result["problems"]) for result in results),
        control={"a run without a handler is seen to save nothing": int(unheard)},
        details={
            "phases": forked.tally([result["phase"] for result in results]),
            "with a second signal": sum(result["twice"] for result in results),
            "slowest_exit_s": round(max(result["latency_s"] for result in results), 2),
            "problems": [result for result in results if result["problems"]][:10],
        },
    )
