"""The errors a user can cause. The command line prints their text in one line and exits with 2."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)


class TutelageError(Exception):
    """Base of every error a user can cause: one line saying what, the value seen, what to do."""


class ConfigError(TutelageError, ValueError):
    """A configuration value is missing, unknown or out of range."""


class DataError(TutelageError, ValueError):
    """A prompt file or data set cannot be used."""


class ModelError(TutelageError, ValueError):
    """A model or tokenizer cannot be loaded, or two of them do not fit each other."""


class RunError(TutelageError, RuntimeError):
    """A run folder cannot be written, read or continued."""


class LostProcessError(RunError):
    """Another process of the command is gone or silent."""


class MissingExtraError(TutelageError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install '{package}' (the project's extra {extra!r})."
        )


def as_share(value: object) -> str:
    """A sentence with the share for a percentage; empty for other values."""
    if not isinstance(value, int | float) or not 2 < value <= 100:
        return ""
    return f"Write {value / 100:g} for {value:g} %. "


def is_full(error: BaseException) -> bool:
    """Whether a write failed because a disk or a quota is full."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    # Libraries in Rust have the number in their text.
    return any(f"(os error {number})" in str(error) for number in _FULL)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, or torch on a CPU or an accelerator, could not get memory."""
    text = str(error)
    words = ("out of memory", "allocate memory", "not enough memory")
    is_torch = isinstance(error, RuntimeError) and any(word in text for word in words)
    return isinstance(error, MemoryError) or is_torch


def remedy(
    error: BaseException, otherwise: str = "Make it writable and start the same command again."
) -> str:
    """What to do after a failed write: about a full disk, or `otherwise`."""
    return "Free some space and start the same command again." if is_full(error) else otherwise


def explained(error: OSError, is_output: bool) -> str:
    """One line about a name that is too long or a full disk; any other error is a defect."""
    if error.errno == errno.ENAMETOOLONG:
        return f"{error.filename} is too long for a name. Give a shorter one."
    if not is_full(error):
        raise error
    # A failed write, other than a failed open, does not name its file.
    unnamed = f"a file, perhaps a temporary one in {tempfile.gettempdir()},"
    place = "the output" if is_output else error.filename or unnamed
    return f"{place} cannot be written: {error.strerror}. {remedy(error)}"


@contextmanager
def explained_write(path: Path, kept: str) -> Iterator[None]:
    """Turn an error of the disk into one line that names what was kept."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {error.strerror}. {kept} {remedy(error)}"
        ) from None
