"""Time and memory of the distillation objective against other ways to compute the same numbers.

All contestants get the same hidden states and heads and compute the sum over rows of the full
reverse KL with its gradients for the student's hidden states and head; ours compute both KLs and
both entropies of every row besides. Times are taken in one process, in turns; extra peak memory in
one process for each. About ten minutes on two quiet cores.

    pip install -e '.[bench]'
    python benchmarks/performance/objective.py --threads 2
    python benchmarks/performance/objective.py --cases 2 4  # these again, into the same file
    python benchmarks/performance/objective.py --quick  # the smallest case, one round: does it run?
    python benchmarks/performance/performance_page.py  # the page from the results

The result is written after every case.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import tutelage
from objective_contestants import (
    CONTESTANTS,
    LIGER_CHUNKS,
    NEEDS,
    TRL_TILES,
    Inputs,
    contestants,
    gradient_errors,
    liger,
    make_inputs,
    trl,
)
from operators import Operators

HERE = Path(__file__).resolve().parents[1]
MIB = 1 << 20
SMALL, LARGE = (49152, 576), (151936, 1024)
"""V and D of SmolLM2-135M and of Qwen3-0.6B."""

EVERYONE = (*CONTESTANTS, "trl_tuned", "liger_tuned")
PEERS = ("materialised", "trl", "trl_tuned", "liger", "liger_tuned")
TUNED = ("trl_tuned", "liger_tuned")
FEW = ("bare_products", "all_tokens", "soft_or_50", "entropy_10")

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
    Case(1024, *SMALL, EVERYONE, 3, (*FEW, "soft_or_10", *PEERS, "liger_compiled")),
    Case(512, *SMALL, (*FEW, *PEERS), 3, ("all_tokens", "soft_or_50", "entropy_10", *PEERS)),
    Case(4096, *SMALL, (*FEW, "trl"), 1, ("all_tokens", "entropy_10", "trl")),
    Case(512, *LARGE, (*FEW, "eopd", "materialised", *TUNED), 2, ("all_tokens", *TUNED)),
    Case(1024, *LARGE, FEW, 1, ("all_tokens",)),
    Case(4096, *LARGE, ("all_tokens",), 1, ("all_tokens",)),
)
"""The first is the one that ratios are quoted from."""

QUICK = (Case(64, *SMALL, EVERYONE, 1, ("all_tokens", "trl")),)
PROFILED = ("all_tokens", "all_tokens_torch", *PEERS)


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


T = TypeVar("T")


def fastest(run: Callable[[Inputs, T], Any], settings: Sequence[T], inputs: Inputs) -> T:
    """The setting in which a peer is fastest here."""
    seconds = []
    run(inputs.first(64), settings[0])  # loads its code, or the first setting would pay for it
    for setting in settings:
        inputs.student.grad = inputs.head.grad = None
        start = time.perf_counter()
        run(inputs, setting)
        seconds.append(time.perf_counter() - start)
    return settings[seconds.index(min(seconds))]


def where_time_goes(inputs: Inputs, run: Run) -> dict[str, float]:
    """Seconds in matrix products and in everything else, seen by torch's profiler."""
    inputs.student.grad = inputs.head.grad = None
    operators = Operators()
    operators.begin()
    run(inputs)
    spent = operators.end()
    products = spent.pop("products_s")
    return {"products": products, "passes": sum(spent.values())}


