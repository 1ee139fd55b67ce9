"""Several teachers: which of them a batch has, and what of them is on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tutelage.core import LazyLogits
from tutelage.data.batch import Batch, collate, micro_batches
from tutelage.data.types import Prompt, Rollout
from tutelage.teachers.group import TeacherGroup


def rollout(teacher: str, length: int = 2) -> Rollout:
    return Rollout(Prompt("p", "", teacher=teacher), 0, (5,), (6,) * length)


class Spy:
    """A teacher that notes when it comes and goes."""

    vocab_size, mode, itemsize = 20, "resident", 4
    head_bytes, resting_bytes = 10, 0

    def __init__(self, name: str, log: list[str], full_bytes: int = 100) -> None:
        self.name, self.log, self.full_bytes = name, log, full_bytes
        self.head_shape = (20, len(name) + 1)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        self.log.append(f"+{self.name}")
        try:
            yield
        finally:
            self.log.append(f"-{self.name}")

    def forward(self, batch: Batch) -> LazyLogits:
        self.log.append(self.name)
        return LazyLogits(torch.zeros(batch.num_rows, 2), torch.zeros(20, 2))

    def to_device(self, logits: Any) -> Any:
        return logits

    def checks(self) -> Mapping[str, float]:
        return {"gap": float(len(self.name))}


def group_of(log: list[str]) -> TeacherGroup:
    spies: Any = {name: Spy(name or "first", log, 100 + len(name)) for name in ("", "code", "law")}
    return TeacherGroup(spies)


def test_one_teacher_at_a_time_is_on_the_device() -> None:
    log: list[str] = []
    group = group_of(log)
    with group.on_device():
        for name in ("", "", "law", "code", "code"):
            group.forward(collate([rollout(name)], 0))
    assert log == ["+first", "first", "first", "-first", "+law", "law", "-law", "+code", "code",
                   "code", "-code"]  # fmt: skip
    log.clear()
    with group.on_device():
        group.forward(collate([rollout("")], 0))
        with pytest.raises(KeyError):
            group.forward(collate([rollout("nobody")], 0))
    assert log == ["+first", "first", "-first"]


def test_a_phase_begins_anew() -> None:
    log: list[str] = []
    group = group_of(log)
    for _ in range(2):
        with group.on_device():
            group.forward(collate([rollout("law")], 0))
    assert log == ["+law", "law", "-law"] * 2


def test_what_the_group_holds_is_what_its_teachers_hold() -> None:
    group = group_of([])
    assert group.head_bytes == 30
    assert group.full_bytes == 104
    assert group.resting_bytes == 0
    assert group.head_shape == (20, 6)
    assert group.checks() == {"gap": 5.0, "gap:code": 4.0, "gap:law": 3.0}


def test_a_batch_has_one_teacher() -> None:
    rollouts = [rollout("", 1), rollout("", 2), rollout("law", 1), rollout("", 1), rollout("", 3)]
    found = micro_batches(rollouts, 8, 0)
    assert [(b.teacher, b.num_sequences) for b in found] == [("", 2), ("law", 1), ("", 2)]
    assert torch.cat([b.completion for b in found]).tolist() == [0, 1, 1, 2, 3, 4, 4, 4]
    limited = micro_batches(rollouts, 8, 0, max_tokens=5)
    assert [(b.teacher, b.num_sequences) for b in limited] == [
        ("", 1),
        ("", 1),
        ("law", 1),
        ("", 1),
        ("", 1),
    ]
