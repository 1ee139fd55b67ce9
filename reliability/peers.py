"""One process of a run is killed or stopped: do the others end, and does the run continue?

Runs of 2 and 4 processes, each started by itself, process 0 with their store; every fifth run is
started by `tutelage.commands.launch`. While process 0 is in a phase (with the launcher, at a random
moment after the first step), one process gets SIGKILL or SIGSTOP. All others have to end within a
time limit with exit code 2 and one line on standard error each (with the launcher, one for all),
nothing else there; exit code 0 is right only once all files are written. A stopped process that is
continued ends as well, in one line, and changes no file. Then the same command in all of them
continues to the weights, moments, logs and files of the unbroken run of as many processes, bit for
bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tutelage.commands.train  # here, or every child would import it
from tiny import MEASURED, tiny_table
from tutelage.cli import main
from tutelage.rollout.sampler import TransformersSampler
from tutelage.train import loop, peers
from tutelage.train.measurements import Measurements
from tutelage.train.saving import Saver
from tutelage.train.step import Step

from . import forked, progress
from .record import Outcome

PHASES: dict[str, tuple[Any, str]] = {
    "start": (peers.Peers, "meet"),
    "loading": (loop, "build_components"),
    "rollout": (TransformersSampler, "sample"),
    "teacher": (Step, "teacher_forward"),
    "score": (Step, "select"),
    "learn": (torch.Tensor, "backward"),
    "update": (torch.optim.AdamW, "step"),
    "checkpoint": (Saver, "save"),
    "evaluation": (Measurements, "evaluate"),
    "snapshot": (Measurements, "record"),
    "export": (Saver, "export"),
    "verdict": (Measurements, "conclude"),
    "report": (tutelage.commands.train, "write_report"),
}
"""Each begins with a call. Their number has no divisor in common with the other periods of trials.
"""
_ONCE = ("start", "loading", "export", "verdict", "report")
KILL_LIMIT_S = 10.0
"""Seconds in which all others have to end."""
TIMEOUT_S = 5
"""`process_timeout_s` of the runs."""
HANG_S = 240.0
VARIANTS: tuple[tuple[int, dict[str, Any]], ...] = (
    (2, {}),
    (4, {}),
    (2, {"student.sharding": "fsdp2"}),
)
"""Processes, and what their configuration has besides."""
_CHANGES = {
    "scoring": "forward",
    "selection": {"rule": "soft_or", "keep": 0.5},
    "evaluation": {"num_problems": 4, "num_samples": 2, "every": 2},
    "recording": {"every": 2, "num_prompts": 2, "num_rollouts": 2, "max_new_tokens": 8},
    "process_timeout_s": TIMEOUT_S,
}


class Group:
    """The processes of one start of a run.

    Args:
        config: file of the configuration.
        out: run folder; the processes' output lies beside it.
        count: of processes.
        event: called in process 0 with the name of each phase that begins there, and the process
            numbers of all.
        overrides: of the configuration.
        prepare: called in each process before it starts.
    """

    def __init__(
        self,
        config: Path,
        out: Path,
        count: int,
        overrides: dict[str, Any],
        event: Callable[[str, list[int]], None] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.out, self.count = out, count
        self.arguments = ["train", str(config), f"out={out}"]
        self.arguments += [f"{key}={value}" for key, value in overrides.items()]
        self.event, self.prepare = event, prepare
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.pids: list[int] = []
        self.ends: dict[int, tuple[int, float]] = {}
        """Exit code, or minus the signal, and time of the end, by process."""
        for path in out.parent.glob(f"{out.name}.rank*"):
            path.unlink()
        for rank in reversed(range(count)):  # process 0 knows the numbers of all others
            self.pids.insert(0, self._start(rank))

    def _start(self, rank: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 70
        try:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(
                    os.open(self._log(rank, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number
                )
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {"WORLD_SIZE": str(self.count), "LOCAL_WORLD_SIZE": str(self.count)}
            os.environ |= {"MASTER_PORT": str(self.port), "GLOO_SOCKET_IFNAME": "lo"}
            torch.set_num_threads(1)
            if self.prepare is not None:
                self.prepare()
            if rank == 0 and self.event is not None:
                watch(self.event, [os.getpid(), *self.pids])
            code = main(self.arguments)
        except BaseException:  # whatever it is, the harness has to see it
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, ranks: list[int], seconds: float) -> bool:
        """Whether these processes ended in time."""
        deadline = time.monotonic() + seconds
        while True:
            for rank in ranks:
                if rank not in self.ends:
                    pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
                    if pid:
                        code = os.waitstatus_to_exitcode(status)
                        self.ends[rank] = (code, time.time())
            if all(rank in self.ends for rank in ranks):
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)

    def errors(self, rank: int) -> list[str]:
        """Lines of a process on standard error."""
        return self._log(rank, "err").read_text(errors="replace").splitlines()

    def _log(self, rank: int, name: str) -> Path:
        return self.out.with_name(f"{self.out.name}.rank{rank}.{name}")

    def close(self) -> None:
        """End what is left."""
        for rank in range(self.count):
            if rank not in self.ends:
                os.kill(self.pids[rank], signal.SIGKILL)
                os.waitpid(self.pids[rank], 0)


def launched(command: list[str], out: Path, victim: int, delay_s: float) -> dict[str, Any]:
    """A run by the launcher, of which one process is killed some time after the first step.

    Args:
        command: number of processes, and what each does.
        out: run folder.
        victim: the process that is killed.
        delay_s: seconds after the first step.
    """
    start = [sys.executable, "-m", "tutelage.commands.launch", *command]
    names = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    errors = out.with_name(f"{out.name}.err")
    with errors.open("wb") as err:
        launcher = subprocess.Popen(
            start, env=os.environ | names, stdout=subprocess.DEVNULL, stderr=err
        )
    pids: list[int] = []
    seconds = -1.0
    try:
        end = time.monotonic() + HANG_S
        while launcher.poll() is None and not (out / "metrics.jsonl").exists():
            if time.monotonic() > end:
                raise RuntimeError(f"no step within {HANG_S:g} s")
            time.sleep(0.02)
        time.sleep(delay_s)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
        pids = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        if was_in_time := launcher.poll() is None and len(pids) == int(command[0]):
            sent = time.monotonic()
            os.kill(pids[victim], signal.SIGKILL)
        launcher.wait(HANG_S)
        if was_in_time:
            seconds = time.monotonic() - sent
    finally:
        launcher.terminate()  # not killed: it would leave its processes behind
        launcher.wait()
    left = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    said = errors.read_text(errors="replace").splitlines()
    return {"code": launcher.returncode, "said": said, "seconds": seconds, "left": left}


def watch(event: Callable[[str, list[int]], None], pids: list[int]) -> None:
    """Call `event` as each phase begins in this process."""

    def wrap(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            event(name, pids)
            return plain(*args, **options)

        return call

    for name, (owner, attribute) in PHASES.items():
        setattr(owner, attribute, wrap(name, getattr(owner, attribute)))


def signal_in(
    phase: str, turn: int, victim: int, number: int, delay_s: float, note: Path
) -> Callable[[str, list[int]], None]:
    """Send a process a signal some time after a phase has begun for the `turn`-th time."""
    seen = [0]

    def send(pid: int) -> None:
        note.write_text(str(time.time()))
        os.kill(pid, number)

    def event(name: str, pids: list[int]) -> None:
        if name != phase:
            return
        seen[0] += 1
        if seen[0] == turn and delay_s:
            threading.Timer(delay_s, send, [pids[victim]]).start()
        elif seen[0] == turn:
            send(pids[victim])

    return event


def portrait(out: Path) -> dict[str, Any]:
    """All that has to be equal: logged numbers but times, tensors, names of files."""

    def lines(path: Path) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        return [{k: v for k, v in record.items() if k not in MEASURED} for record in records]

    return {
        "logs": {path.name: lines(path) for path in sorted(out.glob("*.jsonl"))},
        "tensors": {
            str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(out.rglob("*.safetensors"))
        },
        "files": sorted(str(path.relative_to(out)) for path in out.rglob("*")),
    }


def files_of(out: Path) -> dict[str, str]:
    """Contents of a run folder, without its lock and what a start would remove."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "lock" and ".tmp" not in str(path)
    }


