"""SIGKILL anywhere: does the continued run equal the unbroken one, bit for bit?

A trial kills a run once to three times, at a named point or at a random moment, often while it is
being continued, lets it finish, and compares weights, moments, every logged number, every rollout
and the files that are left. Every third start writes its checkpoints in a thread.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from . import forked, progress
from .record import Outcome


class Trials:
    """Trials against one unbroken run."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        self.changes = changes
        """What the runs have besides the settings of every harness."""
        self.unbroken = folder / "unbroken"
        start = time.perf_counter()
        self.points = forked.trace(folder, self.unbroken, **changes)
        self.seconds = time.perf_counter() - start
        self.expected = forked.portrait(self.unbroken)
        self.names = sorted(set(self.points))
        self.resume = self.points.index("before sample")
        """Points before the first step: those of a resume are about as many."""

    def one(self, number: int) -> progress.Result:
        """Kill, continue, compare; trial `number` aims first at one name after the other."""
        rng = random.Random(number)
        out = self.folder / f"run-{number}"
        kills = []
        first = self.names[number // 2 % len(self.names)] if number % 2 else None
        for turn in range(rng.choice([1, 2, 2, 3])):
            kill = self._kill(out, rng, first if turn == 0 else None, turn)
            if kill is None and not kills:  # the moment came too late: once more, at a point
                shutil.rmtree(out)
                kill = self._kill(out, rng, rng.choice(self.names), 0)
            if kill is not None:
                kills.append(kill)
        writer = _writer(number)
        changes = {**self.changes, "checkpoint_writer": writer}
        ended = forked.end(forked.start(self.folder, out, **changes), out)
        problems = [f"exit code {ended.code}: {ended.text[-300:]}"] if ended.code else []
        if not problems:
            problems = forked.differences(forked.portrait(out), self.expected)
        if not problems:
            shutil.rmtree(out)
        return {"kills": kills, "problems": problems}

    def _kill(
        self, out: Path, rng: random.Random, name: str | None, turn: int
    ) -> dict[str, Any] | None:
        """Start or continue the run and kill it; None if it ended before."""
        had_progress = turn > 0 and (out / "metrics.jsonl").exists()
        notes = out.with_suffix(".rollouts")
        before = notes.stat().st_size if notes.exists() else 0
        if name is not None:
            places = [i for i, point in enumerate(self.points) if point == name]
            aim: int | None = rng.choice(places)
        elif turn > 0 and rng.random() < 0.7:
            aim = rng.randrange(self.resume)
        elif rng.random() < 0.5:
            aim = rng.randrange(len(self.points))
        else:
            aim = None
        event = None if aim is None else forked.kill_at(aim)
        writer = _writer(rng.randrange(3))
        pid = forked.start(self.folder, out, event, **self.changes, checkpoint_writer=writer)
        if aim is None:
            time.sleep(rng.uniform(0, self.seconds))
            os.kill(pid, signal.SIGKILL)
        if forked.end(pid, out).code != -signal.SIGKILL:
            return None
        after = notes.stat().st_size if notes.exists() else 0
        return {
            "point": "random moment" if aim is None else self.points[aim],
            "during_resume": had_progress and before == after,
        }


def _writer(number: int) -> str:
    return "inline" if number % 3 else "thread"


def without_moments(trials: Trials, count: int) -> int:
    """Negative control: of runs continued with moments set to zero, how many are noticed."""
    seen = 0
    for number in range(count):
        out = trials.folder / f"control-{number}"
        changes = {**trials.changes, "keep_checkpoints": 9}
        ended = forked.end(forked.start(trials.folder, out, **changes), out)
        pid = os.fork()
        if pid == 0:
            _zero_moments(out / "checkpoint-000002")
            os._exit(0)
        os.waitpid(pid, 0)
        for later in (*sorted(out.glob("checkpoint-*"))[1:], out / "student"):
            shutil.rmtree(later)
        ended = forked.end(forked.start(trials.folder, out, **trials.changes), out)
        found = forked.portrait(out) if ended.code == 0 else {}
        seen += ended.code == 0 and "tensors" in forked.differences(found, trials.expected)
    return seen


def _zero_moments(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from tutelage.files.checksums import seal

    file = path / "optimizer.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(file).items()}, file)
    seal(path, {"step": 2})


def run(size: int, name: str = "kill", **changes: Any) -> Outcome:
    """`size` runs that were killed at least once."""
    with forked.models() as folder:
        trials = Trials(folder, **changes)
        results = progress.trials(name, size, trials.one)
        few = 1 if size < 100 else 3
        control = without_moments(trials, few)
    kills = [kill for result in results for kill in result["kills"]]
    return Outcome(
        "a run continued after SIGKILL equals the unbroken one, bit for bit",
        trials=sum(bool(result["kills"]) for result in results),
        failures=sum(bool(result["problems"]) for result in results),
        control={f"runs continued without their moments that are noticed, of {few}": control},
        details={
            "kills": len(kills),
            "runs killed during resume": sum(
                any(kill["during_resume"] for kill in result["kills"]) for result in results
            ),
            "kills_by_point": forked.tally([kill["point"] for kill in kills]),
            "problems": [result["problems"] for result in results if result["problems"]][:10],
        },
    )
