"""What the fused objective does at its edges: nothing to do, asked twice, asked wrongly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from torch.utils._python_dispatch import TorchDispatchMode

from tutelage.core import distillation_objective, token_stats

Make = Callable[..., Any]


def test_no_rows_give_a_connected_zero(make_pair: Make) -> None:
    pair = make_pair(rows=0, has_bias=True)
    objective = distillation_objective(pair.student, pair.teacher)
    objective.total.backward()
    assert objective.total.item() == 0.0
    assert objective.reverse_kl.shape == (0,)
    for leaf in (pair.student.hidden, pair.student.weight, pair.student.bias):
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()


def test_selecting_no_rows_gives_a_connected_zero(make_pair: Make) -> None:
    pair = make_pair()
    none = torch.zeros(0, dtype=torch.long)
    distillation_objective(pair.student[none], pair.teacher[none]).total.backward()
    assert pair.student.hidden.grad.tolist() == [[0.0] * 5] * 7
    assert (pair.student.weight.grad == 0).all()


def test_a_second_backward_is_refused(make_pair: Make) -> None:
    pair = make_pair()
    objective = distillation_objective(pair.student, pair.teacher)
    objective.total.backward(retain_graph=True)
    before = pair.student.weight.grad.clone()
    with pytest.raises(RuntimeError, match=r"back-propagated twice.*Compute the objective again"):
        objective.total.backward()
    assert torch.equal(pair.student.weight.grad, before)


def test_a_second_derivative_is_refused(make_pair: Make) -> None:
    pair = make_pair()
    objective = distillation_objective(pair.student, pair.teacher)
    with pytest.raises(RuntimeError, match="differentiable once, got create_graph=True"):
        torch.autograd.grad(objective.total, pair.student.hidden, create_graph=True)


def test_without_grad_the_values_are_the_same_and_no_gradient_is_allocated(
    make_pair: Make,
) -> None:
    pair = make_pair(rows=64, vocab_size=50, width=40)
    expected = distillation_objective(pair.student, pair.teacher).total.item()
    known = (pair.student.hidden, pair.student.weight, pair.teacher.hidden, pair.teacher.weight)
    with torch.no_grad(), LiveBytes(known) as meter:
        found = distillation_objective(pair.student, pair.teacher, chunk_bytes=2 * 50 * 8)
    assert found.total.item() == expected
    assert not found.total.requires_grad
    assert meter.largest < 50 * 40 * 8  # a weight gradient
    with LiveBytes(known) as meter:
        distillation_objective(pair.student, pair.teacher, chunk_bytes=2 * 50 * 8)
    assert meter.largest >= 50 * 40 * 8  # the meter would have seen it


def test_statistics_of_an_objective_carry_no_gradient(make_pair: Make) -> None:
    pair = make_pair()
    objective = distillation_objective(pair.student, pair.teacher)
    for value in (objective.reverse_kl, objective.forward_kl, objective.entropy):
        assert not value.requires_grad
    assert objective.total.item() == pytest.approx(objective.reverse_kl.sum().item(), rel=1e-14)


def test_refuses_sides_and_weights_that_do_not_fit(make_pair: Make) -> None:
    pair = make_pair()
    with pytest.raises(ValueError, match=r"share a vocabulary, got 11 and 9 ids\. Cut the larger"):
        distillation_objective(pair.student, pair.teacher.cut(9))
    with pytest.raises(ValueError, match="same rows, got 7 and 1"):
        distillation_objective(pair.student, pair.teacher[torch.tensor([0])])
    one = torch.ones(1)
    with pytest.raises(ValueError, match=r"reverse_weight must be \[K\] with K = 7, got \(1,\)"):
        distillation_objective(pair.student, pair.teacher, one)
    with pytest.raises(ValueError, match=r"forward_weight must be \[K\] with K = 7, got \(1,\)"):
        distillation_objective(pair.student, pair.teacher, 1.0, one)


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_frozen", [True, False])
def test_a_frozen_head_costs_no_gradient_of_its_own(make_pair: Make, is_frozen: bool) -> None:
    """LoRA: neither the buffer `[V, D]` nor the products that fill it; else both are seen."""
    pair = make_pair(rows=32, vocab_size=50, width=40)
    pair.student.weight.requires_grad_(not is_frozen)
    known = (pair.student.hidden, pair.student.weight, pair.teacher.hidden, pair.teacher.weight)
    with LiveBytes(known) as meter, Operations() as operations:
        objective = distillation_objective(pair.student, pair.teacher, chunk_bytes=8 * 2 * 50 * 8)
        objective.total.backward()
    assert operations.count["mm"] == 3 * 4  # four chunks: both projections, the hidden gradient
    assert operations.count["addmm_"] == (0 if is_frozen else 4)
    assert (meter.largest >= 50 * 40 * 8) is not is_frozen
    assert pair.student.hidden.grad is not None
    assert (pair.student.weight.grad is None) is is_frozen


def test_a_head_of_another_dtype_is_cast_once_a_pass(make_pair: Make) -> None:
    pair = make_pair(rows=32, vocab_size=50, width=40, dtype=torch.bfloat16)
    wide = pair.student.weight.detach().float()
    student = replace(pair.student, weight=wide)
    tokens = torch.zeros(32, dtype=torch.long)
    found = token_stats(student, pair.teacher, tokens, chunk_bytes=2 * 50 * 4)
    assert torch.equal(found.stack(), token_stats(pair.student, pair.teacher, tokens, 400).stack())
    with Operations() as operations:
        token_stats(student, None, tokens, chunk_bytes=50 * 4)
    assert operations.count["mm"] == 32
    with Operations() as plain:
        token_stats(pair.student, None, tokens, chunk_bytes=50 * 4)
    assert operations.count["_to_copy"] == plain.count["_to_copy"] + 1
