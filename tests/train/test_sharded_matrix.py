"""Every number of processes and every sharding continues what every other has saved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from saved_runs import are_same, contents, cut, distance, job, run_jobs, saved_again
from tiny import save_tiny_model
from tiny_runs import LORA, needs_peft
from tutelage.config.parse import parse_config
from tutelage.train.checkpoint import checkpoint_path
from tutelage.train.loop import train

NEAR = 1e-5
SMALL = 20_000


@dataclass(frozen=True)
class Layout:
    """Processes, and how they hold the student."""

    count: int
    sharding: str = "fsdp2"
    group_size: int = 0

    def __str__(self) -> str:
        group = f" by {self.group_size}" if self.group_size else ""
        return f"{self.count} {self.sharding}{group}"


LAYOUTS = [Layout(count, sharding) for count in (1, 2, 4) for sharding in ("none", "fsdp2")]
LAYOUTS.append(Layout(4, "fsdp2", 2))
PAIRS = list(product(LAYOUTS, LAYOUTS))


class Matrix:
    """Runs of one kind of student: unbroken ones of each layout, continued ones of each pair."""

    def __init__(self, folder: Path, **student: Any) -> None:
        self.folder, self.student = folder, student
        save_tiny_model(folder / "student", 0)
        save_tiny_model(folder / "teacher", 1)

    def job(self, name: str, layout: Layout, **changes: Any) -> dict[str, Any]:
        student = self.student | (
            {"sharding_group_size": layout.group_size} if layout.group_size else {}
        )
        return job(self.folder, self.folder / name, layout.sharding, student=student, **changes)

    def unbroken(self) -> None:
        self._do({layout: [self.job(str(layout), layout)] for layout in LAYOUTS})

    def continued(self, prefix: str, pairs: list[tuple[Layout, Layout]], **changes: Any) -> None:
        jobs: dict[Layout, list[dict[str, Any]]] = {layout: [] for layout in LAYOUTS}
        for source, target in pairs:
            given = {"source": (self.folder / str(source), 2)} | changes
            jobs[target].append(self.job(self.name(prefix, source, target), target, **given))
        self._do(jobs)

    def name(self, prefix: str, source: Layout, target: Layout) -> str:
        return f"{prefix} {source} to {target}"

    def _do(self, jobs: dict[Layout, list[dict[str, Any]]]) -> None:
        for count in (2, 4):
            chosen = [j for layout, each in jobs.items() if layout.count == count for j in each]
            if chosen:
                processes, ended = run_jobs(self.folder / "jobs", chosen, count)
                assert [p.code for p in processes] == [0] * count, [p.said for p in processes]
                assert {text for each in ended for text in each.values()} == {""}
        for layout, each in jobs.items():
            for described in each if layout.count == 1 else []:
                self._do_here(described)

    def _do_here(self, described: dict[str, Any]) -> None:
        config = parse_config(described["table"])
        if described["source"]:
            cut(*described["source"], Path(config.out))
        if described["saves_again"]:
            saved_again(config, Accelerator(cpu=True))
        else:
            train(config, log=lambda _: None)


def failures(pairs: list[tuple[Layout, Layout]], is_right: Any) -> Iterator[str]:
    yield from (f"{a} to {b}" for a, b in pairs if not is_right(a, b))


@pytest.mark.slow
def test_every_layout_continues_every_other(tmp_path: Path) -> None:
    matrix = Matrix(tmp_path)
    matrix.unbroken()
    matrix.continued("continued", PAIRS)

    def is_right(source: Layout, target: Layout) -> bool:
        run = tmp_path / matrix.name("continued", source, target)
        if source == target:
            return are_same(run, tmp_path / str(source))
        return distance(run, tmp_path / str(source)) < NEAR

    assert list(failures(PAIRS, is_right)) == []
    most = max(
        distance(tmp_path / matrix.name("continued", a, b), tmp_path / str(a)) for a, b in PAIRS
    )
    print(f"{len(PAIRS)} pairs, largest difference {most:.1e}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "student",
    [{}, {"dtype": "bfloat16"}, pytest.param({"lora": LORA}, marks=needs_peft)],
    ids=["float32", "bfloat16", "lora"],
)
def test_every_layout_saves_the_bytes_that_it_loaded(
    student: dict[str, Any], tmp_path: Path
) -> None:
    matrix = Matrix(tmp_path, **student)
    matrix.unbroken()
    matrix.continued("again", PAIRS, saves_again=True)
    same = [(layout, layout) for layout in LAYOUTS]
    matrix.continued("continued", same, file_bytes=SMALL)

    def is_same(source: Layout, target: Layout) -> bool:
        again = tmp_path / matrix.name("again", source, target)
        folders = (checkpoint_path(run, 2) for run in (again, tmp_path / str(source)))
        found, expected = (
            # peft writes adapter_config.json with names in the order of a set
            {name: data for name, data in contents(folder).items() if "safetensors" in name}
            for folder in folders
        )
        return found == expected

    def is_continued(source: Layout, _: Layout) -> bool:
        run = tmp_path / matrix.name("continued", source, source)
        return are_same(run, tmp_path / str(source))

    assert list(failures(PAIRS, is_same)) == []
    assert list(failures(same, is_continued)) == []
