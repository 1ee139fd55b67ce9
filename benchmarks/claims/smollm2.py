"""A real language model on a CPU: all tokens, Soft-OR 50 % and random 50 %, same prompts and steps.

    TUTELAGE_DATA=folder/with/gsm8k_train.jsonl python benchmarks/claims/smollm2.py --seeds 0
    python benchmarks/claims/smollm2.py --page-only  # figure and JSON from runs that are there

Ctrl-C saves the run; the same command continues it. Unfinished runs are drawn as far as they got
and marked in the JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from tutelage.config.parse import load_config
from tutelage.config.schema import Config
from tutelage.train.loop import train

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "examples" / "smollm2_gsm8k_200.toml"
RESULT = ROOT / "benchmarks" / "results" / "smollm2.json"
FIGURE = ROOT / "docs" / "results" / "images" / "smollm2.svg"
ARMS = {
    "all": (),
    "soft_or": ("selection.rule=soft_or", "selection.keep=0.5"),
    "random": ("selection.rule=random", "selection.keep=0.5"),
}
LOOKS = {"all": ("#000000", "all tokens"), "soft_or": ("#0072B2", "Soft-OR 50 %"),
         "random": ("#E69F00", "random 50 %")}  # fmt: skip
SHOWN = ("step", "held_out_reverse_kl_nats", "mean_at_k", "num_problems")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--arms", default=",".join(ARMS))
    options.add_argument("--seeds", default="0", help="comma-separated")
    options.add_argument("--runs", type=Path, default=Path("runs") / "smollm2")
    options.add_argument("--page-only", action="store_true")
    options.add_argument("overrides", nargs="*", help="e.g. num_threads=1")
    given = options.parse_args()
    if not given.page_only:
        run_all(given.arms.split(","), given.seeds.split(","), given.runs, given.overrides)
    result = collect(given.runs)
    if not result["runs"]:
        raise SystemExit(f"no runs with an evaluation in {given.runs}")
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    draw(result["runs"], FIGURE)
    print(f"{RESULT}\n{FIGURE}")


def run_all(
    arms: Sequence[str], seeds: Sequence[str], folder: Path, overrides: Sequence[str]
) -> None:
    """One arm after the other, seed by seed, so that every seed is complete before the next."""
    for seed in seeds:
        for arm in arms:
            config = settings(arm, seed, folder, overrides)
            if not train(config, log=partial(print, f"[{arm}]")).is_finished:
                return


def settings(arm: str, seed: str, folder: Path, overrides: Sequence[str]) -> Config:
    config = load_config(CONFIG, [*ARMS[arm], f"seed={seed}", *overrides])
    return replace(config, out=str(folder / f"{arm}-{seed}"))


def collect(folder: Path) -> dict[str, Any]:
    """What the run folders say."""
    runs = []
    for path in sorted(folder.glob("*-*/manifest.json")):
        manifest = json.loads(path.read_text())
        evaluations = read(path.with_name("evaluation.jsonl"))
        steps = read(path.with_name("metrics.jsonl"))
        if not evaluations or not steps:
            continue
        config = manifest["config"]
        runs.append(
            {
                "arm": path.parent.name.rpartition("-")[0],
                "seed": config["seed"],
                "steps": steps[-1]["step"],
                "is_finished": steps[-1]["step"] == config["num_steps"],
                "tokens_taught": sum(step["num_kept"] for step in steps),
                "seconds": round(sum(sum(step["seconds"].values()) for step in steps), 1),
                "evaluations": [{key: e[key] for key in SHOWN} for e in evaluations],
                **{key: manifest[key] for key in ("fingerprint", "versions", "hardware", "commit")},
            }
        )
    return {"config": CONFIG.name, "runs": runs}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Held-out reverse KL over steps, one line a run."""
    matplotlib.rcParams.update({"svg.hashsalt": "smollm2", "svg.fonttype": "none", "font.size": 9})
    figure = Figure(figsize=(5.2, 3.0))
    axes = figure.subplots()
    for run in runs:
        color, title = LOOKS[run["arm"]]
        points = [(e["step"], e["held_out_reverse_kl_nats"]) for e in run["evaluations"]]
        label = f"{title}, seed {run['seed']}" + ("" if run["is_finished"] else " (unfinished)")
        axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("reverse KL on held-out prompts, nats")
    axes.set_ylim(bottom=0)
    axes.grid(color="#e3e5e8")
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()
