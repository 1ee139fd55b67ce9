"""Time and memory of the distillation objective against other ways to compute the same numbers.

All contestants get the same hidden states and heads and compute the sum over rows of the full
reverse KL with its gradients for the student's hidden states and head; ours compute both KLs and
both entropies of every row besides. Times are taken in one process, in turns; extra peak memory in
one process for each. About twelve minutes on two quiet cores.

    pip install -e '.[bench]'
    python benchmarks/objective.py --threads 2
    python benchmarks/objective.py --quick    # the smallest case, one round: does it run?
    python benchmarks/performance_page.py     # docs/performance.md from the results

Times mean nothing on a busy machine: look at the load average in the result.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import tutelage
from objective_contestants import (
    CONTESTANTS,
    NEEDS,
    TRL_TILES,
    Inputs,
    contestants,
    gradient_errors,
    make_inputs,
    trl,
)

HERE = Path(__file__).parent
MIB = 1 << 20
SMALL, LARGE = (49152, 576), (151936, 1024)
"""V and D of SmolLM2-135M and of Qwen3-0.6B."""

EVERYONE = (*CONTESTANTS, "trl_tuned")
OTHERS = ("materialised", "trl", "trl_tuned")
FEW = ("bare_products", "all_tokens", "soft_or_50", "soft_or_10", "entropy_10")

Run = Callable[[Inputs], Tensor | None]


@dataclass(frozen=True)
class Case:
    """Sizes, and who is measured how often at them."""

    rows: int
    vocab_size: int
    width: int
    names: tuple[str, ...]
    rounds: int
    memory_of: tuple[str, ...]
    """Whose extra memory is measured, each in a process of its own."""


CASES = (
    Case(1024, *SMALL, EVERYONE, 5, EVERYONE),
    Case(512, *SMALL, EVERYONE, 3, ("all_tokens", "soft_or_50", "entropy_10", *OTHERS)),
    Case(4096, *SMALL, (*FEW, *OTHERS), 2, ("all_tokens", "soft_or_50", "entropy_10", "trl")),
    Case(512, *LARGE, (*FEW, "eopd", *OTHERS, "liger"), 2, ("all_tokens", *OTHERS, "liger")),
    Case(1024, *LARGE, ("bare_products", "all_tokens", "soft_or_50", "trl"), 2, ("all_tokens",)),
    Case(4096, *LARGE, ("bare_products", "all_tokens"), 1, ("all_tokens",)),
)
"""The first is the one that ratios are quoted from."""

QUICK = (Case(64, *SMALL, EVERYONE, 1, ("all_tokens", "trl")),)
PROFILED = ("all_tokens", "materialised", "trl", "trl_tuned", "liger")


def times(inputs: Inputs, runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant, taken in turns once each has run on a few rows."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    few = inputs.first(min(64, len(inputs.student)))
    for name, run in runs.items():  # a compiler wants to see the real size
        run(inputs if name == "liger_compiled" else few)
    for _ in range(rounds):
        for name, run in runs.items():
            inputs.student.grad = inputs.head.grad = None
            gc.collect()
            start = time.perf_counter()
            run(inputs)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def best_tile(inputs: Inputs) -> tuple[int, int]:
    """The tile in which TRL is fastest here."""
    seconds = {}
    trl(inputs.first(64))  # loads its code, or the first tile would pay for it
    for tile in TRL_TILES:
        inputs.student.grad = inputs.head.grad = None
        start = time.perf_counter()
        trl(inputs, tile)
        seconds[tile] = time.perf_counter() - start
    return min(TRL_TILES, key=lambda tile: seconds[tile])


def where_time_goes(inputs: Inputs, run: Run) -> dict[str, float]:
    """Seconds in matrix products and in everything else, seen by torch's profiler."""
    inputs.student.grad = inputs.head.grad = None
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run(inputs)
    spent = {"products": 0.0, "passes": 0.0}
    for event in found.key_averages():
        is_product = event.key in ("aten::mm", "aten::addmm", "aten::addmm_")
        spent["products" if is_product else "passes"] += event.self_cpu_time_total / 1e6
    return spent


