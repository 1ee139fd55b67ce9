"""What the fused objective does at its edges: nothing to do, asked twice, asked wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes

from tutelage.core import distillation_objective

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
