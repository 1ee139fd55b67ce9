"""Several processes that share a student's weights, or keep them whole, learn as one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import sharded_rank
from accelerate import Accelerator
from safetensors.torch import load_file
from sharded_rank import CASES, GRADIENTS, HALF, gradients
from stepping import distance
from torch import Tensor

from ranks import run_script
from tiny import save_tiny_model

SCRIPT = Path(sharded_rank.__file__)
KINDS = (
    "soft_or", "eopd_sampled", "lora_checkpointed", "tied", "packed", "pruned", "no_rows", HALF,
    "four_steps", "on_disk", "half_adapter",
)  # fmt: skip
"""Cases of which each has something that no other one has."""
EXACT = 1e-12
"""Largest relative difference of a gradient in float64."""
NEAR = 2e-5
"""Largest difference of a weight after four steps in float32."""
Seen: TypeAlias = tuple[list[dict[str, Any]], dict[str, Tensor]]
See: TypeAlias = Callable[[str], Seen]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("student", 1), ("teacher", 2), ("tied", 3)):
        save_tiny_model(folder / name, seed=seed, is_tied=name == "tied")
    return folder


@pytest.fixture(scope="session")
def one(models: Path) -> See:
    """What one process sees of a case."""
    known: dict[str, Seen] = {}

    def see(case: str) -> Seen:
        if case not in known:
            metrics, tensors = sharded_rank.taken(case, models, "none", Accelerator(cpu=True))
            known[case] = [metrics], tensors
        return known[case]

    return see


def seen(folder: Path, count: int, case: str) -> Seen:
    metrics = [json.loads((folder / f"{case}-{i}.json").read_text()) for i in range(count)]
    return metrics, load_file(folder / f"{case}.st")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, models: Path) -> See:
    """What two processes with parts of the weights see."""
    folder = tmp_path_factory.mktemp("two")
    run_script(SCRIPT, (models, folder, "fsdp2", *KINDS), 2)
    return lambda case: seen(folder, 2, case)


def check(case: str, found: Seen, expected: Seen, models: Path) -> None:
    """All processes report one thing, and it is what one process computes."""
    (metrics, tensors), ((alone,), reference) = found, expected
    assert set(tensors) == set(reference)
    pairs = [[t[name] for name in reference] for t in (tensors, reference)]
    for row in metrics:
        for key in ("loss", "grad_norm", "num_rows", "num_kept"):
            assert row[key] == metrics[0][key]
            rel = 1e-9 if case in GRADIENTS else 1e-4
            assert row[key] == pytest.approx(alone[key], rel=2e-2 if case == HALF else rel)
    if case == HALF:
        assert_within_spread(tensors, models)
    elif case in GRADIENTS:
        assert distance(*pairs) <= EXACT
    else:
        assert max(float((a - b).abs().max()) for a, b in zip(*pairs, strict=True)) <= NEAR
        assert all(row["drawn"] <= 2**-8 * (case == "half") for row in metrics)


def assert_within_spread(tensors: dict[str, Tensor], models: Path) -> None:
    """No further from one process's gradient than the sizes of its micro-batches take it apart."""
    every = [
        gradients(HALF, models, "none", Accelerator(cpu=True), micro_batch_size=size)[1]
        for size in (1, 2, 4, 8)
    ]
    columns = [[one[name] for name in tensors] for one in every]
    spread = max(distance(a, b) for a, b in combinations(columns, 2))
    assert min(distance(list(tensors.values()), column) for column in columns) <= spread


@pytest.mark.parametrize("case", KINDS)
def test_two_processes_with_parts_learn_as_one(two: See, one: See, models: Path, case: str) -> None:
    check(case, two(case), one(case), models)


def test_each_of_two_processes_holds_half(two: See, one: See) -> None:
    """Of weights, gradients and moments together."""
    (alone,), _ = one("four_steps")
    for row in two("four_steps")[0]:
        assert 0.5 * alone["bytes"] <= row["bytes"] <= 0.55 * alone["bytes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "sharding"),
    [(2, "none"), (2, "fsdp2"), (4, "none"), (4, "fsdp2"), (4, "hsdp")],
    ids=str,
)
def test_the_matrix(tmp_path: Path, models: Path, one: See, count: int, sharding: str) -> None:
    run_script(SCRIPT, (models, tmp_path, sharding, *CASES), count)
    for case in CASES:
        check(case, seen(tmp_path, count, case), one(case), models)