def peak_rss() -> int:
    """Largest resident size of this process so far, in bytes.

    (Not ru_maxrss: a child inherits its parent's.)
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("VmHWM:"))


def extra_memory(name: str, run: Run, inputs: Inputs) -> int:
    """Bytes by which one call raises the peak, once a small call has loaded its code."""
    if name != "liger_compiled":
        run(make_inputs(8, 64, inputs.student.shape[1]))
    before = peak_rss()
    run(inputs)
    return peak_rss() - before


def extra_memory_elsewhere(
    name: str, case: Case, tile: tuple[int, int] | None, threads: int
) -> int:
    """`extra_memory` in a process of its own."""
    command = [sys.executable, str(Path(__file__)), "--threads", str(threads), "--memory-of", name]
    command += ["--sizes", *map(str, (case.rows, case.vocab_size, case.width))]
    command += ["--tile", *map(str, tile)] if tile else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure(case: Case, tile: tuple[int, int] | None, threads: int) -> dict[str, Any]:
    """Everything about one case."""
    everyone = contestants(tile)
    runs = {k: everyone[k] for k in case.names if k in everyone and _is_there(k)}
    memory = {
        k: extra_memory_elsewhere(k, case, tile, threads) for k in case.memory_of if k in runs
    }
    inputs = make_inputs(case.rows, case.vocab_size, case.width)
    is_main = case in (CASES[0], *QUICK)
    errors = gradient_errors(inputs, runs) if is_main else {}
    seconds = times(inputs, runs, case.rounds)
    spent = {k: where_time_goes(inputs, runs[k]) for k in PROFILED if k in runs and is_main}
    return {
        "rows": case.rows,
        "vocab_size": case.vocab_size,
        "width": case.width,
        "gradient_bytes": 4 * case.width * (case.rows + case.vocab_size),
        "results": {
            name: {
                "seconds": statistics.median(seconds[name]),
                "seconds_of_rounds": seconds[name],
                "extra_bytes": memory.get(name),
                "error": errors.get(name),
                "profile_s": spent.get(name),
            }
            for name in runs
        },
    }


def _is_there(name: str) -> bool:
    return importlib.util.find_spec(NEEDS.get(name, "torch")) is not None


def table(case: dict[str, Any]) -> str:
    """One case as text: seconds, extra memory, and both as multiples of the all-token objective."""
    results, ours = case["results"], case["results"]["all_tokens"]
    lines = [
        f"N = {case['rows']}, V = {case['vocab_size']}, D = {case['width']}",
        f"{'':16}{'seconds':>9}{'x ours':>8}{'extra MiB':>11}{'x ours':>8}{'error':>10}",
    ]
    for name, r in results.items():
        memory = ""
        if r["extra_bytes"] is not None:
            size = r["extra_bytes"]
            memory = f"{size / MIB:11.0f}{size / ours['extra_bytes']:8.2f}"
        error = "" if r["error"] is None else f"{r['error']:.1e}"
        seconds = r["seconds"]
        lines.append(
            f"{name:16}{seconds:9.3f}{seconds / ours['seconds']:8.2f}{memory:19}{error:>10}"
        )
    return "\n".join(lines)


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions and commit that the figures belong to."""
    packages = ("torch", "trl", "liger-kernel", "transformers")
    versions = {name: _version(name) for name in packages}
    versions |= {"python": platform.python_version(), "tutelage": tutelage.__version__}
    model = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "arguments": {
            k: v
            for k, v in vars(arguments).items()
            if k not in ("memory_of", "out", "sizes", "tile")
        },
        "dtype": "float32",
        "versions": versions,
        "machine": {
            "cpu": model[0].partition(":")[2].strip() if model else platform.processor(),
            "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average_at_start": os.getloadavg(),
            "platform": platform.platform(),
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="the smallest case, one round")
    parser.add_argument("--out", type=Path, help="JSON file (default: results/objective-DATE.json)")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--tile", type=int, nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the benchmark, print the tables and write the JSON."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    tile = tuple(arguments.tile) if arguments.tile else None
    if arguments.memory_of:
        run = contestants(tile)[arguments.memory_of]
        print(extra_memory(arguments.memory_of, run, make_inputs(*arguments.sizes)))
        return
    for name in EVERYONE:
        if not _is_there(name):
            print(f"{name} is left out: {NEEDS[name]} is not installed", file=sys.stderr)
    record = environment(arguments)
    if _is_there("trl"):
        tile = best_tile(make_inputs(512, *SMALL))
    cases = []
    for case in QUICK if arguments.quick else CASES:
        cases.append(measure(case, tile, arguments.threads))
        print(table(cases[-1]), end="\n\n", flush=True)
    name = f"objective-{'quick-' if arguments.quick else ''}{record['date'][:10]}.json"
    out: Path = arguments.out or HERE / "results" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record | {"trl_tile": tile, "cases": cases}, indent=2) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
