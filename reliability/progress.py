"""Long harnesses go on where they were cut off: results of trials by number, in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeAlias

from .record import ROOT

Result: TypeAlias = dict[str, Any]
"""Plain values; `problems` lists what was wrong."""


def trials(name: str, size: int, one: Callable[[int], Result], least: int = 100) -> list[Result]:
    """Results of trials 0 to `size` − 1; those of an earlier, cut-off call are not repeated.

    They count only for the same code. Below `least` trials nothing is kept.
    """
    path = ROOT / ".faults" / f"{name}-{_code()}.jsonl"
    known: list[Result] = []
    if size >= least:
        path.parent.mkdir(exist_ok=True)
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            known = [json.loads(line) for line in lines if line.endswith("\n")][:size]
            path.write_text("".join(json.dumps(r) + "\n" for r in known), encoding="utf-8")
    for number in range(len(known), size):
        known.append(one(number))
        if size >= least:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(known[-1]) + "\n")
    return known


def _code() -> str:
    folders = (ROOT / "src" / "tutelage", ROOT / "tests")
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
