"""Tiny runs on one process and on several that are saved, broken off and continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from ranks import HERE, Ended, run_script_ranks
from tiny import tiny_table
from tutelage.config.schema import Config
from tutelage.setup.components import build_components
from tutelage.train import sharded_checkpoint
from tutelage.train.checkpoint import (
    checkpoint_path,
    list_checkpoints,
    load_optimizer,
    save_checkpoint,
)
from tutelage.train.optimizer import build_optimizer


def job(models: Path, out: Path, sharding: str = "fsdp2", **changes: Any) -> dict[str, Any]:
    """A run of four steps with checkpoints after the second and the fourth.

    Args:
        models: folder with `student` and `teacher`.
        out: the run's folder.
        sharding: of the student.
        changes: `source`, a run and a step to continue from; `saves_again`, which takes no step but
            writes that checkpoint anew; `file_bytes`; `fault`; anything else is configuration.
    """
    extra = {"source": None, "saves_again": False, "file_bytes": 5 * 10**9, "fault": ""}
    extra |= {key: changes.pop(key) for key in list(changes) if key in extra}
    start = {"model": str(models / "student"), "sharding": sharding}
    changes["student"] = start | changes.get("student", {})
    source = extra["source"]
    extra["source"] = source and [str(source[0]), source[1]]
    return {"name": out.name, "table": tiny_table(models, out, **changes)} | extra


def run_jobs(folder: Path, jobs: list[dict[str, Any]], count: int) -> tuple[list[Ended], list[Any]]:
    """Do jobs on several processes; how these ended, and what each job ended with in each."""
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    ended = run_script_ranks(HERE / "train" / "saving_rank.py", [folder], count)
    places = [folder / f"ended{index}.json" for index in range(count)]
    return ended, [json.loads(p.read_text()) if p.exists() else {} for p in places]


def cut(run: str | Path, step: int, out: Path) -> None:
    """Copy a run as it would be if it had been killed after the checkpoint of a step."""
    shutil.copytree(run, out)
    for number, path in list_checkpoints(out):
        if number > step:
            shutil.rmtree(path)
    shutil.rmtree(out / "student", ignore_errors=True)


def saved_again(config: Config, accelerator: Accelerator) -> None:
    """Load the newest checkpoint of a run as a start does, and write it anew in its place."""
    out = Path(config.out)
    step, path = list_checkpoints(out)[-1]
    components = build_components(config, str(path / "model"), out)
    student, masters = components.student, components.masters
    optimizer = build_optimizer(config.optimizer, student, masters, out)
    load_optimizer(path, components, optimizer)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(path)
    if student.is_sharded:
        arguments = (accelerator, out, step, components, optimizer, 9)
        sharded_checkpoint.save_sharded_checkpoint(*arguments)
    elif accelerator.is_main_process:
        save_checkpoint(out, step, components, optimizer, 9)
    accelerator.wait_for_everyone()


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file, by path in the folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def tensors(run: Path, step: int = 4) -> dict[str, Tensor]:
    """Weights, moments and masters of a checkpoint, whichever files they lie in."""
    found: dict[str, Tensor] = {}
    for path in checkpoint_path(run, step).rglob("*.safetensors"):
        found |= load_file(path)
    return found


def distance(run: Path, other: Path) -> float:
    """Largest difference between the numbers of two runs' last checkpoints."""
    a, b = tensors(run), tensors(other)
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and a[name].shape == b[name].shape for name in a)
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def are_same(run: Path, other: Path) -> bool:
    """Whether they are equal, bit for bit."""
    a, b = tensors(run), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
