"""An evaluation folder: the settings, one JSON line a sample, and the summary.

Rows are kept in whole chunks of problems, so that an evaluation that was cut off continues with
the same batches, hence the same numbers, as one that was not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from types import NoneType
from typing import Any, TypeAlias

from tutelage.errors import RunError, explained_write, remedy
from tutelage.files.atomic import write_atomically
from tutelage.files.lock import FolderLock
from tutelage.files.log import append_text, parse_line

Row: TypeAlias = dict[str, Any]
SETTINGS, ROWS, SUMMARY, TABLE = "settings.json", "rows.jsonl", "summary.json", "summary.md"

_STARTED = "started"
"""Of the settings, what may differ: the date that templates print, of the first start."""
_TYPES: dict[str, type | tuple[type, ...]] = {
    "benchmark": str,
    "prompt_id": str,
    "sample": int,
    "is_correct": (bool, NoneType),
    "is_truncated": bool,
    "num_tokens": (int, NoneType),
    "answer": (str, NoneType),
    "completion": str,
}
"""What every saved sample has."""


class EvaluationFolder:
    """Saved samples of one evaluation; open it with `with`, which locks it."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = settings
        self.started: datetime | None = datetime.now()
        """When the evaluation began; None in a folder from before this was kept."""
        self._rows: dict[tuple[str, str], dict[int, Row]] = {}
        self._places: dict[tuple[str, str], int] = {}
        """Where in the file the first row of each problem starts."""
        self._lock = FolderLock(path / "lock", "evaluation")

    def __enter__(self) -> EvaluationFolder:
        """Create or reopen the folder.

        Raises:
            RunError: it cannot be written, is in use, or holds another evaluation.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock.take()
            self._check_settings()
            self._read_rows()
        except OSError as error:
            self._lock.release()
            raise RunError(
                f"evaluation folder {self.path} cannot be written: {error.strerror}. "
                + remedy(error, "Choose another with --out.")
            ) from None
        except RunError:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _check_settings(self) -> None:
        path = self.path / SETTINGS
        if not path.exists():
            head = {_STARTED: self.started and self.started.isoformat(timespec="seconds")}
            write_atomically(path, json.dumps(head | self.settings, indent=2) + "\n")
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise RunError(f"{path} is not JSON ({error}). Choose another --out.") from None
        if not isinstance(found, dict):
            raise RunError(f"{path} holds no settings, got {found!r:.40}. Choose another --out.")
        self.started = _date(path, found.pop(_STARTED, None))
        wanted = json.loads(json.dumps(self.settings))
        differing = sorted(
            key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)
        )
        if differing:
            key = differing[0]
            raise RunError(
                f"{self.path} holds another evaluation: {', '.join(differing)} differ "
                f"({key} was {found.get(key)!r}, is {wanted.get(key)!r}). Choose another --out."
            )

    def _read_rows(self) -> None:
        path = self.path / ROWS
        if not path.exists():
            append_text(path, "")
        lines = path.read_bytes().split(b"\n")
        end = 0
        for number, line in enumerate(lines[:-1], start=1):  # what follows the last \n is torn
            try:
                row = parse_line(line, _TYPES)
                key = (row["benchmark"], row["prompt_id"])
            except (ValueError, RecursionError) as error:
                raise RunError(
                    f"{path}, line {number} is damaged ({error}). Choose another --out."
                ) from None
            self._rows.setdefault(key, {})[row["sample"]] = row
            self._places.setdefault(key, end)
            end += len(line) + 1
        os.truncate(path, end)

    def find(self, benchmark: str, prompt_ids: Sequence[str], num_samples: int) -> list[Row] | None:
        """The rows of a chunk of problems, all of them in order, or None if any is missing.

        A part of a chunk, written when the process died, is removed with all that follows.
        """
        keys = [(benchmark, prompt_id) for prompt_id in prompt_ids]
        samples = set(range(num_samples))
        if all(self._rows.get(key, {}).keys() == samples for key in keys):
            return [self._rows[key][sample] for key in keys for sample in sorted(samples)]
        partial = [self._places[key] for key in keys if key in self._places]
        if partial:
            cut = min(partial)
            os.truncate(self.path / ROWS, cut)
            for key in [key for key, place in self._places.items() if place >= cut]:
                del self._places[key], self._rows[key]
        return None

    def append(self, rows: Iterable[Row]) -> None:
        """Save the rows of a chunk, on disk before it returns.

        Raises:
            RunError: the disk is full; the next start drops a line that is cut off.
        """
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        with explained_write(self.path / ROWS, "What was saved before stays."):
            append_text(self.path / ROWS, text)

    def finish(self, summary: dict[str, Any], table: str) -> None:
        """Write the summary as JSON and as Markdown.

        Raises:
            RunError: the disk is full; the samples stay.
        """
        with explained_write(self.path, "What was saved before stays."):
            write_atomically(self.path / SUMMARY, json.dumps(summary, indent=2) + "\n")
            write_atomically(self.path / TABLE, table + "\n")


def _date(path: Path, text: object) -> datetime | None:
    try:
        return None if text is None else datetime.fromisoformat(str(text))
    except ValueError:
        raise RunError(
            f"{path} must hold a date as {_STARTED!r}, got {text!r:.40}. Choose another --out."
        ) from None
