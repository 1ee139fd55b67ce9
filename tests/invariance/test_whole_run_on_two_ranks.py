"""`tutelage train` in two processes: one folder, one voice, the losses of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_ranks import free_port

ROOT = Path(__file__).parents[2]


def start(world: int, rank: int, port: int, out: Path) -> subprocess.Popen[str]:
    overrides = ["num_steps=3", "prompts_per_step=4", "micro_batch_size=3", "checkpoint_every=2"]
    overrides += ["selection.rule=soft_or", "evaluation.num_problems=2", "evaluation.num_samples=1"]
    overrides += ["evaluation.teacher=false", f"out={out}", "device=cpu"]
    ranks = {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [sys.executable, "-m", "tutelage", "train", str(ROOT / "configs/ledger.toml"), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | ranks | here | {"OMP_NUM_THREADS": "1"},
    )


def test_two_processes_write_one_run(tmp_path: Path) -> None:
    losses, voices = {}, {}
    for world in (1, 2):
        out, port = tmp_path / str(world), free_port()
        processes = [start(world, rank, port, out) for rank in range(world)]
        voices[world] = [process.communicate(timeout=180)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * world, voices[world]
        steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [step["step"] for step in steps] == [1, 2, 3]
        losses[world] = [step["loss"] for step in steps]
        assert (out / "student" / "model.safetensors").exists()
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
    assert "student exported" in voices[2][0]
    assert "student exported" not in voices[2][1]
