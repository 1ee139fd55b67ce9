"""What a harness reports: trials, failures, the 95 % bound, and where it ran."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Outcome:
    """One promise put to the test."""

    promise: str
    trials: int
    failures: int
    control: Mapping[str, Any]
    """What the same detector saw of code that is known to be wrong: it must not be nothing."""
    details: Mapping[str, Any] = field(default_factory=dict)
    is_sample: bool = True
    """Whether the trials are drawn at random, so that a bound can be given."""

    @property
    def bound(self) -> float | None:
        """Largest failure rate that 95 % confidence leaves, where there was no failure."""
        if self.failures or not self.trials or not self.is_sample:
            return None
        return float(1 - 0.05 ** (1 / self.trials))

    def table(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"bound_95": self.bound}


def environment() -> dict[str, Any]:
    """Date, commit, versions and machine."""
    packages = ("tutelage", "torch", "transformers", "accelerate", "safetensors")
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False)
    versions = {name: metadata.version(name) for name in packages}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "versions": versions | {"python": platform.python_version()},
        "machine": {"cpu_count": os.cpu_count(), "platform": platform.platform()},
    }


def write(name: str, outcome: Outcome, seconds: float, folder: Path = RESULTS) -> Path:
    """Write `faults-NAME.json`."""
    path = folder / f"faults-{name}.json"
    table = outcome.table() | {"seconds": round(seconds, 1)} | environment()
    path.write_text(json.dumps(table, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path
