"""What recording tokens costs: whole runs with and without it, in turns, from one process.

    python benchmarks/recording.py                                   # the demo's run
    python benchmarks/recording.py --config configs/smollm2_gsm8k_200.toml --rounds 1

Both arms evaluate, checkpoint and export as the configuration says; only `recording.every` differs.
A run's cost is given in three ways: wall clock, the process's CPU time, which other processes
disturb less, and the seconds that the snapshots themselves took as a share of the run with them.
The run fails where recording changed a bit of the exported weights.

Times mean little on a busy machine: look at the load average in the result.
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

from tutelage.run.config import Config
from tutelage.run.folder import environment
from tutelage.run.parse import load_config
from tutelage.run.train import train

HERE = Path(__file__).parent


def main() -> None:
    """Write and print one JSON object."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--config", default=str(HERE.parent / "configs" / "ledger.toml"))
    options.add_argument("overrides", nargs="*", help="e.g. num_steps=10")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--out", type=Path, default=HERE / "results" / "recording.json")
    given = options.parse_args()
    config = load_config(given.config, given.overrides)
    if not config.recording.every:
        options.error("the configuration records nothing: set recording.every")
    measure(replace(config, num_steps=1), True)  # imports and first calls are nobody's cost
    pairs = []
    for number in range(given.rounds):
        order = (True, False) if number % 2 == 0 else (False, True)
        pair = {is_on: measure(config, is_on) for is_on in order}
        if pair[True]["weights"] != pair[False]["weights"]:
            raise SystemExit("recording changed the exported weights")
        pairs.append(pair)
        print(json.dumps(figures([pair])), flush=True)
    result = {
        "config": Path(given.config).name,
        "overrides": given.overrides,
        "rounds": given.rounds,
        "recording": vars(config.recording),
        **figures(pairs),
        "same_weights": True,
        "load_average": os.getloadavg(),
        "pairs": [{"on": pair[True], "off": pair[False]} for pair in pairs],
        **environment(),
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(given.out)


def measure(config: Config, is_on: bool) -> dict[str, Any]:
    """One run in a folder of its own."""
    every = config.recording.every if is_on else 0
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        config = replace(config, out=str(out), recording=replace(config.recording, every=every))
        wall, cpu = time.perf_counter(), time.process_time()
        train(config, say=lambda _: None)
        spent = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        return {**spent, **snapshots(out / "tokens.jsonl"), "weights": weights(out / "student")}


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


def figures(pairs: list[dict[bool, dict[str, Any]]]) -> dict[str, float]:
    """Medians over the pairs: extra time as a share of the run without recording."""

    def extra(key: str) -> float:
        return statistics.median(p[True][key] / p[False][key] - 1 for p in pairs)

    shares = [p[True]["snapshots_s"] / p[True]["wall_s"] for p in pairs]
    return {
        "extra_wall_share": extra("wall_s"),
        "extra_cpu_share": extra("cpu_s"),
        "snapshot_share_of_wall": statistics.median(shares),
    }


if __name__ == "__main__":
    main()
