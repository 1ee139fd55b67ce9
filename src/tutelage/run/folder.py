"""A run folder: who writes it, its logs with one line a step, and its manifest."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tutelage.errors import RunError

LOGS = ("metrics.jsonl", "evaluation.jsonl", "evaluation_rows.jsonl", "samples.jsonl")
"""Files with one JSON object a line; every object has a `step`."""
EVALUATION_LOGS = LOGS[1:]


class RunFolder:
    """The files of one run. Open it before training: it locks the folder against a second run.

    Of several processes one is the writer; the others read, and their writes do nothing.
    """

    def __init__(self, path: Path, is_writer: bool = True) -> None:
        self.path = path
        self.is_writer = is_writer
        self._lock = path / "lock"

    def open(self) -> None:
        """Create the folder and take its lock.

        Raises:
            RunError: the folder cannot be written, or a running process holds it.
        """
        if not self.is_writer:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._take_lock()
            for remnant in self.path.glob(".*.tmp"):  # of a process that died while it wrote
                shutil.rmtree(remnant) if remnant.is_dir() else remnant.unlink()
        except OSError as error:
            raise RunError(
                f"run folder {self.path} cannot be written: {error.strerror}. "
                "Choose another with out=FOLDER."
            ) from None

    def close(self) -> None:
        """Give the lock back."""
        if self.is_writer:
            self._lock.unlink(missing_ok=True)

    def _take_lock(self) -> None:
        mine = {"pid": os.getpid(), "host": platform.node()}
        try:
            descriptor = os.open(self._lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            self._refuse_living_owner()
            self._lock.unlink(missing_ok=True)
            descriptor = os.open(self._lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(mine, file)

    def _refuse_living_owner(self) -> None:
        try:
            owner = json.loads(self._lock.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return  # released, or torn while its owner died
        is_here = owner["host"] == platform.node()
        if is_here and not _is_alive(owner["pid"]):
            return
        raise RunError(
            f"run folder {self.path} is in use by process {owner['pid']} on {owner['host']}. "
            f"Wait for it, or delete {self._lock} if that process is gone."
        )

    def append(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Add lines to a log, flushed to disk before it returns."""
        if not self.is_writer:
            return
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def rewind(self, step: int, logs: Sequence[str] = LOGS) -> None:
        """Drop every logged line of a step after `step`, so that no step is logged twice."""
        for name in logs:
            path = self.path / name
            if self.is_writer and path.exists():
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                kept = [line for line in lines if _is_at_most(line, step)]
                write_atomically(path, "".join(kept))

    def has_evaluation(self, step: int) -> bool:
        """Whether the student's evaluation after `step` was logged."""
        path = self.path / "evaluation.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines]
        return any((r["step"], r["model"]) == (step, "student") for r in records)

    def read_manifest(self) -> dict[str, Any] | None:
        """The manifest, or None in a new folder.

        Raises:
            RunError: it is not readable JSON.
        """
        path = self.path / "manifest.json"
        if not path.exists():
            return None
        try:
            manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read: {error}. Choose another out=FOLDER.") from None
        return manifest

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Replace the manifest, whole or not at all."""
        if self.is_writer:
            write_atomically(self.path / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file so that a reader sees the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _is_at_most(line: str, step: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (json.JSONDecodeError, KeyError, TypeError):
        return False  # torn while the process died


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def environment() -> dict[str, Any]:
    """Versions, hardware and commit, for the manifest."""
    names = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "tutelage")
    return {
        "versions": {"python": platform.python_version()} | {n: metadata.version(n) for n in names},
        "hardware": {
            "machine": platform.machine(),
            "cpu_count": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "platform": sys.platform,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Commit of the checkout this package runs from; None for an installed wheel."""
    if "site-packages" in Path(__file__).parts:
        return None  # git would answer for whatever repository the environment lies in
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
