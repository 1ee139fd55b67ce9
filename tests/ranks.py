"""Several ranks of one run on this machine: how tests start them, and how a rank leaves."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

# Imported before there is a group: functions of these modules have the group of that time as the
# default of an argument, which would hold it for ever.
from torch.distributed.fsdp import fully_shard  # noqa: F401
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from tutelage.commands.launch import rendezvous

HERE = Path(__file__).parent
GLOO_THREADS = ("pt_gloo_runloop", "gloo_tcp_loop")


@dataclass(frozen=True)
class Ended:
    """How a rank ended."""

    code: int
    """Exit code, or minus the signal."""
    said: str
    """Standard output and standard error."""


@contextmanager
def started(
    command: Sequence[str], count: int, logs: Path, environment: Mapping[str, str] | None = None
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes of `count` ranks, none of which outlives the block; they write to `logs`.

    Args:
        command: of each rank.
        count: of ranks.
        logs: a folder that receives `rank0.log` and so on.
        environment: more variables.
    """
    with ExitStack() as stack:
        common = os.environ | stack.enter_context(rendezvous()) | dict(environment or {})
        common |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        processes = []
        for rank in range(count):
            log = stack.enter_context((logs / f"rank{rank}.log").open("wb"))
            names = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=common | names
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        yield processes


def run_ranks(
    command: Sequence[str],
    count: int,
    environment: Mapping[str, str] | None = None,
    limit_s: float = 3600,
) -> list[Ended]:
    """Run `count` ranks to their ends.

    Args:
        command: of each rank.
        count: of ranks.
        environment: more variables.
        limit_s: seconds after which ranks that wait for each other are given up.
    """
    with (
        tempfile.TemporaryDirectory() as name,
        started(command, count, Path(name), environment) as ps,
    ):
        codes = [process.wait(limit_s) for process in ps]
        logs = [Path(name, f"rank{rank}.log").read_text() for rank in range(count)]
    return [Ended(code, said) for code, said in zip(codes, logs, strict=True)]


def run_script(path: Path, arguments: Sequence[object], count: int) -> None:
    """Run a script of the tests in `count` ranks that have to succeed."""
    paths = {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    ended = run_ranks([sys.executable, str(path), *map(str, arguments)], count, paths)
    assert [rank.code for rank in ended] == [0] * count, "\n".join(rank.said for rank in ended)


@contextmanager
def process_group() -> Iterator[int]:
    """Be a rank: gives its number, and leaves no thread of the group behind.

    A module in DDP or FSDP2 holds the group it was wrapped with, in cycles and in a cache of
    DTensor. A group that is still held when it is destroyed keeps its threads, and one that wakes
    up while the interpreter ends aborts the process. Whatever was wrapped has to be out of reach
    when the block ends.
    """
    torch.distributed.init_process_group("gloo")
    try:
        yield torch.distributed.get_rank()
    finally:
        leave_group()


def leave_group() -> None:
    """Destroy the process group.

    Raises:
        RuntimeError: something still holds it.
    """
    _clear_sharding_prop_cache()
    gc.collect()
    torch.distributed.destroy_process_group()
    if left := gloo_threads():
        raise RuntimeError(f"the process group is still held: {left} threads of gloo are left")


def gloo_threads() -> int:
    """Threads of gloo in this process."""
    names = (
        task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()
    )
    return sum(name in GLOO_THREADS for name in names)
