"""GRPO alone on the embedded task: accuracy before and after, by seed.

    python benchmarks/claims/grpo.py --seeds 1,2,3,4,5

Writes benchmarks/results/grpo.json. Ctrl-C saves the run; the same command continues it. Runs are
kept by the version of the code.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from claims_design import source
from tutelage.config.parse import load_config
from tutelage.evaluation.metrics import mean_difference
from tutelage.train.loop import train

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "examples" / "ledger_grpo.toml"
RESULT = ROOT / "benchmarks" / "results" / "grpo.json"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seeds", default="1,2,3,4,5", help="comma-separated")
    options.add_argument("--runs", type=Path, default=Path("runs") / "grpo")
    options.add_argument("--result", type=Path, default=RESULT)
    given = options.parse_args()
    seeds, runs = given.seeds.split(","), given.runs / source()
    for seed in seeds:
        config = load_config(CONFIG, [f"seed={seed}"])
        config = replace(config, out=str(runs / f"seed-{seed}"))
        if not train(config, log=partial(print, f"[seed {seed}]", flush=True)).is_finished:
            return
    result = collect([runs / f"seed-{seed}" for seed in seeds])
    given.result.write_text(json.dumps(result, indent=1) + "\n")
    print(f"gain {result['gain']}\n{given.result}")


def collect(folders: Sequence[Path]) -> dict[str, Any]:
    """What the run folders say; the seed is the unit of the interval."""
    runs = [one(folder) for folder in folders]
    before, after = ([run[name] for run in runs] for name in ("before", "after"))
    return {
        "config": CONFIG.name,
        "gain": asdict(mean_difference(after, before)),
        "seconds_of_all_steps": round(sum(run["seconds"] for run in runs), 1),
        "completions": sum(run["completions"] for run in runs),
        "runs": runs,
    }


def one(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / "manifest.json").read_text())
    evaluations, steps = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("evaluation.jsonl", "metrics.jsonl")
    )
    config = manifest["config"]
    first, last = evaluations[0], evaluations[-1]
    return {
        "seed": config["seed"],
        "before": first["mean_at_k"],
        "after": last["mean_at_k"],
        "reverse_kl_nats": [first["held_out_reverse_kl_nats"], last["held_out_reverse_kl_nats"]],
        "rewards": [round(step["reward_mean"], 4) for step in steps],
        "no_signal_shares": [round(step["no_signal_share"], 4) for step in steps],
        "tokens": sum(step["num_kept"] for step in steps),
        "completions": len(steps) * config["prompts_per_step"] * config["sampling"]["num_samples"],
        "seconds": round(sum(sum(step["seconds"].values()) for step in steps), 1),
        **{key: manifest[key] for key in ("fingerprint", "versions", "hardware", "commit")},
    }


if __name__ == "__main__":
    main()
