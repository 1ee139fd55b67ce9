"""The working file of a benchmark: finished cells as JSON, one a line, the last perhaps torn."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def finished(path: Path) -> dict[str, dict[str, Any]]:
    """Records of finished cells by key; lines torn by an interruption are left out."""
    if not path.exists():
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "key" in record:  # lines of earlier code may have none
            found[record["key"]] = record
    return found


def end_line(path: Path) -> None:
    """End the last line of a file, which an interruption may have torn; a new file is empty."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
