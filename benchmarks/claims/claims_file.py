"""Records of finished cells: the working file, one as JSON a line, and one run again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
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


def differing(
    published: Mapping[str, Any], again: Mapping[str, Any], not_compared: Sequence[str]
) -> list[str]:
    """Names of the published figures of a cell that were different when it was run again."""
    return [k for k, v in published.items() if k not in not_compared and again[k] != v]
