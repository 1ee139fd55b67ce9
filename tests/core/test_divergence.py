"""Divergences of log-probabilities: values, gradients and the laws they obey."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from tutelage.core import forward_kl, jsd, reverse_kl

Divergence = Callable[[Tensor, Tensor], Tensor]
INF = math.inf


def jsd_03(log_p: Tensor, log_q: Tensor) -> Tensor:
    return jsd(log_p, log_q, 0.3)


def jsd_03_reference(log_p: Tensor, log_q: Tensor) -> Tensor:
    return reference.jsd(log_p, log_q, 0.3)


PAIRS: list[tuple[Divergence, Divergence]] = [
    (reverse_kl, reference.reverse_kl),
    (forward_kl, reference.forward_kl),
    (jsd_03, jsd_03_reference),
]
ALL = [pair[0] for pair in PAIRS]


@st.composite
def logit_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher, 1 to 4 rows over 2 to 9 ids."""
    rows, vocab_size = draw(st.integers(1, 4)), draw(st.integers(2, 9))
    numbers = st.floats(-30, 30, allow_subnormal=False)
    values = draw(st.lists(numbers, min_size=2 * rows * vocab_size, max_size=2 * rows * vocab_size))
    both = torch.tensor(values, dtype=torch.float64).reshape(2, rows, vocab_size)
    return both[0], both[1]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@given(pair=logit_pairs())
def test_value_and_gradients_equal_the_reference(
    ours: Divergence, theirs: Divergence, pair: tuple[Tensor, Tensor]
) -> None:
    found = [z.clone().requires_grad_(True) for z in pair]
    expected = [z.clone().requires_grad_(True) for z in pair]
    value = ours(found[0].log_softmax(-1), found[1].log_softmax(-1))
    truth = theirs(reference.log_softmax(expected[0]), reference.log_softmax(expected[1]))
    torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-12)
    value.sum().backward()
    truth.sum().backward()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("divergence", ALL)
@given(pair=logit_pairs())
def test_is_never_negative(divergence: Divergence, pair: tuple[Tensor, Tensor]) -> None:
    log_p, log_q = (z.log_softmax(-1) for z in pair)
    assert (divergence(log_p, log_q) >= -1e-14).all()


@pytest.mark.parametrize("divergence", ALL)
@given(pair=logit_pairs(), shift=st.floats(0.01, 3.0))
def test_is_zero_exactly_where_both_are_equal(
    divergence: Divergence, pair: tuple[Tensor, Tensor], shift: float
) -> None:
    log_p = (pair[0] / 10).log_softmax(-1)
    other = pair[0] / 10
    other[:, 0] += shift
    assert divergence(log_p, log_p).abs().max() <= 1e-15
    assert (divergence(log_p, other.log_softmax(-1)) > 1e-9).all()


@pytest.mark.parametrize("divergence", ALL)
@given(pair=logit_pairs(), seed=st.integers(0, 99), shift=st.floats(-50, 50))
def test_ignores_the_order_of_ids_and_constants_added_to_logits(
    divergence: Divergence, pair: tuple[Tensor, Tensor], seed: int, shift: float
) -> None:
    order = torch.randperm(pair[0].shape[1], generator=torch.Generator().manual_seed(seed))
    plain = divergence(pair[0].log_softmax(-1), pair[1].log_softmax(-1))
    other = divergence(
        (pair[0][:, order] + shift).log_softmax(-1), (pair[1][:, order] - shift).log_softmax(-1)
    )
    torch.testing.assert_close(plain, other, rtol=1e-9, atol=1e-11)


@given(pair=logit_pairs(), weight=st.floats(0.01, 0.99))
def test_jsd_is_bounded_by_the_entropy_of_its_weights(
    pair: tuple[Tensor, Tensor], weight: float
) -> None:
    log_p, log_q = (z.log_softmax(-1) for z in pair)
    bound = -weight * math.log(weight) - (1 - weight) * math.log1p(-weight)
    assert (jsd(log_p, log_q, weight) <= bound + 1e-12).all()


