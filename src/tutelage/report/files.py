"""Writing pages and pictures."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from tutelage.errors import RunError, remedy


def write(path: Path, content: bytes, option: str = "--out") -> None:
    """Replace a file in one move, so that an interrupted write leaves the old one.

    Raises:
        RunError: the file cannot be written; names the option that chooses another place.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content)
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise RunError(
            f"{path} cannot be written: {error.strerror}. "
            + remedy(error, f"Choose another place with {option}.")
        ) from error
