"""How often learning waits for the device: with the kernels of a GPU, interpreted on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import RULES, take_step

from counting import Waits
from tutelage.core import kernels
from tutelage.data.types import Rollout
from tutelage.models.optimizer import MasterWeights
from tutelage.models.packing import use_own_attention
from tutelage.models.student import Student
from tutelage.models.teacher import Teacher
from tutelage.setup import components, teacher
from tutelage.train.update import Updater, UpdateResult

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "is_supported", lambda device: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    plain = teacher.set_attention

    def set_attention(config: Any, model: Any, *rest: Any) -> None:
        plain(config, model, *rest)
        assert use_own_attention(model)  # as every student on CUDA has it

    for module in (components, teacher):
        monkeypatch.setattr(module, "set_attention", set_attention)


def learn(monkeypatch: pytest.MonkeyPatch, models: Path, rollouts: list[Rollout], **changes: Any
          ) -> tuple[dict[str, int], int]:  # fmt: skip
    """What was waited for in the learning of a step, and how many micro-batches that was."""
    waits = Waits()
    plain, sizes = Updater.run, []

    def counted(self: Updater, *arguments: Any) -> UpdateResult:
        with waits:
            learned = plain(self, *arguments)
        sizes.append(len(learned.micro_batches))
        return learned

    monkeypatch.setattr(Updater, "run", counted)
    sides = {
        "student": {
            "model": str(models / "student"),
            "dtype": "bfloat16",  # float32 on a CPU has shortcuts of its own
            "activation_checkpointing": True,
        },
        "teacher": {"model": str(models / "teacher"), "dtype": "bfloat16"},
        "optimizer": {"learning_rate": 1.0, "max_grad_norm": 0.01},  # which clips
    }
    take_step(models, rollouts, torch.bfloat16, micro_batch_size=3, **(sides | changes))
    return dict(waits.found), sizes[0]


@pytest.mark.parametrize("micro_batches", ["padded", "packed"])
def test_an_update_from_every_token_waits_once(
    monkeypatch: pytest.MonkeyPatch, tiny_models: Path, rollouts: list[Rollout], micro_batches: str
) -> None:
    """For its objective and the norm of its gradient together, after the last backward pass."""
    found, num = learn(monkeypatch, tiny_models, rollouts, micro_batches=micro_batches)
    assert num >= 3
    assert found == {"tolist": 1}


def test_updates_from_chosen_tokens_wait_once_each_and_twice_before_the_first(
    monkeypatch: pytest.MonkeyPatch, tiny_models: Path, rollouts: list[Rollout]
) -> None:
    """For the divisors, and for how many rows each micro-batch keeps."""
    found, num = learn(
        monkeypatch, tiny_models, rollouts, selection=RULES["soft_or"], updates_per_step=2
    )
    assert num >= 4
    assert found == {"tolist": 2 + 2}


def test_reading_and_scoring_wait_for_nothing(
    monkeypatch: pytest.MonkeyPatch, tiny_models: Path, rollouts: list[Rollout]
) -> None:
    """A teacher on an accelerator keeps its hidden states there; here they count as moved."""
    waits: list[Waits] = []

    def counted(plain: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            waits.append(Waits())
            with waits[-1]:
                return plain(*arguments, **options)

        return call

    monkeypatch.setattr(Teacher, "forward", counted(Teacher.forward))
    monkeypatch.setattr(Student, "forward", counted(Student.forward))
    _, num = learn(monkeypatch, tiny_models, rollouts, selection=RULES["soft_or"])
    calls = [dict(each.found) for each in waits]
    assert calls[:num] == [{"cpu": 1}] * num
    assert calls[num:] == [{}] * 2 * num  # scored, and learned from


def test_a_number_asked_for_in_every_micro_batch_would_be_seen(
    monkeypatch: pytest.MonkeyPatch, tiny_models: Path, rollouts: list[Rollout]
) -> None:
    """Negative control."""
    plain = MasterWeights.accumulate_grads

    def accumulate_grads(self: MasterWeights) -> None:
        plain(self)
        assert all(bool(master.isfinite().all()) for master in self.masters[:1])

    monkeypatch.setattr(MasterWeights, "accumulate_grads", accumulate_grads)
    found, num = learn(monkeypatch, tiny_models, rollouts)
    assert found == {"tolist": 1, "_local_scalar_dense": num}
