"""Sealed folders: checksums of all files, by which every change is detected.

safetensors finds a file that was cut short, but loads one with a flipped bit without an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SEAL = "state.json"
"""Facts about the folder, and length and SHA-256 of every other file in it."""


_NUM_THREADS = 8
"""Files whose checksums are computed at the same time."""


class DamagedError(Exception):
    """A sealed folder is not what it was; the text says which file and how."""


def seal(
    folder: Path, facts: dict[str, Any], known: Mapping[str, dict[str, Any]] | None = None
) -> None:
    """Write the seal of a folder that is complete otherwise.

    Args:
        folder: the folder.
        facts: what `unseal` returns.
        known: `checksum` of files, by path in the folder, which are not read again.
    """
    sums = dict(known or {}) | _sums(folder, set(known or ()))
    (folder / SEAL).write_text(_text({**facts, "files": sums}), encoding="utf-8")


def unseal(folder: Path) -> dict[str, Any]:
    """The facts of a sealed folder, every byte of which is as it was.

    Raises:
        DamagedError: a file is missing, was added, or differs.
        OSError: a file cannot be read.
    """
    path = folder / SEAL
    try:
        text = path.read_text(encoding="utf-8")
        table = json.loads(text)
    except (FileNotFoundError, ValueError, RecursionError):
        raise DamagedError(f"{SEAL} is missing or not JSON") from None
    if not isinstance(table, dict) or not isinstance(expected := table.get("files"), dict):
        raise DamagedError(f"{SEAL} lists no files")
    if _text({key: value for key, value in table.items() if key != "digest"}) != text:
        raise DamagedError(f"{SEAL} was changed")
    found = _sums(folder)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise DamagedError(f"{name} is missing")
        if name not in expected:
            raise DamagedError(f"{name} does not belong to it")
        if found[name] != expected[name]:
            raise DamagedError(f"{name} was changed or cut short")
    return {key: value for key, value in table.items() if key not in ("files", "digest")}


def _sums(folder: Path, known: Set[str] = frozenset()) -> dict[str, dict[str, Any]]:
    found = (p for p in sorted(folder.rglob("*")) if not p.is_dir() and p != folder / SEAL)
    files = {name: p for p in found if (name := p.relative_to(folder).as_posix()) not in known}
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return dict(zip(files, pool.map(checksum, files.values()), strict=True))


def checksum(path: Path) -> dict[str, Any]:
    """Length and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _text(table: dict[str, Any]) -> str:
    """A table as JSON text, with a digest of itself."""
    body = json.dumps(table, sort_keys=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({**table, "digest": digest}, indent=1, sort_keys=True) + "\n"
