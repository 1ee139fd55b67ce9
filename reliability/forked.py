"""Whole tiny runs in forked children, which a harness kills, signals or starves.

The parent has imported torch and transformers but never computed with them, so a child starts in
no time. Named points are calls around which the child counts; the product knows nothing of them.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers.models.auto.tokenization_auto  # noqa: F401 (or every child would import it)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from tiny import MEASURED, save_tiny_model, tiny_config
from tutelage.errors import TutelageError
from tutelage.evaluation import measure
from tutelage.files.lock import FolderLock
from tutelage.models.student import Student
from tutelage.models.teacher import Teacher
from tutelage.rollout.conversation import Conversations
from tutelage.rollout.sampler import TransformersSampler
from tutelage.setup.run_folder import RunFolder
from tutelage.train import checkpoint, saving
from tutelage.train import loop as train
from tutelage.train.step import Step

POINTS: dict[str, tuple[Any, str]] = {
    "lock": (FolderLock, "take"),
    "rewind": (RunFolder, "rewind"),
    "verify": (checkpoint, "unseal"),
    "build_components": (train, "build_components"),
    "load moments": (train, "load_optimizer"),
    "sample": (TransformersSampler, "sample"),
    "answer": (Conversations, "answer"),
    "teacher": (Teacher, "forward"),
    "forward": (Student, "forward"),
    "backward": (torch.Tensor, "backward"),
    "update": (torch.optim.AdamW, "step"),
    "log": (RunFolder, "append"),
    "evaluate": (measure, "_evaluate"),
    "save": (saving, "save_checkpoint"),
    "save model": (checkpoint, "save_model"),
    "save moments": (checkpoint, "save_file"),
    "seal": (checkpoint, "seal"),
    "rotate": (checkpoint, "discard"),
    "export": (saving, "save_model"),
    "fsync": (os, "fsync"),
    "rename": (os, "replace"),
    "rename model": (os, "rename"),
    "mkdir": (os, "mkdir"),
    "unlink": (os, "unlink"),
    "rmdir": (os, "rmdir"),
}
"""Calls of a run, each a point before and a point after."""

Event = Callable[[str, int], None]
"""Called with the point's name, such as "before fsync", and how many points came before."""


def watch_points(event: Event) -> None:
    """Call `event` before and after every call of a point, in this process."""
    count = [0]

    def tell(name: str) -> None:
        count[0] += 1  # before the event, which may raise
        event(name, count[0] - 1)

    def wrap(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            tell(f"before {name}")
            found = plain(*args, **options)
            tell(f"after {name}")
            return found

        return call

    for name, (owner, attribute) in POINTS.items():
        setattr(owner, attribute, wrap(name, getattr(owner, attribute)))


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    code: int
    """Exit code, or minus the signal."""
    text: str
    """What it said, and a traceback if it failed in an unforeseen way."""


@contextmanager
def models() -> Iterator[Path]:
    """A temporary folder with a tiny student and teacher."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # fsync costs nothing there
    with tempfile.TemporaryDirectory(prefix="faults-", dir=memory) as name:
        folder = Path(name)
        pid = os.fork()  # so that this process computes nothing
        if pid == 0:
            save_tiny_model(folder / "student", seed=1)
            save_tiny_model(folder / "teacher", seed=2)
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError("the tiny models could not be made")
        warm_up()
        yield folder


def warm_up() -> None:
    """Do once what every child would do: a third of its time."""
    get_checkpoint_conversion_mapping("qwen3")  # compiles a thousand patterns, once a process
    gc.collect()
    gc.freeze()  # a child's collector would copy every page of what was imported


def start(
    models: Path,
    out: Path,
    event: Event | None = None,
    prepare: Callable[[], None] | None = None,
    **changes: Any,
) -> int:
    """Start or continue a run in a child, prepared at last; its process number."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        if prepare is not None:
            prepare()
        code = run(models, out, event, **changes)
    except BaseException:  # whatever it is, the harness has to see it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(models: Path, out: Path, event: Event | None, **changes: Any) -> int:
    """What the command line does with a run; its exit code."""
    config = tiny_config(models, out, **(SETTINGS | changes))
    note_rollouts(out.with_suffix(".rollouts"))
    if event is not None:
        watch_points(event)
    try:
        return 0 if train.train(config, log=print).is_finished else 130
    except TutelageError as error:
        print(f"tutelage: {error}")
        return 2
    except KeyboardInterrupt:
        return 130


SETTINGS: dict[str, Any] = {
    "selection": {"rule": "soft_or", "keep": 0.5},
    "evaluation": {"num_problems": 2, "num_samples": 2, "every": 2},
    "num_steps": 6,
    "checkpoint_every": 2,
    "keep_checkpoints": 2,
}


def note_rollouts(path: Path) -> None:
    """Append the ids of every rollout of every step, as one sum, to a file."""
    write = Step.generate

    def noted(step: Step, number: int) -> Any:
        drawn = write(step, number)
        ids = json.dumps([r.completion_ids for r in drawn])
        with path.open("a") as file:
            file.write(f"{number} {hashlib.sha256(ids.encode()).hexdigest()}\n")
        return drawn

    Step.generate = noted  # type: ignore[method-assign]


def end(pid: int, out: Path) -> Ended:
    """Wait for a child."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return Ended(code, out.with_suffix(".log").read_text(errors="replace"))


def kill_at(number: int) -> Event:
    """End the process, without any clean-up, at a point."""

    def event(_name: str, count: int) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return event


def trace(models: Path, out: Path, **changes: Any) -> list[str]:
    """Names of the points of a run, in order; the run is made in `out`."""
    path = out.with_suffix(".points")

    def event(name: str, _count: int) -> None:
        with path.open("a") as file:
            file.write(name + "\n")

    ended = end(start(models, out, event, **changes), out)
    if ended.code:
        raise RuntimeError(f"the unbroken run failed: {ended.text}")
    return path.read_text().splitlines()


def portrait(out: Path) -> dict[str, Any]:
    """All that must be equal in two runs: logged numbers but times, weights, moments, files."""
    logs = {path.name: _lines(path) for path in sorted(out.glob("*.jsonl"))}
    tensors = {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*.safetensors"))
    }
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    rollouts = sorted(set(out.with_suffix(".rollouts").read_text().splitlines()))
    return {"logs": logs, "tensors": tensors, "files": files, "rollouts": rollouts}


def _lines(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: v for key, v in record.items() if key not in MEASURED} for record in records]


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Parts of two portraits that differ."""
    return [part for part in expected if found[part] != expected[part]]


def tally(names: list[str]) -> dict[str, int]:
    """How often each name came."""
    return dict(sorted(Counter(names).items()))


class Trials:
    """Trials against one untroubled run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.points = trace(folder, folder / "unbroken")
        self.expected = self.portrait(folder / "unbroken")

    def portrait(self, out: Path) -> dict[str, object]:
        """What is compared: a stop saves a checkpoint more, so that others than the last differ."""
        found = portrait(out)
        kept = ("checkpoint-000006", "student")
        tensors = {name: s for name, s in found["tensors"].items() if name.startswith(kept)}
        return {"logs": found["logs"], "tensors": tensors, "rollouts": found["rollouts"]}

    def again(self, out: Path, problems: list[str]) -> list[str]:
        """The problems, and those of the same command without trouble; a good run is removed."""
        ended = end(start(self.folder, out), out)
        if ended.code:
            return [*problems, f"continued: exit code {ended.code}: {ended.text[-300:]}"]
        problems = problems + differences(self.portrait(out), self.expected)
        if not problems and not out.is_mount():
            shutil.rmtree(out)
        return problems
