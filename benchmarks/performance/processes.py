"""Steps of one process against the same steps of several, on the embedded task.

    python benchmarks/performance/processes.py  # about five minutes; 2 cores without other work

Each arm trains the same number of steps of 1,024 completions (about 49,000 rows) with one thread a
process: one process, then N of them with each sharding, in turns. The step is timed from the end
of one step to the end of the next, in the slowest process; the first step is not counted.

A share of one process is in an arm's CPU seconds too: `cpu_ratio` divides the sum over processes of
CPU seconds in the phases of a step by that of one process. It hardly depends on what else the
machine does, where `speedup` does; their product says how well the cores were used. Waiting for
another process counts as CPU time only where gloo polls.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from objective import HERE, environment

ROWS_PER_COMPLETION = 48
"""About, of the embedded task."""
PROMPTS = 1024


def configuration(out: Path, num_steps: int, sharding: str, changes: list[str]) -> Any:
    """The run of an arm: no evaluation, no checkpoints."""
    from tutelage.config.parse import load_config

    path = HERE.parent / "configs" / "examples" / "ledger.toml"
    values = {
        "out": out,
        "num_steps": num_steps,
        "prompts_per_step": PROMPTS,
        "checkpoint_every": 0,
        "evaluation.num_problems": 0,
        "recording.every": 0,
        "optimizer.warmup_steps": 0,
        "student.model": "package:tutelage/assets/ledger-overconfident",
    }
    if sharding != "none":
        values["student.sharding"] = sharding
    return load_config(str(path), [f"{key}={value}" for key, value in values.items()] + changes)


class Watch:
    """Seconds and CPU seconds of the steps that this process takes, and of their phases."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self._phases: dict[str, float] = {}
        self._last = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def take(self, take: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
        """A step, which lasts from the end of the one before it to its own end."""
        metrics = take(*given)
        now = self._now()
        self.steps.append(
            {
                "step_s": now[0] - self._last[0],
                "cpu_s": now[1] - self._last[1],
                "phases_s": dict(metrics["seconds"]),
                "phases_cpu_s": self._phases,
                "rows": metrics["num_rows"],
                "loss": metrics["loss"],
            }
        )
        self._phases, self._last = {}, now
        return metrics

    @contextmanager
    def phase(self, phase: Callable[..., Any], clock: Any, name: str) -> Iterator[None]:
        """A phase of a step."""
        start = time.process_time()
        try:
            with phase(clock, name):
                yield
        finally:
            key = f"{name}_s"
            self._phases[key] = self._phases.get(key, 0.0) + time.process_time() - start


def steps_of(config: Any) -> list[dict[str, Any]]:
    """What each step but the first took in this process."""
    from tutelage.train.clock import Clock
    from tutelage.train.loop import train
    from tutelage.train.step import Step

    watch, take, phase = Watch(), Step.take, Clock.phase
    with (
        mock.patch.object(Step, "take", lambda *given: watch.take(take, *given)),
        mock.patch.object(Clock, "phase", lambda *given: watch.phase(phase, *given)),
    ):
        train(config, log=lambda _: None)
    return watch.steps[1:]


def child(arguments: argparse.Namespace) -> None:
    """Run as one process of an arm, and leave what it measured in a file."""
    folder, num_steps, sharding = arguments.child
    rank = os.environ.get("RANK", "0")
    config = configuration(Path(folder) / "run", int(num_steps) + 1, sharding, arguments.changes)
    found = steps_of(config)
    Path(folder, f"steps-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def arm(count: int, sharding: str, num_steps: int, changes: list[str]) -> list[list[Any]]:
    """Steps of each of `count` processes."""
    from tutelage.commands.launch import launch

    with tempfile.TemporaryDirectory() as folder:
        given = [folder, str(num_steps), sharding]
        command = [sys.executable, __file__, *changes, "--child", *given]
        os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        if launch(command, count):
            sys.exit(f"{count} processes, {sharding}: a process failed; its error is above.")
        files = [Path(folder, f"steps-{rank}.json") for rank in range(count)]
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def summary(runs: list[list[list[dict[str, Any]]]]) -> dict[str, Any]:
    """Medians over the steps of all rounds, each step as long as in its slowest process.

    Args:
        runs: of each round and process the steps.
    """
    steps = [step for run in runs for step in zip(*run, strict=True)]
    median, phases = statistics.median, list(steps[0][0]["phases_s"])
    return {
        "step_s": median(max(p["step_s"] for p in step) for step in steps),
        "cpu_s": median(sum(p["cpu_s"] for p in step) for step in steps),
        "phases_s": {n: median(max(p["phases_s"][n] for p in s) for s in steps) for n in phases},
        "phases_cpu_s": {
            n: median(sum(p["phases_cpu_s"][n] for p in s) for s in steps) for n in phases
        },
        "rows": median(step[0]["rows"] for step in steps),
        "loss": [step[0]["loss"] for step in steps[: len(runs[0][0])]],
        "step_s_of_all": [max(p["step_s"] for p in step) for step in steps],
    }


def compare(count: int, rounds: int, num_steps: int, arms: list[str], changes: list[str]) -> Any:
    """One process and several with each sharding, in turns."""
    names = {"one": (1, "none")} | {sharding: (count, sharding) for sharding in arms}
    runs: dict[str, list[Any]] = {name: [] for name in names}
    for number in range(rounds):
        for name in list(names)[:: -1 if number % 2 else 1]:
            runs[name].append(arm(*names[name], num_steps, changes))
            step = summary(runs[name][-1:])
            print(f"{name}: {step['step_s']:.3f} s, CPU {step['cpu_s']:.3f} s", flush=True)
    found = {name: summary(run) for name, run in runs.items()}
    for result in found.values():
        result["speedup"] = found["one"]["step_s"] / result["step_s"]
        result["cpu_ratio"] = result["cpu_s"] / found["one"]["cpu_s"]
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """Seconds and CPU seconds of each arm, and of its phases."""
    lines = [f"{'':8}{'step s':>9}{'speedup':>9}{'CPU s':>9}{'CPU ratio':>10}"]
    for name, row in found.items():
        cells = f"{row['step_s']:9.3f}{row['speedup']:9.2f}{row['cpu_s']:9.3f}"
        lines.append(f"{name:8}{cells}{row['cpu_ratio']:10.2f}")
        for phase, seconds in row["phases_s"].items():
            lines.append(f"  {phase:12}{seconds:9.3f} s, CPU {row['phases_cpu_s'][phase]:9.3f} s")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="of every arm's run")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--shardings", nargs="+", default=["none", "fsdp2"])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each arm")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each run")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the benchmark, print the table and write the JSON."""
    arguments = _arguments()
    if arguments.child:
        child(arguments)
        return
    record = environment(arguments)
    record["machine"]["threads"] = 1
    given = (arguments.processes, arguments.rounds, arguments.steps, arguments.shardings)
    found = compare(*given, arguments.changes)
    print(table(found))
    out = arguments.out / f"processes-{record['date'][:10]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    found_by = {"processes": arguments.processes, "load_at_end": os.getloadavg()}
    out.write_text(json.dumps(record | found_by | {"arms": found}, indent=2) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
