"""The benchmarks are scripts beside the package; their modules are found by folder."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("claims", "performance"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / folder))
