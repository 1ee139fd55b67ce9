"""Several ranks of one run on this machine: how tests start them, and how a rank leaves."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

# Imported before there is a group: functions of these modules have the group of that time as the
# default of an argument, which would hold it for ever.
from torch.distributed.fsdp import fully_shard  # noqa: F401
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from tutelage.commands.launch import rendezvous

HERE = Path(__file__).parent
IMPORTED = "ranks_imported"
"""The module of what ranks import."""
GLOO_THREADS = ("pt_gloo_runloop", "gloo_tcp_loop")


@dataclass(frozen=True)
class Ended:
    """How a rank ended."""

    code: int
    """Exit code, or minus the signal."""
    said: str
    """Standard output and standard error."""


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


@contextmanager
def _common(count: int) -> Iterator[dict[str, str]]:
    """The environment of all ranks."""
    with rendezvous() as place:
        common = os.environ | place | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        yield common | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}


def _names(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


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
        common = stack.enter_context(_common(count)) | dict(environment or {})
        processes = []
        for rank in range(count):
            log = stack.enter_context(_log(logs, rank).open("wb"))
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=common | _names(rank)
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
        logs = [_log(Path(name), rank).read_text() for rank in range(count)]
    return [Ended(code, said) for code, said in zip(codes, logs, strict=True)]


def run_script(path: Path, arguments: Sequence[object], count: int) -> None:
    """Run a script of the tests in `count` ranks that have to succeed."""
    ended = run_script_ranks(path, arguments, count)
    assert [rank.code for rank in ended] == [0] * count, "\n".join(rank.said for rank in ended)


def run_script_ranks(
    path: Path, arguments: Sequence[object], count: int, limit_s: float = 3600
) -> list[Ended]:
    """Run a script of the tests in `count` ranks to their ends.

    Ranks are forks of one process that has imported what takes seconds, and run nothing else.

    Args:
        path: of the script.
        arguments: the script's.
        count: of ranks.
        limit_s: seconds after which ranks that wait for each other are given up.

    Raises:
        TimeoutError: they were given up.
    """
    with _common(count) as common:
        environments = [common | _names(rank) for rank in range(count)]
        return _run_forks(path, arguments, environments, limit_s)


def run_script_alone(path: Path, arguments: Sequence[object] = ()) -> Ended:
    """Run a script of one process, as `run_script_ranks` does those of several, to its end."""
    return _run_forks(path, arguments, [dict(os.environ)], 3600)[0]


def _run_forks(
    path: Path,
    arguments: Sequence[object],
    environments: Sequence[dict[str, str]],
    limit_s: float,
) -> list[Ended]:
    server = _fork_server()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        argv, paths = [str(path), *map(str, arguments)], [str(path.parent), str(HERE), *sys.path]
        processes = []
        for rank, environment in enumerate(environments):
            arguments_of = (argv, paths, environment, _log(Path(name), rank))
            process = server.Process(target=_be_rank, args=arguments_of)
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            process.join(limit_s)
        logs = [_log(Path(name), rank).read_text() for rank in range(len(processes))]
        codes = [process.exitcode for process in processes]
    if None in codes:
        raise TimeoutError(f"ranks ended with {codes}:\n" + "\n".join(logs))
    return [Ended(int(code or 0), said) for code, said in zip(codes, logs, strict=True)]


def _fork_server() -> multiprocessing.context.ForkServerContext:
    """What forks ranks; it runs and has imported what they need."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([IMPORTED])
    # Python 3.11 gives the server no sys.path, and a module that is not found is no error there.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(HERE), *sys.path])):
        multiprocessing.forkserver.ensure_running()
    return server


def _be_rank(argv: list[str], paths: list[str], environment: dict[str, str], log: Path) -> None:
    """Run a script as `python argv[0] …` would, with its output in a file."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if IMPORTED not in sys.modules:
        raise RuntimeError(f"the server that forks ranks could not import {IMPORTED}")
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[:] = argv, paths
    runpy.run_path(argv[0], run_name="__main__")
    if gloo_threads():  # see `leave_group`; the interpreter is not to end beside them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@contextmanager
def process_group() -> Iterator[int]:
    """Be a rank: gives its number, and leaves no thread of the group behind.

    A module in DDP or FSDP2 holds the group it was wrapped with, in cycles and in a cache of
    DTensor. A group that is still held when it is destroyed keeps its threads, and one that wakes
    up while the interpreter ends aborts the process. Whatever was wrapped has to be out of reach
    when the block ends.
    """
    # As a run does, see setup/numerics.py: in some versions of torch they hold the group, too.
    import torch.distributed.nn
    import torch.distributed.optim

    torch.distributed.init_process_group("gloo")
    try:
        yield torch.distributed.get_rank()
    finally:
        leave_group()


def leave_group() -> None:
    """Destroy the process group.

    Builds of torch with CUDA keep its threads after two runs, though nothing in Python holds it
    (seen with 2.15).

    Raises:
        RuntimeError: something still holds it.
    """
    _clear_sharding_prop_cache()
    gc.collect()
    torch.distributed.destroy_process_group()
    if (left := gloo_threads()) and torch.version.cuda is None:
        raise RuntimeError(f"the process group is still held: {left} threads of gloo are left")


def gloo_threads() -> int:
    """Threads of gloo in this process."""
    names = (
        task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()
    )
    return sum(name in GLOO_THREADS for name in names)
