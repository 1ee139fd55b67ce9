"""What the software takes on one CUDA device: parts of at most a few minutes, each resumable.

    python benchmarks/performance/gpu.py --list
    python benchmarks/performance/gpu.py  # every part that the result does not hold yet
    python benchmarks/performance/gpu.py --parts objective_small --out results.json --again

Each part runs in a process of its own, so that none holds memory of another: a fork of one that
has imported what parts need and has not touched the device. A part's result, or the traceback that
ended it, is written at once. Both sides of a ratio are timed in one part, on one device; parts
given to `--together` run at the same time, which suits those of errors and of memory.
`scripts/gpu_bundle.py` packs what a machine without a network needs.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODULES = ("gpu_objective", "gpu_rollout", "gpu_step", "gpu_learn", "gpu_memory")
PRELOADED = ("transformers.models.qwen3.modeling_qwen3", "tutelage.train.loop")
"""Imported once for all parts; a process that has asked for a device cannot be forked."""
PACKAGES = ("torch", "triton", "transformers", "accelerate", "trl", "liger-kernel")
Part = Callable[[], dict[str, Any]]


def parts() -> dict[str, Part]:
    """Every part by name, in the order in which they are run."""
    return {name: part for module in MODULES for name, part in _table(module).items()}


def modules() -> dict[str, str]:
    """The module of every part."""
    return {name: module for module in MODULES for name in _table(module)}


def _table(module: str) -> dict[str, Part]:
    found: dict[str, Part] = importlib.import_module(module).PARTS
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


class Running:
    """A part in a process of its own."""

    def __init__(self, name: str, module: str, limit: float, context: BaseContext) -> None:
        self.name, self.limit = name, limit
        self._start = time.perf_counter()
        self._folder = tempfile.TemporaryDirectory()
        self._process = context.Process(  # type: ignore[attr-defined]
            target=_child, args=(module, name, self._folder.name)
        )
        self._process.start()

    def wait(self) -> dict[str, Any]:
        """Its result, or what ended it."""
        self._process.join(max(0.0, self.limit - (time.perf_counter() - self._start)))
        is_late = self._process.is_alive()
        if is_late:
            self._process.kill()
            self._process.join()
        seconds = time.perf_counter() - self._start
        output, result = (Path(self._folder.name, file) for file in ("output", "result"))
        lines = output.read_text(errors="replace").splitlines() if output.exists() else []
        print("\n".join(lines[-60:]), flush=True)
        found: dict[str, Any]
        if result.exists() and not is_late:
            found = json.loads(result.read_text())
        else:
            code = self._process.exitcode
            ended = f"longer than {self.limit:.0f} s" if is_late else f"exit status {code}"
            found = {"failed": ended, "output": lines[-40:]}
        self._folder.cleanup()
        return found | {"wall_s": round(seconds, 1)}


def _child(module: str, name: str, folder: str) -> None:
    """Runs a part; what it and its libraries print goes to a file, so does its result."""
    descriptor = os.open(Path(folder, "output"), os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        found = importlib.import_module(module).PARTS[name]()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    Path(folder, "result").write_text(json.dumps(found, default=float))


def process_context() -> BaseContext:
    """Forks of a process that has imported what most parts need; fresh ones where these fail."""
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join((str(HERE), *([path] if path else ())))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    probe = context.Process(target=_touch_device)
    probe.start()
    probe.join()
    if probe.exitcode == 0:
        return context
    print("An import of the parts asks for the device, so each part imports anew.", flush=True)
    return multiprocessing.get_context("spawn")


def _touch_device() -> None:
    import torch

    if torch.cuda.is_available():
        torch.zeros(1, device="cuda").sum().item()


def _is_held(found: dict[str, Any] | None) -> bool:
    """Whether a part has a result."""
    return found is not None and "failed" not in found


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
    parser.add_argument("--together", nargs="+", default=[], help="parts run at the same time")
    given = parser.parse_args()
    sys.path.insert(0, str(HERE))
    known = modules()
    if given.list:
        print("\n".join(known))
        return
    unknown = [name for name in (*given.together, *given.parts) if name not in known]
    if unknown:
        sys.exit(f"no part is called {unknown[0]!r}; --list shows them.")
    about = environment()
    card = about["device"].lower().replace(" ", "-")
    out: Path = given.out or HERE.parent / "results" / f"gpu-{card}-{about['date']}.json"
    record = json.loads(out.read_text()) if out.exists() else {**about, "parts": {}}
    context, start, longer = process_context(), time.perf_counter(), limits()

    def measure(names: Sequence[str]) -> None:
        left = [n for n in names if given.again or not _is_held(record["parts"].get(n))]
        if given.budget and time.perf_counter() - start > given.budget:
            print(f"{' '.join(left)}: left out, the budget is spent", flush=True)
            return
        running = [
            Running(n, known[n], max(given.limit, longer.get(n, 0.0)), context) for n in left
        ]
        for part in running:
            print(f"== {part.name}", flush=True)
            found = part.wait()
            print(f"== {part.name}: {found.get('failed', 'done')} in {found['wall_s']} s")
            record["parts"][part.name] = found | {"commit": about["commit"]}
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(record, indent=1) + "\n")

    measure(given.together)
    for name in given.parts or (() if given.together else known):
        measure([name])
    if any("failed" in found for found in record["parts"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
