"""`python -m tests.faults [--short] [NAME …]`: run harnesses and write what they saw."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `reference` and `tiny`

HARNESSES: dict[str, tuple[int, int]] = {
    "numerics": (10_000, 1_000_000),
    "masks": (300, 5_000),
    "grader": (5_000, 1_000_000),
    "grader_sweep": (60, 0),
    "server": (300, 5_000),
    "kill": (6, 150),
    "signals": (11, 66),
    "crash": (500, 10_000),
    "corruption": (100, 5_000),
    "disk": (5, 150),
    "partition": (50, 1_000),
    "mutants": (0, 0),
}
"""Modules here with `run(size) -> Outcome`, and the sizes of the short and the long version.

0 is everything there is.
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(HARNESSES))
    parser.add_argument("--short", action="store_true", help="small sizes, nothing is written")
    parser.add_argument("--json", action="store_true", help="print each outcome as a JSON line")
    parser.add_argument("--jobs", type=int, default=1, help="harnesses at a time")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in HARNESSES]
    if unknown:
        parser.error(f"no harness is called {unknown[0]!r}; choose from {', '.join(HARNESSES)}.")
    names = arguments.names or list(HARNESSES)
    if arguments.short or len(names) == 1:
        return max(one(name, arguments.short, arguments.json) for name in names)
    options = ["--json"] * arguments.json
    with ThreadPoolExecutor(arguments.jobs) as pool:
        return max(pool.map(lambda name: alone(name, options), names))


def alone(name: str, options: list[str]) -> int:
    """Exit code of a harness in a process of its own: some fork, and so must not have computed."""
    command = [sys.executable, "-m", "tests.faults", *options, name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, end="", flush=True)
    return abs(done.returncode)


def one(name: str, is_short: bool, is_json: bool) -> int:
    """Run a harness here; 1 if a trial failed."""
    start = time.perf_counter()
    size = HARNESSES[name][0 if is_short else 1]
    outcome = importlib.import_module(f"faults.{name}").run(size)
    print(f"{name}: {outcome.failures} of {outcome.trials} failed; control {outcome.control}")
    if is_json:
        print(json.dumps(outcome.table()))
    if not is_short:
        write = importlib.import_module("faults.record").write
        print(f"  {write(name, outcome, time.perf_counter() - start)}")
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
