"""Files and folders that are whole or not there, and stay so through a crash or a power cut.

The order is always: write beside the target, fsync every file and folder, rename, fsync the parent.
It holds on local POSIX file systems; network file systems and object stores promise less.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file so that a reader sees the old or the new one, never a part."""
    temporary = temporary_beside(path)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; once the block ends it stands as `target`, which must not exist.

    If the block raises, what it wrote is removed.
    """
    temporary = temporary_beside(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(mode=0o700)
    try:
        yield temporary
        sync_tree(temporary)
        temporary.replace(target)
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def discard(folder: Path) -> None:
    """Remove a folder; it is out of sight before the first file in it goes."""
    hidden = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
    folder.replace(hidden)
    shutil.rmtree(hidden)


def temporary_beside(path: Path) -> Path:
    """Name of a file or folder in the making, which `remove_remnants` knows."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_remnants(folder: Path) -> None:
    """Remove what a process left that died while it wrote or removed something."""
    for remnant in folder.glob(".*.tmp"):
        shutil.rmtree(remnant) if remnant.is_dir() else remnant.unlink()


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below a folder, and itself, to disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
