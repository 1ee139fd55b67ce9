"""`python -m reliability [--short] [NAME …]`: run harnesses and write what they saw."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # for `reference` and `tiny`
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # as in the command line, before torch

HARNESSES: dict[str, tuple[int, int]] = {
    "mutants": (0, 0),
    "partition": (12, 1_000),
    "grader": (5_000, 1_000_000),
    "configurations": (14, 500),
    "kill": (6, 150),
    "peers": (4, 40),
    "kill_conversations": (2, 30),
    "kill_stored": (1, 60),
    "kill_grpo": (2, 30),
    "families": (18, 0),
    "disk": (5, 150),
    "numerics": (10_000, 1_000_000),
    "signals": (11, 66),
    "masks": (300, 5_000),
    "grader_sweep": (60, 0),
    "crash": (300, 10_000),
    "server": (300, 5_000),
    "hidden_server": (122, 2_000),
    "corruption": (100, 5_000),
}
"""Modules here with `run(size) -> Outcome`, and the sizes of the short and the long version.

0 is everything there is. The longest come first, so that no two jobs wait for a third at the end.
"""


@dataclass(frozen=True)
class Ending:
    """How a harness in a process of its own ended."""

    name: str
    code: int
    seconds: float
    said: str
    """Its first line."""

    def __str__(self) -> str:
        verdict = {0: "holds", 1: "BROKEN"}.get(self.code, f"ended with {self.code}")
        return f"{self.name:13} {self.seconds:6.0f} s  {verdict:10}  {self.said}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m reliability", description=__doc__)
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
    options, start = ["--json"] * arguments.json, time.perf_counter()
    names.sort(key=list(HARNESSES).index)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        endings = list(pool.map(lambda name: alone(name, options, start), names))
    print("", *endings, f"{'all':13} {time.perf_counter() - start:6.0f} s", sep="\n")
    return max(abs(ending.code) for ending in endings)


def alone(name: str, options: list[str], start: float) -> Ending:
    """Run a harness in a process of its own: some fork, and so must not have computed."""
    began = time.perf_counter()
    print(f"[{began - start:5.0f} s] {name} begins", flush=True)
    command = [sys.executable, "-m", "reliability", *options, name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    now = time.perf_counter()
    said = [line for line in done.stdout.splitlines() if line.startswith(f"{name}: ")]
    print(f"{done.stdout}[{now - start:5.0f} s] {name} ended", flush=True)
    return Ending(name, done.returncode, now - began, said[0] if said else "no result")


def one(name: str, is_short: bool, is_json: bool) -> int:
    """Run a harness here; 1 if a trial failed, or its control saw nothing."""
    start = time.perf_counter()
    size = HARNESSES[name][0 if is_short else 1]
    outcome = importlib.import_module(f"reliability.{name}").run(size)
    is_blind = any(type(seen) is int and seen == 0 for seen in outcome.control.values())
    print(f"{name}: {outcome.failures} of {outcome.trials} failed; control {outcome.control}"
          f"{', which sees nothing' * is_blind}")  # fmt: skip
    if is_json:
        print(json.dumps(outcome.table()))
    if not is_short:
        write = importlib.import_module("reliability.record").write
        print(f"  {write(name, outcome, time.perf_counter() - start)}")
    return 1 if outcome.failures or is_blind else 0


if __name__ == "__main__":
    sys.exit(main())
