"""Calling the program as a user does, and the small settings that every run here uses."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.cli import main

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "src" / "tutelage" / "assets"
LEDGER = ROOT / "configs" / "examples" / "ledger.toml"
STUDENT = "package:tutelage/assets/ledger-overconfident"
TEACHER = "package:tutelage/assets/ledger-teacher"
TINY = (
    "num_steps=2",
    "prompts_per_step=4",
    "micro_batch_size=3",
    "evaluation.num_problems=0",
    "optimizer.warmup_steps=0",
)


@dataclass(frozen=True)
class Outcome:
    """What a user sees of one command."""

    code: int
    out: str
    err: str

    @property
    def records(self) -> list[Any]:
        """Standard output as one JSON value a line."""
        return [json.loads(line) for line in self.out.splitlines()]


def call(*arguments: object) -> Outcome:
    """Run one command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: Any = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse: --help, --version and its own errors
            code = stop.code or 0
    return Outcome(code, out.getvalue(), err.getvalue())


def succeed(*arguments: object) -> Outcome:
    """Run one command that must work."""
    outcome = call(*arguments)
    assert outcome.code == 0, outcome.err
    return outcome


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, *records: object) -> Path:
    """Write records (a text as it stands) as lines."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
