"""A run folder: its lock, its logs with one line a step, and its manifest."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from tutelage import __version__
from tutelage.config.parse import fingerprint
from tutelage.config.schema import Config
from tutelage.errors import RunError, explained_write, remedy
from tutelage.files.atomic import remove_remnants, write_atomically
from tutelage.files.lock import FolderLock
from tutelage.files.log import append_text, parse_line

EVALUATION_LOGS = ("evaluation.jsonl", "evaluation_rows.jsonl", "samples.jsonl")
LOGS = ("metrics.jsonl", *EVALUATION_LOGS, "tokens.jsonl")
"""Files with one JSON object a line; every object has a `step`."""

_NUMBER = (float, int, NoneType)
_INTERVALS = [
    f"{name}{end}" for name in ("mean_at_k", "pass_at_k") for end in ("", "_low", "_high")
]
_TYPES: dict[str, dict[str, tuple[type, ...]]] = {
    "metrics.jsonl": {"step": (int,), "num_skipped_updates": (int,)},
    "evaluation.jsonl": {
        "step": (int,),
        "model": (str,),
        "k": (int,),
        "num_problems": (int,),
        "held_out_reverse_kl_nats": _NUMBER,
        **dict.fromkeys(_INTERVALS, _NUMBER),
    },
}
"""Keys of the logs that a continued run needs, and their types."""


_CPU = (
    "ATEN_CPU_CAPABILITY",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
)
"""Variables that choose the instructions of the CPU, as another CPU would."""
_CONTENTS = {
    "student": "the trained model",
    "metrics.jsonl": "every step",
    "evaluation.jsonl": "scores on held-out prompts",
    "samples.jsonl": "some completions",
    "manifest.json": "configuration and environment",
}


def run_folder(config: Config, name: str = "run") -> Path:
    """The folder of a run: `out`, or runs/NAME-FINGERPRINT."""
    return Path(config.out) if config.out else Path("runs") / f"{name}-{fingerprint(config)}"


def describe_contents(folder: Path) -> str:
    """One line on where a finished run's results are, and what they are."""
    found = (f"{name} ({what})" for name, what in _CONTENTS.items() if (folder / name).exists())
    return f"results in {folder}: {', '.join(found)}"


class RunFolder:
    """The files of one run. Open it before training: it locks the folder against a second run.

    Of several processes one is the writer; the others read, and their writes do nothing.
    """

    def __init__(self, path: Path, is_writer: bool = True) -> None:
        self.path = path
        self.is_writer = is_writer
        self._lock = FolderLock(path / "lock")
        self._is_new = False

    def open(self) -> None:
        """Create the folder and take its lock.

        Raises:
            RunError: the folder cannot be written, or a running process holds it.
        """
        if not self.is_writer:
            return
        try:
            self._is_new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock.take()
            remove_remnants(self.path)
        except OSError as error:
            raise RunError(
                f"run folder {self.path} cannot be written: {error.strerror}. "
                + remedy(error, "Choose another with out=FOLDER.")
            ) from None

    def close(self) -> None:
        """Release the lock, and remove a new folder that stayed empty."""
        self._lock.release()
        if self._is_new:
            with contextlib.suppress(OSError):  # it holds something
                self.path.rmdir()

    def append(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Add lines to a log, flushed to disk before it returns.

        Raises:
            RunError: the disk is full; the next start drops a line that is cut off.
        """
        self.append_text(name, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))

    def append_text(self, name: str, text: str) -> None:
        """`append` for lines that are JSON already."""
        if not self.is_writer:
            return
        path = self.path / name
        with explained_write(path, "Checkpoints are untouched."):
            append_text(path, text)

    def rewind(self, step: int, logs: Sequence[str] = LOGS) -> None:
        """Drop every logged line of a step after `step`, so that no step is logged twice."""
        for name in logs:
            path = self.path / name
            if self.is_writer and path.exists():
                with explained_write(path, "Checkpoints are untouched."):
                    lines = path.read_bytes().splitlines(keepends=True)
                    kept = [text for text in map(_text, lines) if _is_at_most(text, step)]
                    if len(kept) < len(lines):
                        write_atomically(path, "".join(kept))

    def read(self, name: str) -> list[dict[str, Any]]:
        """The lines of a log; none if there is no such file.

        Raises:
            RunError: a line is not what a run writes.
        """
        path = self.path / name
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(parse_line(line, _TYPES.get(name, {})))
            except (ValueError, RecursionError) as error:
                raise RunError(
                    f"{path}, line {number} is damaged ({error}). Restore the file, or choose "
                    "another out=FOLDER."
                ) from None
        return rows

    def size(self, name: str) -> int:
        """Bytes of a log; 0 if there is no such file."""
        path = self.path / name
        return path.stat().st_size if path.exists() else 0

    def has_evaluation(self, step: int) -> bool:
        """Whether the student's evaluation after `step` was logged."""
        records = self.read("evaluation.jsonl")
        return any((r["step"], r["model"]) == (step, "student") for r in records)

    def read_manifest(self) -> dict[str, Any] | None:
        """The manifest, or None in a new folder.

        Raises:
            RunError: it is not readable JSON, or holds no configuration.
        """
        path = self.path / "manifest.json"
        if not path.exists():
            return None
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"{path} cannot be read: {error}. Choose another out=FOLDER.") from None
        if not isinstance(manifest, dict) or not isinstance(manifest.get("config"), dict):
            raise RunError(
                f"{path} holds no configuration of a run, got {str(manifest)[:40]!r}. Restore the "
                "file, or choose another out=FOLDER."
            )
        return manifest

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Replace the manifest, whole or not at all.

        Raises:
            RunError: the disk is full; the old one stays.
        """
        if self.is_writer:
            path = self.path / "manifest.json"
            with explained_write(path, "Checkpoints are untouched."):
                write_atomically(path, json.dumps(manifest, indent=2) + "\n")


def _text(line: bytes) -> str:
    """A line of a log; nothing if its bytes are no text."""
    try:
        return line.decode()
    except UnicodeDecodeError:
        return ""


def _is_at_most(line: str, step: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (json.JSONDecodeError, RecursionError, KeyError, TypeError):
        return False  # cut off when the process died


def environment() -> dict[str, Any]:
    """Versions, hardware and commit, for the manifest."""
    names = ("torch", "transformers", "accelerate", "tokenizers", "safetensors")
    optional = ("triton", "liger-kernel", "peft", "bitsandbytes", "vllm")
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in names},
            **{name: version for name in optional if (version := _version(name))},
            "tutelage": __version__,
        },
        "hardware": {
            "machine": platform.machine(),
            "cpu_count": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            # what sums are rounded by, besides the number of threads
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "variables": {name: os.environ[name] for name in _CPU if name in os.environ},
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "platform": sys.platform,
        "commit": _commit(),
    }


def _version(name: str) -> str | None:
    """Of an installed package; None for a source tree without the metadata of an installation."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def started_at(manifest: dict[str, Any] | None) -> datetime | None:
    """When the run of a manifest began; None for no run, or one from before this was kept.

    Raises:
        RunError: it is no date.
    """
    text = None if manifest is None else manifest.get("started")
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise RunError(
            f"manifest.json must hold the date at which the run began as 'started', got {text!r}. "
            "Restore the file, or choose another out=FOLDER."
        ) from None


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
