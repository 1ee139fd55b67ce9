"""Moments of the optimizer on disk, and memory that goes back to the system."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.adamw import adamw

from tiny import tiny_config
from tutelage.errors import ConfigError, RunError
from tutelage.memory.cpu import status_bytes
from tutelage.models.device import give_back
from tutelage.models.offload import MappedFile
from tutelage.models.optimizer import DiskAdamW, make_optimizer
from tutelage.setup.components import build_components
from tutelage.train.loop import train


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder on a disk: what is resident of a file in memory is another matter."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def resident_bytes(folder: Path) -> int:
    """Memory that this process has of files that were in a folder and have no name."""
    total, is_there = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split(" ")[0].endswith(":"):
            is_there = str(folder) in line and "deleted" in line
        elif is_there and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def two_updates(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    for step in range(2):
        for weight in weights[step:]:  # one weight has a gradient only once
            weight.grad = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        optimizer.step()
        optimizer.zero_grad()


def some_weights() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1000, 33), (5,), (7, 4096), (1, 1)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


@pytest.mark.parametrize("piece", [1024, 1 << 22])
def test_moments_on_disk_are_those_in_memory(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tutelage.models.optimizer._PIECE", piece)
    kinds: dict[Any, list[torch.nn.Parameter]] = {
        "adamw": some_weights(),
        "adamw_on_disk": some_weights(),
    }
    made = {}
    for kind, weights in kinds.items():
        made[kind] = make_optimizer(kind, weights, 1e-2, (0.9, 0.95), 0.1, tmp_path)
        two_updates(made[kind], weights)
    for plain, mapped in zip(*kinds.values(), strict=True):
        assert torch.equal(plain, mapped)
        left, right = made["adamw"].state[plain], made["adamw_on_disk"].state[mapped]
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    other = some_weights()
    two_updates(make_optimizer("adamw", other, 1e-2, (0.9, 0.95), 0.0, tmp_path), other)
    assert not torch.equal(other[0], kinds["adamw"][0])  # the comparison sees another decay
    assert list(tmp_path.iterdir()) == []  # a crash leaves nothing behind


def test_only_a_piece_of_the_moments_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tutelage.models.optimizer._PIECE", 1024)
    weights = some_weights()
    optimizer = DiskAdamW(weights, tmp_path, lr=1e-2)
    during: list[int] = []

    def watched(*arguments: Any, **options: Any) -> None:
        adamw(*arguments, **options)
        during.append(resident_bytes(tmp_path))

    monkeypatch.setattr("tutelage.models.optimizer.adamw", watched)
    two_updates(optimizer, weights)
    assert max(during) < sum(weight.nbytes for weight in weights)  # half of all moments
    assert resident_bytes(tmp_path) == 0
    total = sum(float(state["exp_avg"].abs().sum()) for state in optimizer.state.values())
    assert total > 0
    assert resident_bytes(tmp_path) > 50 * 4096  # whoever looks at them takes memory
    optimizer.release()
    assert resident_bytes(tmp_path) == 0
    assert total == sum(float(s["exp_avg"].abs().sum()) for s in optimizer.state.values())
    optimizer.load_state_dict(optimizer.state_dict())
    assert resident_bytes(tmp_path) == 0
    assert total == sum(float(s["exp_avg"].abs().sum()) for s in optimizer.state.values())


def test_a_checkpoint_gives_the_moments_memory_back(tmp_path: Path, tiny_models: Path) -> None:
    out = tmp_path / "run"
    seen: list[int] = []
    models = {who: {"model": str(tiny_models / who)} for who in ("student", "teacher")}
    optimizer = {"kind": "adamw_on_disk"}
    config = tiny_config(tiny_models, out, **models, optimizer=optimizer, checkpoint_every=1)
    train(config, log=lambda _: None, on_step=lambda _: seen.append(resident_bytes(tmp_path)))
    assert len(seen) > 2
    assert set(seen) == {0}


def test_moments_go_from_memory_to_disk_and_back(tmp_path: Path) -> None:
    weights = some_weights()
    plain = make_optimizer("adamw", weights, 1e-2, (0.9, 0.95), 0.1)
    two_updates(plain, weights)
    mapped = DiskAdamW(weights, tmp_path, lr=1e-2)
    mapped.load_state_dict(plain.state_dict())
    assert resident_bytes(tmp_path) == 0
    for weight in weights:
        for name, value in plain.state[weight].items():
            assert torch.equal(mapped.state[weight][name], value)
    assert resident_bytes(tmp_path) > 0  # they were read from the file


def test_weights_elsewhere_and_a_full_disk_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = [torch.nn.Parameter(torch.empty(3, device="meta"))]
    with pytest.raises(ConfigError, match=r"got some on meta\. Set optimizer.offload = true"):
        DiskAdamW(elsewhere, tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(RunError, match=r"moments do not fit.*No space left.*Free some space"):
        DiskAdamW(some_weights(), tmp_path)


def test_numbers_stay_in_a_file_whose_pages_were_released(tmp_path: Path) -> None:
    file = MappedFile(1 << 20, tmp_path)
    numbers = file.tensor(0, 1 << 18, torch.float32)
    numbers.copy_(torch.arange(1 << 18))
    assert resident_bytes(tmp_path) == 1 << 20
    file.release(4096, 8192)
    assert resident_bytes(tmp_path) == (1 << 20) - 8192
    assert torch.equal(numbers, torch.arange(1 << 18, dtype=torch.float32))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_freed_memory_goes_back_to_the_system() -> None:
    blocks = [torch.ones(1 << 14) for _ in range(1000)]  # 64 KiB each
    pin = torch.ones(1 << 14)  # lies above them, so the heap cannot shrink by itself
    del blocks[::2]
    before = status_bytes("VmRSS")
    give_back()
    assert before - status_bytes("VmRSS") > 16 << 20
    assert float(pin.sum()) == 1 << 14


def test_a_cpu_offloads_to_the_teachers_own_files(tmp_path: Path, tiny_models: Path) -> None:
    def mode(**changes: Any) -> str:
        teacher = {"model": str(tiny_models / "teacher"), "mode": "offload"} | changes
        return build_components(tiny_config(tiny_models, tmp_path, teacher=teacher)).teacher.mode

    assert mode() == "reload"
    assert mode(mode="resident") == "resident"
    if importlib.util.find_spec("bitsandbytes") is not None:
        assert mode(quantization="8bit") == "offload"  # it would be quantised in every step
