"""Sealed folders in a run folder, one for each step, that are written once and read once a step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tutelage.errors import RunError, explained_write
from tutelage.files.atomic import new_folder, remove_remnants
from tutelage.files.checksums import DamagedError, seal, unseal

_SPARE_BYTES = 16 << 20
"""Room that logs need besides."""


class Store:
    """The parts of one kind, which `states` has of the teacher's hidden states.

    Args:
        folder: holds them; made by the first that is written.
        origin: what they were made of; parts of another origin are refused.
        counted: folder whose files count towards the limit; None for `folder`.
    """

    def __init__(self, folder: Path, origin: dict[str, Any], counted: Path | None = None) -> None:
        self.folder, self._counted = folder, counted or folder
        self.origin: dict[str, Any] = json.loads(json.dumps(origin))
        self.states: Store | None = None

    def part(self, step: int | str) -> Path:
        """The folder of a step, or of something that all steps need."""
        return self.folder / (step if isinstance(step, str) else f"step-{step:06d}")

    def missing(self, steps: Iterable[int]) -> list[int]:
        """Steps that have no part yet."""
        return [step for step in steps if not self.part(step).is_dir()]

    def open(self) -> None:
        """Make the folder, without what a process left that died.

        Raises:
            RunError: it cannot be written.
        """
        with explained_write(self.folder, "Nothing was lost."):
            self.folder.mkdir(mode=0o700, exist_ok=True)
            remove_remnants(self.folder)

    def write(self, step: int | str, fill: Callable[[Path], None]) -> None:
        """Write the part of a step, whole or not at all.

        Args:
            step: of the run, or the name of what all steps need.
            fill: writes its files into a folder.

        Raises:
            RunError: it cannot be written; earlier parts stay.
        """
        target = self.part(step)
        with explained_write(target, "Earlier parts are untouched."), new_folder(target) as folder:
            fill(folder)
            seal(folder, {"step": step, "origin": self.origin})

    def read(self, step: int) -> Path:
        """The folder of a step, every byte of which is as it was written.

        Raises:
            RunError: it is missing, damaged, or of another origin.
        """
        path = self.part(step)
        try:
            facts = unseal(path)
        except (DamagedError, OSError) as error:
            what = error.strerror if isinstance(error, OSError) else error
            raise RunError(
                f"{path} cannot be used: {what}. Restore it, or choose another out=FOLDER for a "
                "run with rollouts of its own."
            ) from None
        self._require_origin(path, facts)
        return path

    def _require_origin(self, path: Path, facts: dict[str, Any]) -> None:
        found = facts.get("origin")
        origin = found if isinstance(found, dict) else {}
        keys = sorted(self.origin.keys() | origin.keys())
        other = [key for key in keys if origin.get(key) != self.origin.get(key)]
        if other:
            raise RunError(
                f"{path} was made with another {' and another '.join(other)} than the run's. "
                "Restore that, or choose another out=FOLDER for a run with rollouts of its own."
            )

    def require_space(self, needed: int, limit: int, what: str) -> None:
        """Refuse to begin what the disk, or the limit that the run sets, has no room for.

        Args:
            needed: bytes that are still to be written, about.
            limit: `rollouts.max_bytes`.
            what: is to be written, for the message.

        Raises:
            RunError: there is too little room.
        """
        used = sum(file.stat().st_size for file in self._counted.rglob("*") if file.is_file())
        if used + needed > limit:
            raise RunError(
                f"{what} needs about {used + needed:,} bytes, more than rollouts.max_bytes = "
                f"{limit:,}. Raise it, or lower num_steps or sampling.max_new_tokens."
            )
        free = shutil.disk_usage(self.folder).free
        if needed + _SPARE_BYTES > free:
            raise RunError(
                f"{what} needs about {needed:,} bytes and the disk of {self.folder} has {free:,} "
                "left. Free some space, or choose out=FOLDER on a larger disk."
            )