class Trials:
    """Trials against one unbroken run of each variant."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "run.toml"
        self.config.write_text(as_toml(tiny_table(folder, folder / "unused", **_CHANGES)))
        self._expected: dict[int, dict[str, Any]] = {}

    def expected(self, variant: int) -> dict[str, Any]:
        """What the unbroken run of a variant leaves."""
        if variant not in self._expected:
            out = self.folder / f"unbroken-{variant}"
            if problems := self.again(out, *VARIANTS[variant], None):
                raise RuntimeError(f"the unbroken run failed: {problems}")
            self._expected[variant] = portrait(out)
        return self._expected[variant]

    def again(
        self, out: Path, count: int, overrides: dict[str, Any], expected: dict[str, Any] | None
    ) -> list[str]:
        """Start or continue a run, and what is wrong with its end."""
        group = Group(self.config, out, count, overrides)
        everyone = list(range(count))
        is_over = group.wait(everyone, HANG_S)
        group.close()
        if not is_over or any(group.ends[rank][0] for rank in everyone):
            lines = [group.errors(rank)[-3:] for rank in everyone]
            return [f"the same command ended with {group.ends}: {lines}"]
        found = portrait(out)
        return [part for part in expected or () if found[part] != expected[part]]  # type: ignore[index]

    def one(self, number: int) -> progress.Result:
        """Signal, look, continue, compare: every fourth process is stopped, the others killed."""
        if number % 5 == 4:
            return self.one_launched(number)
        rng = random.Random(number)
        names = list(PHASES)
        variant = number % len(VARIANTS)
        count, overrides = VARIANTS[variant]
        is_stop = number % 4 == 3
        phase, victim = names[number % len(names)], rng.randrange(count)
        turn = rng.randint(1, 2) if phase not in _ONCE else 1
        delay_s = rng.choice([0.0, rng.uniform(0.001, 0.05)])
        out, note = self.folder / f"run-{number}", self.folder / f"run-{number}.time"
        kind = signal.SIGSTOP if is_stop else signal.SIGKILL
        event = signal_in(phase, turn, victim, kind, delay_s, note)
        group = Group(self.config, out, count, overrides, event)
        others = [rank for rank in range(count) if rank != victim]
        limit_s = KILL_LIMIT_S + TIMEOUT_S * is_stop
        problems, seconds, was_in_time = [], -1.0, False
        if not group.wait(others, HANG_S):
            problems.append("the others do not end")
        elif not any(group.ends[rank][0] for rank in others):  # the signal came after the end
            expected = self.expected(variant)
            unlike = [part for part, found in portrait(out).items() if found != expected[part]]
            problems += [f"all others ended with 0 before this was written: {unlike}"] * any(unlike)
        elif was_in_time := note.exists():
            seconds = max(group.ends[rank][1] for rank in others) - float(note.read_text())
            problems += self._ended(group, others, seconds, limit_s)
        if is_stop and was_in_time and not problems:
            problems += self._continued(group, victim, out)
        group.close()
        problems += self.again(out, count, overrides, self.expected(variant))
        if not problems:
            shutil.rmtree(out)
        return {
            "processes": count, "sharding": overrides.get("student.sharding", "none"),
            "phase": phase, "victim": victim, "signal": kind.name, "was_in_time": was_in_time,
            "seconds": round(seconds, 2), "problems": problems,
        }  # fmt: skip

    def one_launched(self, number: int) -> progress.Result:
        """Kill a process of a run that the launcher started, look, continue, compare."""
        rng = random.Random(number)
        variant = number % len(VARIANTS)
        count, overrides = VARIANTS[variant]
        out, victim = self.folder / f"run-{number}", rng.randrange(count)
        command = [str(count), "train", str(self.config), f"out={out}"]
        command += [f"{key}={value}" for key, value in overrides.items()]
        found = launched(command, out, victim, rng.uniform(0, 0.5))
        seconds, said, problems = found["seconds"], found["said"], []
        if seconds >= 0:
            is_one = len(said) == 1 and said[0].startswith(f"tutelage: process {victim} ")
            if found["code"] != 2 or not is_one or "same command" not in said[0]:
                problems.append(f"the launcher ended with {found['code']} and said {said[:5]}")
            if seconds > KILL_LIMIT_S:
                problems.append(f"the last ended after {seconds:.1f} s")
            problems += [f"processes {found['left']} are left"] * bool(found["left"])
        problems += self.again(out, count, overrides, self.expected(variant))
        if not problems:
            shutil.rmtree(out)
        return {
            "processes": count, "sharding": overrides.get("student.sharding", "none"),
            "phase": "by the launcher", "victim": victim, "signal": "SIGKILL",
            "was_in_time": seconds >= 0, "seconds": round(seconds, 2), "problems": problems,
        }  # fmt: skip

    def _ended(self, group: Group, others: list[int], seconds: float, limit_s: float) -> list[str]:
        problems = [f"the last ended after {seconds:.1f} s"] if seconds > limit_s else []
        for rank in others:
            code, said = group.ends[rank][0], group.errors(rank)
            is_one = len(said) == 1 and said[0].startswith("tutelage: process ")
            if code != 2 or not is_one or "same command" not in said[0]:
                problems.append(f"process {rank} ended with {code} and said {said[:5]}")
        return problems

    def _continued(self, group: Group, victim: int, out: Path) -> list[str]:
        """What a stopped process does that goes on after the others have ended."""
        before = files_of(out) if out.exists() else {}
        os.kill(group.pids[victim], signal.SIGCONT)
        if not group.wait([victim], HANG_S):
            return ["the stopped process does not end when it is continued"]
        code, said = group.ends[victim][0], group.errors(victim)
        problems = [] if code == 2 and len(said) == 1 else [f"continued: {code}, {said[:5]}"]
        after = files_of(out) if out.exists() else {}
        return problems + ["the stopped process changed files"] * (after != before)

    def unwatched(self) -> int:
        """Negative control: 1 if a stop is not noticed where no process watches."""
        out, note = self.folder / "control", self.folder / "control.time"
        count, overrides = VARIANTS[0]
        event = signal_in("rollout", 1, 1, signal.SIGSTOP, 0.0, note)

        def blind() -> None:
            peers.address_of = lambda _: None

        group = Group(self.config, out, count, overrides, event, blind)
        end = time.monotonic() + HANG_S
        while not note.exists() and time.monotonic() < end:
            time.sleep(0.1)
        is_over = group.wait([0], TIMEOUT_S + KILL_LIMIT_S)
        group.close()
        return int(note.exists() and not is_over)


def as_toml(table: dict[str, Any]) -> str:
    """A table of plain values and of tables of those."""
    plain = [f"{k} = {json.dumps(v)}" for k, v in table.items() if not isinstance(v, dict)]
    for name, values in table.items():
        if isinstance(values, dict):
            plain += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in values.items())]
    return "\n".join(plain) + "\n"


def run(size: int) -> Outcome:
    """`size` runs, of each of which one process was killed or stopped."""
    with forked.models() as folder:
        trials = Trials(folder)
        results = progress.trials("peers", size, trials.one, least=40)
        control = trials.unwatched()
    return outcome_of(results, control)


def outcome_of(results: list[progress.Result], control: int) -> Outcome:
    """What the trials come to."""
    met = [result for result in results if result["was_in_time"]]
    slowest = {
        kind: max((r["seconds"] for r in met if r["signal"] == kind), default=None)
        for kind in ("SIGKILL", "SIGSTOP")
    }
    return Outcome(
        "one process of a run that is killed or stopped ends all others in one line each, within "
        f"{KILL_LIMIT_S:g} s or process_timeout_s ({TIMEOUT_S} s) and as much, and the same "
        "command continues to the end of the unbroken run, bit for bit",
        trials=len(met),
        failures=sum(bool(result["problems"]) for result in results),
        control={"a stop is not noticed by processes that do not watch": control},
        details={
            "phases": forked.tally([result["phase"] for result in met]),
            "signals": forked.tally([result["signal"] for result in met]),
            "processes": forked.tally([str(result["processes"]) for result in met]),
            "sharding": forked.tally([result["sharding"] for result in met]),
            "process 0": sum(result["victim"] == 0 for result in met),
            "slowest_end_s": slowest,
            "problems": [result for result in results if result["problems"]][:10],
        },
    )
