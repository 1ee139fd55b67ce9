"""Disks that fail: the n-th call raises, once or from then on; files may grow no further; a real
file system, mounted for one trial, becomes full at some point and has room again later.

Whatever happens, the run either goes on or ends in one line with exit code 2, and the same command
afterwards reaches the same end as a run that had no trouble. A full disk costs no checkpoint.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
from pathlib import Path

from tutelage.files.checksums import DamagedError, unseal
from tutelage.train.checkpoint import list_checkpoints

from . import forked, mount, progress
from .record import Outcome

CALLS = ("fsync", "rename", "rename model", "mkdir", "unlink", "rmdir", "save moments", "seal")
ERRORS = (errno.EIO, errno.ENOSPC, errno.EMFILE)
LARGEST_BYTES = 60_000
"""No checkpoint of these runs does without a file larger than that."""
DISK_BYTES = 24 << 20
"""Of a mounted disk: room for a run, and for what it wants to have left before a checkpoint."""
BALLAST = "ballast"


def fail_at(place: int, number: int, is_once: bool) -> forked.Event:
    """Raise an error instead of a call that may fail, at a point or from it on."""

    def event(name: str, count: int) -> None:
        is_call = name.startswith("before ") and name.removeprefix("before ") in CALLS
        if is_call and (count == place or (count > place and not is_once)):
            raise OSError(number, os.strerror(number))

    return event


def fill_at(place: int, spare: int, out: Path) -> forked.Event:
    """Note what is saved at a point, and leave the disk of a run `spare` bytes from then on."""

    def event(_name: str, count: int) -> None:
        if count == place:
            out.with_suffix(".saved").write_text(json.dumps(sorted(whole_steps(out))))
            with (out / BALLAST).open("wb") as file:
                free = shutil.disk_usage(out).free
                os.posix_fallocate(file.fileno(), 0, max(free - spare, 1))

    return event


def whole_steps(out: Path) -> set[int]:
    """Steps whose checkpoints are as they were written."""
    found = set()
    for step, path in list_checkpoints(out):
        try:
            found |= {step} if unseal(path) == {"step": step} else set()
        except DamagedError:
            continue
    return found


class Trials(forked.Trials):
    """Trials with a disk that fails."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.places = [
            i for i, name in enumerate(self.points)
            if name.startswith("before ") and name.removeprefix("before ") in CALLS
        ]  # fmt: skip

    def one(self, number: int) -> progress.Result:
        """Fail, look at how it ended, continue, compare."""
        rng = random.Random(number)
        out = self.folder / f"run-{number}"
        place, error = rng.choice(self.places), rng.choice(ERRORS)
        event = fail_at(place, error, is_once=number % 2 == 0)
        ended = forked.end(forked.start(self.folder, out, event), out)
        problems = self.again(out, ending(ended))
        call = self.points[place].removeprefix("before ")
        return {"call": call, "code": ended.code, "problems": problems}

    def full(self, number: int) -> progress.Result:
        """No file may grow beyond a limit, which also holds where Python does not see the write."""
        out = self.folder / f"full-{number}"
        limit = int(LARGEST_BYTES * random.Random(number).random())

        def prepare() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        ended = forked.end(forked.start(self.folder, out, prepare=prepare), out)
        problems = ending(ended) if "tutelage: " in ended.text or ended.code != 2 else []
        if ended.code == 0:
            problems.append(f"a limit of {limit} bytes was never met")
        out.with_suffix(".log").unlink()  # it may be cut off
        return {"call": "file size", "code": ended.code, "problems": self.again(out, problems)}

    def filled(self, number: int) -> progress.Result:
        """A disk becomes full; what was saved stays, and the run goes on when there is room."""
        rng = random.Random(number)
        place = rng.choice(self.places)
        spare = rng.choice([0, rng.randrange(0, 1 << 18, 4096)])
        out = self.folder / f"disk-{number}"
        out.mkdir(mode=0o700)

        def trial() -> progress.Result:
            event = fill_at(place, spare, out)
            ended = forked.end(forked.start(self.folder, out, event), out)
            problems = ending(ended)
            saved = json.loads(out.with_suffix(".saved").read_text())
            if max(whole_steps(out), default=-1) < max(saved, default=-1):
                problems.append(f"of the checkpoints {saved}, {whole_steps(out)} are left")
            (out / BALLAST).unlink()
            return {"code": ended.code, "problems": self.again(out, problems)}

        return {"call": "full disk"} | mount.in_mount(out, DISK_BYTES, trial)


def ending(ended: forked.Ended) -> list[str]:
    """What is wrong with how a troubled run ended."""
    if ended.code not in (0, 2) or "Traceback" in ended.text:
        return [f"exit code {ended.code}: {ended.text[-400:]}"]
    lines = [line for line in ended.text.splitlines() if line.startswith("tutelage: ")]
    if ended.code == 2 and (len(lines) != 1 or not ended.text.rstrip().endswith(lines[0])):
        return [f"not one line: {ended.text[-400:]}"]
    return []


def run(size: int) -> Outcome:
    """`size` troubled runs, a fifth with a limit on files and a fifth on a disk that is full."""
    fifth = -(-size // 5)
    with forked.models() as folder:
        trials = Trials(folder)
        (folder / "mount").mkdir()
        refused = mount.refusal(folder / "mount")

        def one(number: int) -> progress.Result:
            if number < fifth:
                return trials.full(number)
            return (
                trials.filled(number) if number < 2 * fifth and not refused else trials.one(number)
            )

        results = progress.trials("disk", size, one)
    return Outcome(
        "a call that fails, a file that may not grow or a full disk ends a run in one line at "
        "most, costs no checkpoint, and the same command reaches the same end",
        trials=size,
        failures=sum(bool(result["problems"]) for result in results),
        control={"runs that the trouble ended": sum(result["code"] == 2 for result in results)},
        details={
            "calls": forked.tally([result["call"] for result in results]),
            "runs ended, by call": forked.tally(
                [result["call"] for result in results if result["code"] == 2]
            ),
            "mounting refused": refused,
            "problems": [result for result in results if result["problems"]][:10],
        },
    )
