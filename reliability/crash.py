"""Power cuts: every state a disk may be left in, and what the loader makes of it.

A whole run is recorded as creations, writes, fsyncs, renames and removals. A crash keeps what was
fsynced; of the rest, each name and each content may or may not have reached the disk, or only in
part. Every such state must give a checkpoint that is whole and no older than the last one that
`save_checkpoint` reported, the log of each of its steps once, and a readable manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from tutelage.errors import RunError
from tutelage.setup.run_folder import RunFolder
from tutelage.train import checkpoint, checkpoint_thread, saving
from tutelage.train.checkpoint import newest_checkpoint

from . import forked
from .record import Outcome

Operation = list[Any]
"""["create", folder, name, id, is_folder], ["write", id, sum], ["fsync", id], ["commit", step],
["rename", from folder, name, to folder, name] or ["remove", folder, name]; 0 is the run folder."""


class Recorder:
    """Sees what a process does to a folder, by looking at it before every call that matters."""

    def __init__(self, root: Path, blobs: Path) -> None:
        self.root, self.blobs = root, blobs
        self.operations: list[Operation] = []
        self._ids: dict[int, int] = {}
        self._seen: dict[int, tuple[int, int]] = {}
        self._names: set[tuple[int, str]] = set()
        self._next = 1

    def look(self) -> None:
        """Record files and folders that are new or were written to since the last look."""
        if self.root.exists():
            self._ids.setdefault(self.root.stat().st_ino, 0)
            self._look_into(self.root)

    def _look_into(self, folder: Path) -> None:
        above = self._ids[folder.stat().st_ino]
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            stat = entry.stat(follow_symlinks=False)
            if (above, entry.name) not in self._names:
                if stat.st_ino not in self._ids:
                    self._ids[stat.st_ino], self._next = self._next, self._next + 1
                self._names.add((above, entry.name))
                number = self._ids[stat.st_ino]
                self.operations.append(["create", above, entry.name, number, entry.is_dir()])
            if entry.is_dir():
                self._look_into(Path(entry.path))
            elif self._seen.get(stat.st_ino) != (stat.st_size, stat.st_mtime_ns):
                self._seen[stat.st_ino] = (stat.st_size, stat.st_mtime_ns)
                self.operations.append(["write", self._ids[stat.st_ino], self._keep(entry.path)])

    def _keep(self, path: str) -> str:
        content = Path(path).read_bytes()
        name = hashlib.sha256(content).hexdigest()
        (self.blobs / name).write_bytes(content)
        return name

    def _place(self, path: Any, dir_fd: int | None = None) -> tuple[int, str] | None:
        """Folder and name of a path inside the root."""
        base = Path(os.readlink(f"/proc/self/fd/{dir_fd}")) if dir_fd is not None else Path()
        whole = Path(os.path.abspath(base / path))
        if self.root not in whole.parents:
            return None
        return self._ids[whole.parent.stat().st_ino], whole.name

    def fsync(self, plain: Callable[..., Any], descriptor: int) -> None:
        self.look()
        plain(descriptor)
        number = self._ids.get(os.fstat(descriptor).st_ino)
        if number is not None:
            self.operations.append(["fsync", number])

    def rename(self, plain: Callable[..., Any], source: Any, target: Any) -> None:
        self.look()
        here, there = self._place(source), self._place(target)
        plain(source, target)
        if here and there:
            self._names -= {here}
            self._names |= {there}
            self.operations.append(["rename", *here, *there])

    def remove(self, plain: Callable[..., Any], path: Any, *, dir_fd: int | None = None) -> None:
        self.look()
        place = self._place(path, dir_fd)
        number = os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_ino
        plain(path, dir_fd=dir_fd)
        if place:
            self._names -= {place}
            self._ids.pop(number, None)
            self._seen.pop(number, None)
            self.operations.append(["remove", *place])

    def install(self) -> None:
        """Record this process from now on."""
        for name, method in (
            ("fsync", self.fsync),
            ("replace", self.rename),
            ("rename", self.rename),
            ("unlink", self.remove),
            ("rmdir", self.remove),
        ):
            setattr(os, name, _through(method, getattr(os, name)))
        save = checkpoint.save_checkpoint

        def noted(run: Path, step: int, *rest: Any) -> Path:
            path = save(run, step, *rest)
            self.look()
            self.operations.append(["commit", step])
            return path

        saving.save_checkpoint = noted  # type: ignore[attr-defined]
        CheckpointThread = checkpoint_thread.CheckpointThread
        begin, wait = CheckpointThread.save, CheckpointThread.wait
        begun = [-1]

        def waited(thread: CheckpointThread) -> None:
            wait(thread)
            with _LOCK:
                self.look()
                self.operations.append(["commit", begun[0]])

        def noted_begin(thread: CheckpointThread, step: int, *rest: Any) -> None:
            begin(thread, step, *rest)
            begun[0] = step

        CheckpointThread.save = noted_begin  # type: ignore[method-assign]
        CheckpointThread.wait = waited  # type: ignore[method-assign]


_LOCK = threading.RLock()
"""One operation at a time, whichever thread it comes from."""


def _through(method: Callable[..., None], plain: Callable[..., Any]) -> Callable[..., None]:
    def call(*args: Any, **options: Any) -> None:
        with _LOCK:
            method(plain, *args, **options)

    return call


def record(
    models: Path, prepare: Callable[[], None] | None = None, writer: str = "inline"
) -> list[Operation]:
    """What a run does to its folder; contents lie in `blobs` beside it."""
    out, blobs = models / "recorded", models / "blobs"
    blobs.mkdir(exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    log = models / "operations.json"
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            if prepare is not None:
                prepare()
            recorder = Recorder(out, blobs)
            recorder.install()
            code = forked.run(models, out, None, checkpoint_writer=writer)
            recorder.look()
            log.write_text(json.dumps(recorder.operations))
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("the recorded run failed")
    found: list[Operation] = json.loads(log.read_text())
    return found


@dataclass
class Disk:
    """Names and contents after some operations, and which of them are sure to last."""

    names: dict[tuple[int, str], int] = field(default_factory=dict)
    folders: set[int] = field(default_factory=lambda: {0})
    contents: dict[int, str] = field(default_factory=dict)
    lasting: dict[int, str] = field(default_factory=dict)
    """Contents that were fsynced."""
    sure: dict[tuple[int, str], int] = field(default_factory=dict)
    """Names whose folder was fsynced."""
    open_changes: list[Operation] = field(default_factory=list)
    """Changes of names whose folder was not fsynced since."""
    committed: int = -1

    def apply(self, operation: Operation) -> None:
        """One operation; fsync makes content or names last."""
        kind, *rest = operation
        if kind == "commit":
            self.committed = rest[0]
        elif kind == "write":
            self.contents[rest[0]] = rest[1]
        elif kind == "fsync":
            self._sync(rest[0])
        else:
            if kind == "create" and rest[3]:
                self.folders.add(rest[2])
            change(self.names, operation)
            self.open_changes.append(operation)

    def _sync(self, number: int) -> None:
        if number not in self.folders:
            if number in self.contents:
                self.lasting[number] = self.contents[number]
            return
        for operation in self.open_changes:
            if number in touched(operation):
                change(self.sure, operation)
        self.open_changes = [o for o in self.open_changes if number not in touched(o)]


def touched(operation: Operation) -> set[int]:
    """Folders whose names an operation changes."""
    return {operation[1], operation[3]} if operation[0] == "rename" else {operation[1]}


def change(names: dict[tuple[int, str], int], operation: Operation) -> None:
    """Apply a change of names, as far as it can be."""
    kind, folder, name, *rest = operation
    if kind == "create":
        names[folder, name] = rest[0]
    elif kind == "remove":
        names.pop((folder, name), None)
    elif (number := names.pop((folder, name), None)) is not None:
        names[rest[0], rest[1]] = number


POLICIES = ("all", "synced", "torn", "mixed")


Left: TypeAlias = tuple[str, int, bool]
"""What a crash leaves of a file: content, bytes kept (−1 for all), whether zeros fill the rest."""


def crash(disk: Disk, policy: str, rng: random.Random, blobs: Path) -> dict[str, Left]:
    """What a crash leaves, by path."""
    names = dict(disk.names)
    if policy in ("synced", "mixed"):
        names = dict(disk.sure)
        for operation in disk.open_changes:
            if policy == "mixed" and rng.random() < 0.5:
                change(names, operation)
    files: dict[str, Left] = {}
    for path, number in _tree(names, disk.folders):
        volatile, lasting = disk.contents.get(number, ""), disk.lasting.get(number, "")
        files[path] = (volatile, -1, False)
        if volatile == lasting:
            continue
        if policy == "synced" or (policy == "mixed" and rng.random() < 0.3):
            files[path] = (lasting, -1, False)
        elif policy in ("torn", "mixed"):
            new, old = (_read(blobs, content) for content in (volatile, lasting))
            # What an append leaves alone cannot be torn by it.
            least = len(old) if new.startswith(old) else 0
            files[path] = (volatile, rng.randint(least, len(new)), rng.random() < 0.5)
    return files


def _read(blobs: Path, content: str) -> bytes:
    return (blobs / content).read_bytes() if content else b""


def _tree(names: dict[tuple[int, str], int], folders: set[int]) -> Iterator[tuple[str, int]]:
    inside: dict[int, list[tuple[str, int]]] = {}
    for (folder, name), number in names.items():
        inside.setdefault(folder, []).append((name, number))
    stack = [("", 0)]
    while stack:
        prefix, folder = stack.pop()
        for name, number in inside.get(folder, []):
            if number in folders:
                stack.append((f"{prefix}{name}/", number))
                yield f"{prefix}{name}/", number
            else:
                yield f"{prefix}{name}", number


@contextmanager
def on_disk(files: dict[str, Left], blobs: Path, where: Path) -> Iterator[Path]:
    """The state as a real folder."""
    where.mkdir(mode=0o700)
    try:
        for path, (content, size, is_filled) in files.items():
            if path.endswith("/"):
                (where / path).mkdir(parents=True, exist_ok=True)
                continue
            data = _read(blobs, content)
            if size >= 0:
                data = data[:size] + bytes(len(data) - size if is_filled else 0)
            (where / path).parent.mkdir(parents=True, exist_ok=True)
            (where / path).write_bytes(data)
        yield where
    finally:
        shutil.rmtree(where)


def judge(run: Path, committed: int, num_steps: int) -> str:
    """What is wrong with what a start would find; nothing if it may go on."""
    folder = RunFolder(run)
    try:
        folder.open()
        manifest = folder.read_manifest()
        found = newest_checkpoint(run, lambda _: None)
        step = -1 if found is None else found[0]
        folder.rewind(step)
        steps = [line["step"] for line in folder.read("metrics.jsonl")]
    except (RunError, ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        folder.close()
    if step < committed:
        return f"checkpoint {step}, although {committed} was reported as saved"
    if step > num_steps:
        return f"checkpoint {step} of a run of {num_steps}"
    if found is not None and (manifest is None or steps != list(range(1, step + 1))):
        return f"checkpoint {step}, manifest {manifest is not None}, logged steps {steps}"
    return ""


def replay(
    operations: Sequence[Operation], models: Path, size: int, seed: int
) -> tuple[int, list[str]]:
    """Number of different states, at most `size`, and what was wrong with the bad ones."""
    rng = random.Random(seed)
    blobs = models / "blobs"
    share = size / (len(operations) * len(POLICIES))  # of all places in one walk
    seen: set[bytes] = set()
    bad = []
    for _walk in range(50):
        disk = Disk()
        for prefix, operation in enumerate(operations, 1):
            disk.apply(operation)
            for policy in POLICIES:
                if len(seen) == size or rng.random() > 2 * share:
                    continue
                files = crash(disk, policy, rng, blobs)
                key = json.dumps([disk.committed, files], sort_keys=True).encode()
                if (name := hashlib.sha256(key).digest()) in seen:
                    continue
                seen.add(name)
                with on_disk(files, blobs, models / "state") as run:
                    problem = judge(run, disk.committed, forked.SETTINGS["num_steps"])
                if problem:
                    bad.append(f"after {prefix} operations, {policy}: {problem}")
    return len(seen), bad


def without_rename() -> None:
    """A writer that fills the final folder in place."""

    @contextmanager
    def in_place(target: Path) -> Iterator[Path]:
        target.mkdir(mode=0o700)
        yield target

    checkpoint.new_folder = in_place  # type: ignore[attr-defined]


def run(size: int) -> Outcome:
    """`size` different crash states of two runs, one with checkpoints written by a thread."""
    few = max(100, size // 20)
    with forked.models() as folder:
        beside = record(folder, writer="thread")
        num_beside, bad_beside = replay(beside, folder, size // 2, seed=3)
        operations = record(folder)
        num_inline, bad_inline = replay(operations, folder, size - num_beside, seed=0)
        num_states, bad = num_inline + num_beside, bad_inline + bad_beside
        unsynced = [operation for operation in operations if operation[0] != "fsync"]
        _, seen_unsynced = replay(unsynced, folder, few, seed=1)
        _, seen_in_place = replay(record(folder, without_rename), folder, few, seed=2)
    return Outcome(
        "after a crash at any moment the loader finds the old or the new checkpoint, whole",
        trials=num_states,
        failures=len(bad),
        control={
            f"bad states of {few} if fsync did nothing": len(seen_unsynced),
            f"bad states of {few} if checkpoints were written in place": len(seen_in_place),
        },
        details={"operations": forked.tally([o[0] for o in operations]), "problems": bad[:10]},
        is_sample=False,
    )