@given(pair=logit_pairs(), weight=st.floats(0.01, 0.99))
def test_jsd_exchanges_its_sides_with_its_weight(
    pair: tuple[Tensor, Tensor], weight: float
) -> None:
    log_p, log_q = (z.log_softmax(-1) for z in pair)
    swapped = jsd(log_q, log_p, 1 - weight)
    torch.testing.assert_close(jsd(log_p, log_q, weight), swapped, rtol=1e-9, atol=1e-13)


def test_jsd_tends_to_forward_kl_for_small_and_reverse_kl_for_large_weights() -> None:
    generator = torch.Generator().manual_seed(3)
    log_p, log_q = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64).log_softmax(-1)
    # jsd / w and jsd / (1 − w) tend to the KL of the light side against the heavy one.
    for weight in (1e-5, 1e-6):
        torch.testing.assert_close(
            jsd(log_p, log_q, weight) / weight, forward_kl(log_p, log_q), rtol=20 * weight, atol=0
        )
        torch.testing.assert_close(
            jsd(log_p, log_q, 1 - weight) / weight,
            reverse_kl(log_p, log_q),
            rtol=20 * weight,
            atol=1e-9,
        )


@pytest.mark.parametrize("weight", [0.0, 1.0, -0.5, 1.5, math.nan])
def test_jsd_refuses_weights_that_give_zero_everywhere(weight: float) -> None:
    log_p = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        jsd(log_p, log_p, weight)


@pytest.mark.parametrize("divergence", ALL)
def test_ids_that_both_sides_exclude_change_neither_value_nor_gradient(
    divergence: Divergence,
) -> None:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    masked = torch.cat([z, torch.full((2, 4, 3), -INF, dtype=torch.float64)], -1)
    plain = [x.clone().requires_grad_(True) for x in z]
    wide = [x.clone().requires_grad_(True) for x in masked]
    values = [divergence(*(x.log_softmax(-1) for x in side)) for side in (plain, wide)]
    torch.testing.assert_close(values[1], values[0], rtol=1e-13, atol=0)
    for value in values:
        value.sum().backward()
    for x, y in zip(plain, wide, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        torch.testing.assert_close(y.grad[:, :6], x.grad, rtol=1e-12, atol=1e-15)
        assert (y.grad[:, 6:] == 0).all()


def test_the_usual_formula_has_no_finite_gradient_there() -> None:
    """Negative control of the test above: masking after the arithmetic is too late."""
    z = torch.tensor([[0.3, -0.2, -INF]], dtype=torch.float64).requires_grad_(True)
    log_p = z.log_softmax(-1)
    product = torch.where(log_p == -INF, 0.0, log_p.exp() * (log_p - log_p.detach()))
    product.sum().backward()
    assert z.grad is not None
    assert not z.grad.isfinite().all()


def test_what_one_side_excludes_costs_infinity_only_the_other_way() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    q = torch.tensor([[0.2, 0.3, 0.5]]).log()
    assert forward_kl(p, q).item() == INF
    assert reverse_kl(p, q).item() == pytest.approx(0.5 * math.log(2.5) + 0.5 * math.log(5 / 3))
    assert math.isfinite(jsd(p, q).item())


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("temperature", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_extreme_logits_have_finite_gradients(
    divergence: Divergence, temperature: float, size: float
) -> None:
    generator = torch.Generator().manual_seed(5)
    z = size * torch.randn(2, 8, 9, generator=generator)
    student, teacher = (x.clone().requires_grad_(True) for x in z)
    divergence(
        (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    ).sum().backward()
    for leaf in (student, teacher):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("divergence", ALL)
def test_passes_gradcheck(divergence: Divergence) -> None:
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    z[:, :, 3] = -INF  # excluded by both

    def of_logits(student: Tensor, teacher: Tensor) -> Tensor:
        wide = [torch.cat([x, z[0, :, 3:]], -1).log_softmax(-1) for x in (student, teacher)]
        return divergence(*wide)

    leaves = [x[:, :3].clone().requires_grad_(True) for x in z]
    assert torch.autograd.gradcheck(of_logits, leaves)
