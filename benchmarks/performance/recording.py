"""What recording tokens costs: a snapshot in steps, and all of a run's as a share of its steps.

    python benchmarks/performance/recording.py  # the demo's run
    python benchmarks/performance/recording.py --config configs/examples/smollm2_gsm8k_200.toml \
        --steps 4 --no-whole

Whole runs with and without recording differ by less than two runs of one kind do. So the cost is
measured large: short runs in turns, one with a snapshot after every step, one with none, which
otherwise do the same work on the same tokens, evaluate nothing, and are timed from the end of the
first step to that of the last. Their ratio less one is a snapshot's cost in steps, with whatever
it does to the step after it. A run as configured has so many snapshots for so many steps. Given are
wall clock and the process's CPU time, which others disturb less, as smallest, median and largest
of the rounds: a range that holds the true median with probability 1 - 2 ** (1 - rounds).

One run as configured, evaluations included, is the cross-check: its snapshots' own clock over its
steps' and over the rest of the run. The benchmark fails where recording changes a bit of the
exported weights. Look at the load average in the result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tutelage.config.parse import load_config
from tutelage.config.schema import Config
from tutelage.setup.run_folder import environment
from tutelage.train.loop import train

HERE = Path(__file__).resolve().parents[1]


def main() -> None:
    """Write and print one JSON object."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument(
        "--config", default=str(HERE.parent / "configs" / "examples" / "ledger.toml")
    )
    options.add_argument("overrides", nargs="*", help="e.g. sampling.max_new_tokens=32")
    options.add_argument("--rounds", type=int, default=8)
    options.add_argument("--steps", type=int, default=9, help="of a short run, at least 2")
    options.add_argument("--no-whole", action="store_true", help="without the cross-check")
    options.add_argument("--out", type=Path, default=HERE / "results" / "recording.json")
    given = options.parse_args()
    config = load_config(given.config, given.overrides)
    if not config.recording.every or given.steps < 2:
        options.error("set recording.every, and --steps to at least 2")
    configured = config
    config = replace(config, evaluation=replace(config.evaluation, num_problems=0))
    measure(config, 2, 1)  # imports and first calls are nobody's cost
    num_snapshots = planned(config.num_steps, config.recording.every)
    share = num_snapshots / config.num_steps
    pairs = []
    for number in range(given.rounds):
        order = (1, 0) if number % 2 == 0 else (0, 1)
        pair = {every: measure(config, given.steps, every) for every in order}
        if pair[1]["weights"] != pair[0]["weights"]:
            raise SystemExit("recording changed the exported weights")
        pairs.append(pair)
        print(json.dumps(figures([pair], share)), flush=True)
    result = {
        "config": Path(given.config).name,
        "overrides": given.overrides,
        "rounds": given.rounds,
        "steps": given.steps,
        "recording": vars(config.recording),
        "num_steps": config.num_steps,
        "num_snapshots": num_snapshots,
        **figures(pairs, share),
        "same_weights": True,
        "whole_run": None if given.no_whole else whole(configured),
        "load_average": os.getloadavg(),
        "pairs": [{"on": pair[1], "off": pair[0]} for pair in pairs],
        **environment(),
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(given.out)


def planned(num_steps: int, every: int) -> int:
    """Snapshots of a run: before the first step, after every n-th, and after the last."""
    return 1 + num_steps // every + (num_steps % every > 0)


def measure(config: Config, num_steps: int, every: int) -> dict[str, Any]:
    """Seconds of a short run between the ends of its first and its last step."""
    marks: list[tuple[float, float]] = []

    def mark(_: dict[str, Any]) -> None:
        marks.append((time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        recording = replace(config.recording, every=every, max_bytes=1 << 30)
        train(
            replace(
                config, out=str(out), num_steps=num_steps, checkpoint_every=0, recording=recording
            ),
            log=lambda _: None,
            on_step=mark,
        )
        spent = [after - before for before, after in zip(marks[0], marks[-1], strict=True)]
        return {
            "wall_s": spent[0],
            "cpu_s": spent[1],
            **snapshots(out / "tokens.jsonl"),
            "weights": weights(out / "student"),
        }


def whole(config: Config) -> dict[str, Any]:
    """One run as configured: seconds of its snapshots, and their share of steps and run."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        steps: list[dict[str, Any]] = []
        start = time.perf_counter()
        train(replace(config, out=str(out)), log=lambda _: None, on_step=steps.append)
        run_s = time.perf_counter() - start
        steps_s = sum(seconds for step in steps for seconds in step["seconds"].values())
        found = snapshots(out / "tokens.jsonl")
        return {
            **found,
            "steps_s": steps_s,
            "run_s": run_s,
            "share_of_steps": found["snapshots_s"] / steps_s,
            "share_of_run": found["snapshots_s"] / (run_s - found["snapshots_s"]),
        }


def snapshots(path: Path) -> dict[str, Any]:
    """Number, seconds and bytes of a run's snapshots."""
    if not path.exists():
        return {"num_snapshots": 0, "snapshots_s": 0.0, "tokens_bytes": 0}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    seconds = {line["step"]: line["seconds"] for line in lines}
    size = path.stat().st_size
    return {
        "num_snapshots": len(seconds),
        "snapshots_s": sum(seconds.values()),
        "tokens_bytes": size,
    }


def weights(folder: Path) -> str:
    """SHA-256 of every exported tensor file."""
    digests = [
        hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))
    ]
    return " ".join(digests)


def figures(pairs: list[dict[int, dict[str, Any]]], share: float) -> dict[str, list[float]]:
    """Smallest, median and largest of the pairs, by wall clock and by CPU time.

    Args:
        pairs: short runs with a snapshot a step (1) and without any (0).
        share: snapshots a step of a run as configured.
    """
    found = {}
    for key in ("wall", "cpu"):
        costs = sorted(pair[1][f"{key}_s"] / pair[0][f"{key}_s"] - 1 for pair in pairs)
        low_median_high = [costs[0], statistics.median(costs), costs[-1]]
        found[f"snapshot_in_steps_{key}"] = low_median_high
        found[f"extra_share_{key}"] = [share * cost for cost in low_median_high]
    return found


if __name__ == "__main__":
    main()
