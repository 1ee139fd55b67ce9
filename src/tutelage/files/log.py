"""Logs: files of JSON objects, one a line, that only grow and may end in a torn line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage.files.atomic import sync


def append_text(path: Path, text: str) -> None:
    """Add whole lines to a log, flushed to disk before it returns.

    Raises:
        OSError: the disk is full; the last line may be torn.
    """
    is_new = not path.exists()
    with path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync(path.parent)


def parse_line(line: bytes, types: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """One object of a log, with at least the given keys.

    Raises:
        ValueError: it is not JSON, no object, or a key is missing or of another type.
        RecursionError: it is nested too deeply.
    """
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"it holds {row!r:.40}")
    for key, allowed in types.items():
        if key not in row or not isinstance(row[key], allowed):
            raise ValueError(f"{key} is {row.get(key, 'missing')!r:.40}")
    return row
