"""`python -m tests.faults [--short] [NAME …]`: run harnesses and write what they saw."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
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
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in HARNESSES]
    if unknown:
        parser.error(f"no harness is called {unknown[0]!r}; choose from {', '.join(HARNESSES)}.")
    record = importlib.import_module("faults.record")
    failures = 0
    for name in arguments.names or HARNESSES:
        start = time.perf_counter()
        size = HARNESSES[name][0 if arguments.short else 1]
        outcome = importlib.import_module(f"faults.{name}").run(size)
        failures += outcome.failures
        print(f"{name}: {outcome.failures} of {outcome.trials} failed; control {outcome.control}")
        if arguments.json:
            print(json.dumps(outcome.table()))
        if not arguments.short:
            print(f"  {record.write(name, outcome, time.perf_counter() - start)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
