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

from tutelage.errors import RunError, remedy


@contextmanager
def new_file(target: Path, is_durable: bool = True) -> Iterator[Path]:
    """A path to write to; once the block ends, what was written stands as `target`, whole.

    Args:
        target: its path; a file that stands there is replaced.
        is_durable: flush it to disk first. A file that another process reads at once need not be.
    """
    temporary = temporary_beside(target)
    try:
        yield temporary
        if is_durable:
            sync(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    if is_durable:
        sync(target.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file so that a reader sees the old or the new one, never a part."""
    with new_file(path) as new:
        new.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def write_output(path: Path, content: str | bytes, option: str = "--out") -> None:
    """Write a file that a command was asked for.

    Raises:
        RunError: it cannot be written; names the option that chooses another place.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {error.strerror}. "
            + remedy(error, f"Choose another place with {option}.")
        ) from error


@contextmanager
def new_folder(target: Path, is_private: bool = True, replaces: bool = False) -> Iterator[Path]:
    """A folder to fill; once the block ends it stands as `target`.

    If the block raises, what it wrote is removed.

    Args:
        target: its path; nothing may stand there unless `replaces`.
        is_private: readable by its owner alone; else as any new folder.
        replaces: an existing folder of that name is removed after its successor stands.
    """
    temporary = temporary_beside(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(mode=0o700 if is_private else 0o777)
    try:
        yield temporary
        sync_tree(temporary)
        if replaces and target.exists():
            with _aside(target):
                temporary.replace(target)
        else:
            temporary.replace(target)
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _aside(folder: Path) -> Iterator[None]:
    """A folder is hidden in the block and removed after it; an error restores it."""
    hidden = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
    folder.replace(hidden)
    try:
        yield
    finally:
        if not folder.exists():
            hidden.replace(folder)
    shutil.rmtree(hidden, ignore_errors=True)


def move(path: Path, target: Path) -> None:
    """Give a file or folder another name, for good."""
    path.replace(target)
    sync(target.parent)


def discard(folder: Path) -> None:
    """Remove a folder; it is hidden before its first file is removed."""
    hidden = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
    folder.replace(hidden)
    shutil.rmtree(hidden)


def temporary_beside(path: Path) -> Path:
    """Name of an unfinished file or folder, which `remove_remnants` removes."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_remnants(folder: Path) -> None:
    """Remove unfinished files and folders of a process that died."""
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
