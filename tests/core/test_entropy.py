"""Entropy of log-probabilities."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from tutelage.core import entropy, normalized_entropy

ROWS = st.lists(st.floats(-40, 40, allow_subnormal=False), min_size=2, max_size=12)


@given(row=ROWS)
def test_equals_scipy_and_stays_within_its_bounds(row: list[float]) -> None:
    log_p = torch.tensor([row], dtype=torch.float64).log_softmax(-1)
    value = entropy(log_p).item()
    assert value == pytest.approx(float(scipy.stats.entropy(log_p[0].exp().numpy())), abs=1e-12)
    assert -1e-15 <= value <= math.log(len(row)) + 1e-12


@pytest.mark.parametrize("vocab_size", [2, 7, 1000])
def test_uniform_rows_have_all_the_entropy_there_is(vocab_size: int) -> None:
    log_p = torch.zeros(3, vocab_size, dtype=torch.float64).log_softmax(-1)
    assert entropy(log_p).tolist() == pytest.approx([math.log(vocab_size)] * 3, rel=1e-14)
    assert normalized_entropy(log_p).tolist() == pytest.approx([1.0] * 3, rel=1e-14)


def test_one_certain_id_has_none_and_a_finite_gradient() -> None:
    z = torch.tensor([[0.0, -math.inf, -math.inf]], dtype=torch.float64).requires_grad_(True)
    value = entropy(z.log_softmax(-1))
    value.sum().backward()
    assert value.item() == 0.0
    assert z.grad is not None
    assert z.grad.tolist() == [[0.0, 0.0, 0.0]]


@given(row=ROWS)
def test_gradient_equals_the_reference_and_sums_to_zero(row: list[float]) -> None:
    ours, theirs = (torch.tensor([row], dtype=torch.float64, requires_grad=True) for _ in "ab")
    entropy(ours.log_softmax(-1)).sum().backward()
    reference.entropy(reference.log_softmax(theirs)).sum().backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    assert abs(ours.grad.sum().item()) <= 1e-12


def test_reference_agrees_with_itself_on_tiny_entropies() -> None:
    """The subtraction-free form used for tiny entropies is the same function."""
    row = [2.0, 0.5, -1.0, 0.0]
    log_p = torch.tensor([row], dtype=torch.float64).log_softmax(-1)
    assert reference.entropy_of_logits(row) == pytest.approx(entropy(log_p).item(), rel=1e-14)