def peak_rss() -> int:
    """Largest resident size of this process so far, in bytes.

    (Not ru_maxrss: a child inherits its parent's.)
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("VmHWM:"))


def extra_memory(name: str, run: Run, inputs: Inputs) -> int:
    """Bytes that one call needs beyond what is resident, once an earlier one has loaded its code.

    A compiler compiles for the real size, so its earlier call has that.
    """
    run(inputs if name == "liger_compiled" else make_inputs(8, 64, inputs.student.shape[1]))
    inputs.student.grad = inputs.head.grad = None
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = peak_rss()
    run(inputs)
    return peak_rss() - before


def extra_memory_elsewhere(name: str, case: Case, options: Sequence[str]) -> int:
    """`extra_memory` in a process of its own."""
    command = [sys.executable, __file__, *options, "--memory-of", name]
    command += ["--sizes", *map(str, (case.rows, case.vocab_size, case.width))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the memory of {name} could not be measured:\n{done.stderr[-3000:]}")
    return int(done.stdout.split()[-1])


def measure(case: Case, everyone: dict[str, Run], options: Sequence[str]) -> dict[str, Any]:
    """Everything about one case."""
    load = os.getloadavg()
    runs = {k: everyone[k] for k in case.names if k in everyone and _is_there(k)}
    memory = {k: extra_memory_elsewhere(k, case, options) for k in case.memory_of if k in runs}
    inputs = make_inputs(case.rows, case.vocab_size, case.width)
    is_main = case in (CASES[0], *QUICK)
    errors = gradient_errors(inputs, runs) if is_main else {}
    seconds = times(inputs, runs, case.rounds)
    spent = {k: where_time_goes(inputs, runs[k]) for k in PROFILED if k in runs and is_main}
    return {
        "rows": case.rows,
        "vocab_size": case.vocab_size,
        "width": case.width,
        "load_average": load,
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
            if k not in ("memory_of", "out", "sizes", "tile", "liger_chunk", "child")
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
    numbers = range(1, len(CASES) + 1)
    parser.add_argument(
        "--cases", type=int, nargs="+", choices=numbers, default=list(numbers), help="only these"
    )
    parser.add_argument("--out", type=Path, help="JSON file (default: results/objective-DATE.json)")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--tile", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--liger-chunk", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the benchmark, print the tables and write the JSON."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        tile = tuple(arguments.tile) if arguments.tile else None
        run = contestants(tile, arguments.liger_chunk)[arguments.memory_of]
        print(extra_memory(arguments.memory_of, run, make_inputs(*arguments.sizes)))
        return
    for name in EVERYONE:
        if not _is_there(name):
            print(f"{name} is left out: {NEEDS[name]} is not installed", file=sys.stderr)
    record = environment(arguments)
    name = f"objective-{'quick-' if arguments.quick else ''}{record['date'][:10]}.json"
    out: Path = arguments.out or HERE / "results" / name
    record |= begun(out, record) or tuning(64 if arguments.quick else 512)
    tile, chunk = record["trl_tile"], record["liger_chunk"]
    options = ["--threads", str(arguments.threads)]
    options += ["--tile", *map(str, tile)] if tile else []
    options += ["--liger-chunk", str(chunk)] if chunk else []
    everyone = contestants(tile, chunk)
    for case in QUICK if arguments.quick else [CASES[i - 1] for i in arguments.cases]:
        found = measure(case, everyone, options)
        write_case(out, record, found)
        print(table(found), end="\n\n", flush=True)
    print(f"written to {out}")


def tuning(rows: int) -> dict[str, Any]:
    """The settings in which peers are fastest here, and no cases yet."""
    inputs = make_inputs(rows, *SMALL)
    return {
        "trl_tile": fastest(trl, TRL_TILES, inputs) if _is_there("trl") else None,
        "liger_chunk": fastest(liger, LIGER_CHUNKS, inputs) if _is_there("liger") else None,
        "cases": [],
    }


def begun(out: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Tuning and cases that the file has from this commit and these versions, if it has any."""
    if not out.exists():
        return {}
    before = json.loads(out.read_text())
    if any(before[key] != record[key] for key in ("commit", "versions")):
        print(f"{out} is of another commit or other versions; it is written anew", file=sys.stderr)
        return {}
    return {key: before[key] for key in ("trl_tile", "liger_chunk", "cases")}


def write_case(out: Path, record: dict[str, Any], found: dict[str, Any]) -> None:
    """The file with one more case; one of the same sizes is replaced."""

    def sizes(case: dict[str, Any]) -> tuple[int, ...]:
        return tuple(case[k] for k in ("rows", "vocab_size", "width"))

    order: list[tuple[int, ...]] = [(c.rows, c.vocab_size, c.width) for c in (*CASES, *QUICK)]
    cases = [*(c for c in record["cases"] if sizes(c) != sizes(found)), found]
    record["cases"] = sorted(cases, key=lambda c: order.index(sizes(c)))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
