"""What the software takes on one CUDA device: parts of at most a few minutes, each resumable.

    python benchmarks/performance/gpu.py --list
    python benchmarks/performance/gpu.py  # every part that the result does not hold yet
    python benchmarks/performance/gpu.py --parts objective_small --out results.json --again

Each part runs in a process of its own, so that none holds memory of another; its result, or the
traceback that ended it, is written at once. Both sides of a ratio are timed in one part, on one
device. `scripts/gpu_bundle.py` packs what a machine without a network needs.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODULES = ("gpu_objective", "gpu_rollout", "gpu_step", "gpu_learn", "gpu_memory")
PACKAGES = ("torch", "triton", "transformers", "accelerate", "trl", "liger-kernel")
Part = Callable[[], dict[str, Any]]


def parts() -> dict[str, Part]:
    """Every part by name, in the order in which they are run."""
    found: dict[str, Part] = {}
    for name in MODULES:
        table: dict[str, Part] = importlib.import_module(name).PARTS
        found |= table
    return found


def limits() -> dict[str, float]:
    """Seconds of the parts that need more than most."""
    found: dict[str, float] = {}
    for name in MODULES:
        found |= getattr(importlib.import_module(name), "LIMITS", {})
    return found


def environment() -> dict[str, Any]:
    """Device, versions and commit."""
    import torch

    device = torch.cuda.get_device_properties(0)
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return {
        "device": device.name,
        "device_bytes": device.total_memory,
        "driver": _line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "packages": versions,
        "commit": os.environ.get("TUTELAGE_COMMIT") or _line(["git", "rev-parse", "HEAD"]),
        "date": datetime.date.today().isoformat(),
    }


def _line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0]


def run_part(name: str, limit: float) -> dict[str, Any]:
    """One part in a process of its own; its result, or what ended it."""
    start = time.perf_counter()
    command = [sys.executable, "-u", __file__, "--child", name]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    try:
        output, _ = child.communicate(timeout=limit)
        lines = output.splitlines()
        ended = f"exit status {child.returncode}" if child.returncode else ""
    except subprocess.TimeoutExpired:
        child.kill()
        lines = child.communicate()[0].splitlines()
        ended = f"longer than {limit:.0f} s"
    seconds = time.perf_counter() - start
    if not ended and lines and lines[-1].startswith("{"):
        print("\n".join(lines[:-1]), flush=True)
        found: dict[str, Any] = json.loads(lines[-1])
        return found | {"wall_s": round(seconds, 1)}
    print("\n".join(lines[-40:]), flush=True)
    return {"failed": ended or "no result", "output": lines[-40:], "wall_s": round(seconds, 1)}


def main() -> None:
    """Run parts and write their results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="names of the parts, and end")
    parser.add_argument("--parts", nargs="+", default=[], help="only these, in this order")
    parser.add_argument("--out", type=Path, help="result file; default benchmarks/results/gpu-…")
    parser.add_argument("--again", action="store_true", help="parts that have a result, too")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds a part may take")
    parser.add_argument(
        "--budget", type=float, default=0.0, help="start no part after these seconds"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    sys.path.insert(0, str(HERE))
    if given.child:
        print(json.dumps(parts()[given.child]()))
        return
    known = parts()
    if given.list:
        print("\n".join(known))
        return
    unknown = [name for name in given.parts if name not in known]
    if unknown:
        sys.exit(f"no part is called {unknown[0]!r}; --list shows them.")
    about = environment()
    card = about["device"].lower().replace(" ", "-")
    out: Path = given.out or HERE.parent / "results" / f"gpu-{card}-{about['date']}.json"
    record = json.loads(out.read_text()) if out.exists() else {**about, "parts": {}}
    start, longer = time.perf_counter(), limits()
    for name in given.parts or known:
        held = record["parts"].get(name)
        if held and "failed" not in held and not given.again:
            continue
        if given.budget and time.perf_counter() - start > given.budget:
            print(f"{name}: left out, the budget is spent", flush=True)
            continue
        print(f"== {name}", flush=True)
        found = run_part(name, max(given.limit, longer.get(name, 0.0)))
        print(f"== {name}: {found.get('failed', 'done')} in {found['wall_s']} s", flush=True)
        record["parts"][name] = found | {"commit": about["commit"]}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
    if any("failed" in found for found in record["parts"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
