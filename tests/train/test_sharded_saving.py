"""Checkpoints of sharded students: as those of whole ones, from and for any number of processes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from saved_runs import are_same, contents, cut, distance, job, run_jobs
from tiny import save_tiny_model
from tutelage.config.parse import parse_config
from tutelage.files.checksums import unseal
from tutelage.train import sharded_checkpoint
from tutelage.train.checkpoint import checkpoint_path, list_checkpoints
from tutelage.train.loop import train

SMALL = 20_000
"""Limit of a file's bytes at which the tiny model takes several."""
NEAR = 1e-5


@dataclass(frozen=True)
class Runs:
    """Folders of runs, and what each ended with in either process."""

    folder: Path
    ended: list[dict[str, str]]
    told: str
    """What the first process told of the death of the second."""


def alone(described: dict[str, Any]) -> None:
    """Do a job in this process."""
    config = parse_config(described["table"])
    if described["source"]:
        cut(*described["source"], Path(config.out))
    train(config, log=lambda _: None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every run of two processes that tests below look at, from one start."""
    root = tmp_path_factory.mktemp("saved")
    save_tiny_model(root / "student", 0, is_tied=True)
    save_tiny_model(root / "teacher", 1)
    at_two, of_one = {"source": (root / "unbroken", 2)}, {"source": (root / "one", 2)}
    alone(job(root, root / "one", "none"))
    jobs = [
        job(root, root / "unbroken"),
        job(root, root / "same", fault="counted", **at_two),
        job(root, Path("elsewhere"), fault="elsewhere"),
        job(root, root / "from one", **of_one),
        job(root, root / "one again", saves_again=True, **of_one),
        job(root, root / "small", file_bytes=SMALL, **at_two),
        job(root, root / "full", file_bytes=SMALL, fault="full", **at_two),
        job(root, root / "not finite", fault="not finite", **at_two),
        job(root, root / "main full", "none", fault="main full", **at_two),
        job(root, root / "killed", file_bytes=SMALL, fault="killed", **at_two),
    ]
    processes, ended = run_jobs(root / "two", jobs, 2)
    first, second = processes
    assert (first.code in (0, 2), second.code) == (True, -9), [p.said for p in processes]
    return Runs(root, ended, ended[0].get("killed", first.said))


def test_a_sharded_run_continues_bit_for_bit(runs: Runs) -> None:
    assert are_same(runs.folder / "same", runs.folder / "unbroken")
    found, expected = (runs.folder / n / "student/model.safetensors" for n in ("same", "unbroken"))
    assert found.read_bytes() == expected.read_bytes()


def test_a_run_of_one_process_continues_in_shards(runs: Runs) -> None:
    assert 0 < distance(runs.folder / "from one", runs.folder / "one") < NEAR


def test_a_sharded_run_continues_on_one_process(runs: Runs, tmp_path: Path) -> None:
    alone(job(runs.folder, tmp_path / "run", source=(runs.folder / "unbroken", 2)))
    assert 0 < distance(tmp_path / "run", runs.folder / "one") < NEAR


def test_a_checkpoint_is_the_same_bytes_whoever_writes_it(runs: Runs) -> None:
    pair = ("one again", "one")
    found, expected = (contents(checkpoint_path(runs.folder / name, 2)) for name in pair)
    assert found == expected


def test_each_process_writes_files_of_a_large_student(runs: Runs) -> None:
    path = checkpoint_path(runs.folder / "small", 4)
    files = sorted(path.rglob("*.safetensors"))
    assert [file.name for file in files if file.parent.name == "model"] == [
        f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)
    ]
    assert sum(file.name.startswith("optimizer-") for file in files) > 3
    assert not (path / "optimizer.safetensors").exists()
    assert unseal(path) == {"step": 4}
    assert are_same(runs.folder / "small", runs.folder / "same")


def test_transformers_loads_several_files(runs: Runs) -> None:
    whole = AutoModelForCausalLM.from_pretrained(runs.folder / "same/student")
    for folder in (
        runs.folder / "small/student",
        checkpoint_path(runs.folder / "small", 4) / "model",
    ):
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in whole.parameters())
        assert set(index["weight_map"].values()) == {p.name for p in folder.glob("model-*")}
        model = AutoModelForCausalLM.from_pretrained(folder)
        both = zip(model.parameters(), whole.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in both)


def test_a_process_reads_its_own_rows_of_moments(runs: Runs) -> None:
    saved = load_file(checkpoint_path(runs.folder / "same", 2) / "optimizer.safetensors")
    total = sum(tensor.numel() for tensor in saved.values())
    for ended in runs.ended:
        assert 0.45 * total < int(ended["same"]) < 0.55 * total


def test_a_folder_that_a_process_does_not_share_is_named(runs: Runs) -> None:
    first, second = (ended["elsewhere"] for ended in runs.ended)
    assert first == second
    assert first.startswith("run folder elsewhere of process 0 on ")
    assert " is not there for process 1 on " in first


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("full", "checkpoint-000004 cannot be written: [Errno 28] No space left on device."),
        ("not finite", "model.embed_tokens.weight holds numbers that are not finite after step 4"),
        ("main full", "checkpoint-000004 cannot be written: [Errno 28] No space left on device."),
    ],
)
def test_an_error_in_one_process_is_one_line_in_all(runs: Runs, name: str, reason: str) -> None:
    first, second = (ended[name] for ended in runs.ended)
    assert first == second
    assert reason in first
    assert len(first.splitlines()) == 1
    assert list_checkpoints(runs.folder / name) == [(2, checkpoint_path(runs.folder / name, 2))]
    assert unseal(checkpoint_path(runs.folder / name, 2)) == {"step": 2}
    assert not list((runs.folder / name).glob(".*.tmp"))


def test_a_process_killed_while_it_saves_leaves_the_checkpoint_before(runs: Runs) -> None:
    out = runs.folder / "killed"
    assert "process 1 (pid " in runs.told
    assert "The same command continues from checkpoint-000002." in runs.told
    assert list_checkpoints(out) == [(2, checkpoint_path(out, 2))]
    assert contents(checkpoint_path(out, 2)) == contents(checkpoint_path(runs.folder / "same", 2))
    train(parse_config(job(runs.folder, out)["table"]), log=lambda _: None)
    assert distance(out, runs.folder / "one") < NEAR
    assert not list(out.glob(".*.tmp"))


class OnDevice:
    """A number that lies on a device, such as AdamW's count of steps."""

    dtype = torch.float32

    def dim(self) -> int:
        return 0

    def cpu(self) -> torch.Tensor:
        return torch.tensor(3.0)


def test_numbers_that_processes_send_each_other_come_from_main_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    named = {"trained_names": lambda _: ["w"], "own_state": lambda *_: {"w|step": OnDevice()}}
    for name, value in named.items():
        monkeypatch.setattr(sharded_checkpoint, name, value)
    components: Any = SimpleNamespace(student=None, masters=SimpleNamespace(weights=[weight]))
    one: Any = SimpleNamespace(num_processes=1, is_main_process=True, process_index=0)
    parts = sharded_checkpoint._state_parts(one, components, torch.optim.SGD([weight]))
    assert parts["w|step"].own == 3
