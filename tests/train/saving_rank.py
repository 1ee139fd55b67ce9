"""One process of several that take tiny runs through saves, faults and new starts, job after job.

Usage: saving_rank.py FOLDER; reads `jobs.json` there, see `saved_runs.job`, and writes what each
ended with to `ended0.json` and so on. The usual environment variables name process, world size and
master.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor

from ranks import process_group
from saved_runs import cut, saved_again
from tutelage.config.parse import parse_config
from tutelage.errors import TutelageError
from tutelage.train import agreement, checkpoint, loop, saving, sharded_checkpoint
from tutelage.train.loop import train


def disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def poisoned(accelerator: Accelerator, run: Path, step: int, components: Any, *rest: Any) -> Path:
    """The last of a student's shards gets a number that is not finite."""
    if accelerator.process_index == accelerator.num_processes - 1:
        components.masters.masters[0].data[-1] = torch.inf
    return sharded_checkpoint.save_sharded_checkpoint(accelerator, run, step, components, *rest)


def faulty(name: str, plain: Any) -> Any:
    """A function that writes a file, with a fault when it is the second of several."""

    def write(tensors: dict[str, Tensor], path: Path) -> None:
        if "-00002-of-" in path.name:
            {"full": disk_full, "killed": killed}[name]()
        plain(tensors, path)

    return write


class Counted:
    """An open file that adds up the numbers read from it."""

    total = 0

    def __init__(self, file: Path, framework: str) -> None:
        self._opened = safe_open(file, framework)

    def __enter__(self) -> Counted:
        self._tensors = self._opened.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def keys(self) -> list[str]:
        return list(self._tensors.keys())

    def get_tensor(self, key: str) -> Tensor:
        return self._counted(self._tensors.get_tensor(key))

    def get_slice(self, key: str) -> Any:
        part = self._tensors.get_slice(key)
        found = mock.MagicMock(get_shape=part.get_shape)
        found.__getitem__.side_effect = lambda place: self._counted(part[place])
        return found

    def _counted(self, tensor: Tensor) -> Tensor:
        Counted.total += tensor.numel()
        return tensor


def put_fault(stack: ExitStack, name: str) -> None:
    if name in ("full", "killed"):
        write = faulty(name, sharded_checkpoint.save_file)
        stack.enter_context(mock.patch.object(sharded_checkpoint, "save_file", write))
    if name == "not finite":
        stack.enter_context(mock.patch.object(saving, "save_sharded_checkpoint", poisoned))
    if name == "counted":
        stack.enter_context(mock.patch.object(checkpoint, "safe_open", Counted))
    if name == "elsewhere":
        stack.enter_context(mock.patch.object(agreement, "_PERIOD_S", 0))
    if name == "main full":
        stack.enter_context(mock.patch.object(checkpoint, "seal", disk_full))


def do(accelerator: Accelerator, job: dict[str, Any]) -> str:
    """Do a job; the text of the error it ended with, or nothing."""
    config = parse_config(job["table"])
    if job["fault"] == "elsewhere":  # a relative folder is another one for each process
        os.chdir(tempfile.mkdtemp())
    if job["source"] and accelerator.is_main_process:
        cut(*job["source"], Path(config.out))
    accelerator.wait_for_everyone()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(loop, "open_accelerator", return_value=accelerator))
        stack.enter_context(mock.patch.object(accelerator, "end_training"))
        limit = mock.patch.object(sharded_checkpoint, "FILE_BYTES", job["file_bytes"])
        stack.enter_context(limit)
        put_fault(stack, job["fault"])
        try:
            if job["saves_again"]:
                saved_again(config, accelerator)
            else:
                train(config, log=lambda _: None)
        except TutelageError as error:
            return str(error)
    return ""


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with process_group() as index:
        accelerator = Accelerator(cpu=True)
        ended = {}
        for job in json.loads((folder / "jobs.json").read_text()):
            ended[job["name"]] = do(accelerator, job)
            if job["fault"] == "counted":
                ended[job["name"]] = str(Counted.total)
            (folder / f"ended{index}.json").write_text(json.dumps(ended))
            if job["fault"] == "killed":
                os._exit(0)  # without its peer no process leaves a group in an orderly way


if __name__ == "__main__":
    main(Path(sys.argv[1]))
