"""Hidden states of a resident teacher: on its device up to a share of its memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tutelage.data.batch import collate
from tutelage.data.types import Prompt, Rollout
from tutelage.models import teacher as module
from tutelage.models.load import load_model
from tutelage.models.teacher import HiddenStore, Teacher, device_budget


class Counted(HiddenStore):
    """Notes what leaves the device."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[int] = []

    def keep(self, hidden: Tensor) -> Tensor:
        """As the store does."""
        self.left.append(len(hidden))
        return super().keep(hidden)


def test_what_exceeds_the_share_leaves_the_device(tiny_models: Path) -> None:
    batches = [
        collate([Rollout(Prompt("p", ""), 0, (1, 3), tuple(range(4, 4 + n)))], 0) for n in (2, 3, 4)
    ]
    store = Counted()
    teacher = Teacher(load_model(str(tiny_models / "teacher")), 20, store=store)
    teacher.device_budget_bytes = (2 + 3) * 32 * 4
    for _ in range(2):  # each step begins anew
        store.left.clear()
        with teacher.on_device():
            views = [teacher.forward(batch) for batch in batches]
        assert store.left == [4]
        assert [len(view) for view in views] == [2, 3, 4]


def test_the_share_is_the_devices_and_a_cpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    about = SimpleNamespace(total_memory=1600)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    assert device_budget(torch.device("cuda")) == 1600 // module.DEVICE_SHARE == 100
    assert device_budget(torch.device("cpu")) == 0
