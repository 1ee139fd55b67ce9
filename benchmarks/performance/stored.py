"""Whole steps of the embedded task: live rollouts, stored ones, and stored teacher states.

Three runs of `configs/examples/ledger.toml` that differ in `[rollouts]` alone. Timed are the phases
that every step logs, from the second step on; what is stored before the first step is not in them.

    python benchmarks/performance/stored.py --steps 12

Times mean nothing on a busy machine: look at the load average in the result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from objective import HERE, environment
from tutelage.config.parse import load_config
from tutelage.setup.phases import no_log
from tutelage.train.loop import train

ROOT = HERE.parent
ARMS: dict[str, list[str]] = {
    "live": [],
    "stored": ["rollouts.source=stored"],
    "stored_states": ["rollouts.source=stored", "rollouts.teacher_states=float32"],
}


def measure(num_steps: int, threads: int) -> dict[str, Any]:
    """Seconds of each phase of each arm's steps, and of the whole runs."""
    found: dict[str, Any] = {}
    for name, overrides in ARMS.items():
        with tempfile.TemporaryDirectory() as folder:
            common = [f"num_steps={num_steps}", f"num_threads={threads}", f"out={folder}/run"]
            common += ["device=cpu", "evaluation.num_problems=0", "recording.every=0"]
            path = ROOT / "configs" / "examples" / "ledger.toml"
            steps: list[dict[str, Any]] = []
            start = time.perf_counter()
            train(load_config(path, [*common, *overrides]), log=no_log, on_step=steps.append)
            whole = time.perf_counter() - start
        found[name] = {"steps": [step["seconds"] for step in steps], "run_s": whole}
    return found


def summary(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Median seconds of each phase, of their sum, and of the run."""
    table = {}
    for name, arm in found.items():
        steps = arm["steps"][1:]
        phases = {key: statistics.median(step[key] for step in steps) for key in steps[0]}
        table[name] = phases | {"run_s": arm["run_s"]}
    return table


def main() -> None:
    """Runs and writes one JSON record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    record = environment(arguments)
    found = measure(arguments.steps, arguments.threads)
    record |= {"summary": summary(found), **found}
    out = arguments.out or HERE / "results" / f"stored-{record['date'][:10]}.json"
    out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["summary"], indent=2))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
