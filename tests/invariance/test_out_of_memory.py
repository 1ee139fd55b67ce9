"""A micro-batch that memory does not hold is cut in two; the step stays the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import Taken, distance, take_step

from tutelage.data.batch import collate
from tutelage.data.types import Rollout
from tutelage.errors import RunError
from tutelage.models.student import Student

CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "soft_or": {"selection": {"rule": "soft_or", "keep": 0.5}},
    "sampled": {"objective": {"kind": "sampled", "clip": 0.05}, "updates_per_step": 2},
    "eopd": {"objective": {"kind": "eopd", "gate": "percentile", "threshold": 0.7}},
}


class Full:
    """Memory that holds so many sequences; the shortage comes at once or with gradients made."""

    def __init__(self, num_sequences: int, in_backward: bool) -> None:
        self.num_sequences, self.in_backward = num_sequences, in_backward
        self.failures = 0
        self._is_large = False

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        forward, backward = Student.forward, torch.Tensor.backward

        def full_forward(student: Student, batch: Any, teacher: Any, rows: Any = None, *rest: Any,
                         **options: Any) -> Any:  # fmt: skip
            self._is_large = rows is not None and len(batch.input_ids) > self.num_sequences
            if self._is_large and not self.in_backward:
                self.fail()
            return forward(student, batch, teacher, rows, *rest, **options)

        def full_backward(loss: torch.Tensor, *rest: Any) -> None:
            backward(loss, *rest)
            if self._is_large:
                self.fail()

        monkeypatch.setattr(Student, "forward", full_forward)
        monkeypatch.setattr(torch.Tensor, "backward", full_backward)

    def fail(self) -> None:
        self.failures += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def step(models: Path, rollouts: Sequence[Rollout], case: str) -> Taken:
    return take_step(models, rollouts, torch.float64, micro_batch_size=3, **CASES[case])


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_a_machine_with_more_memory(
    tiny_models: Path,
    rollouts: list[Rollout],
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    in_backward: bool,
) -> None:
    expected = step(tiny_models, rollouts, case)
    full = Full(1, in_backward)
    full.install(monkeypatch)
    found = step(tiny_models, rollouts, case)
    assert full.failures > 2
    assert found.metrics["num_memory_splits"] == full.failures
    assert expected.metrics["num_memory_splits"] == 0
    assert distance(found.gradients, expected.gradients) < 1e-12
    assert found.metrics["clip_share"] == expected.metrics["clip_share"]
    for key in ("loss", "grad_norm", "num_rows", "num_kept", "reverse_kl_nats"):
        assert found.metrics[key] == pytest.approx(expected.metrics[key], rel=1e-12)


def test_a_single_sequence_that_does_not_fit_is_one_line(
    tiny_models: Path, rollouts: list[Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    Full(0, in_backward=False).install(monkeypatch)
    with pytest.raises(RunError, match=r"step 1 ran out of memory.*Lower micro_batch_tokens") as e:
        step(tiny_models, rollouts, "all")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_halves_hold_the_same_rows_in_the_same_order(
    rollouts: list[Rollout], count: int, side: Any
) -> None:
    batch = collate(rollouts[:count], 0, side)
    halves = batch.halves()
    for name in ("tokens", "completion", "position"):
        both = torch.cat([getattr(half, name) for half in halves])
        assert torch.equal(both, getattr(batch, name))
    hidden = torch.rand(*batch.input_ids.shape, 4)
    parts = hidden.split([len(half.input_ids) for half in halves])
    flat = torch.cat([half.flatten(part) for half, part in zip(halves, parts, strict=True)])
    assert torch.equal(flat, batch.flatten(hidden))
