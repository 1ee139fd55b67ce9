"""Norms and rotary positions: the numbers and gradients of their formulas written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tutelage.models.llama_cpu.ops import rms_norm, rotate, swiglu

EPS = 1e-6


def naive_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()


def naive_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    return y, *torch.autograd.grad((y * numbers(*y.shape, seed=9).to(y)).sum(), leaves)


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 4, 6)])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_a_norm_and_its_gradients_are_those_of_its_formula(
    shape: tuple[int, ...], scale: float
) -> None:
    x, weight = numbers(*shape) * scale, numbers(shape[-1], seed=1)
    wanted = gradients(naive_norm, x, weight)
    for found, exact in zip(
        gradients(lambda *a: rms_norm(*a, EPS), x, weight), wanted, strict=True
    ):
        torch.testing.assert_close(
            found, exact, rtol=1e-11, atol=1e-12 * float(exact.detach().abs().max())
        )
    in_float32 = gradients(lambda *a: rms_norm(*a, EPS), x.float(), weight.float())
    for found, exact in zip(in_float32, wanted, strict=True):
        assert float((found - exact).detach().abs().max()) <= 3e-6 * float(
            exact.detach().abs().max()
        )


def test_the_norm_of_zeros_is_zero_and_has_finite_gradients() -> None:
    y, grad_x, grad_weight = gradients(
        lambda *a: rms_norm(*a, EPS), torch.zeros(3, 8), torch.ones(8)
    )
    wanted = gradients(naive_norm, torch.zeros(3, 8), torch.ones(8))
    assert not y.any()
    torch.testing.assert_close((grad_x, grad_weight), wanted[1:])


def test_another_eps_would_be_seen() -> None:
    """Negative control."""
    x, weight = numbers(4, 8) * 1e-3, numbers(8, seed=1)
    gap = (rms_norm(x, weight, 2 * EPS) - naive_norm(x, weight)).abs().max()
    assert float(gap) > 1e-2


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("is_transposed", [True, False])
def test_a_rotation_and_its_gradient_are_those_of_its_formula(
    is_symmetric: bool, is_transposed: bool
) -> None:
    x, angle = numbers(2, 5, 3, 8), numbers(1, 5, 1, 8, seed=1)
    if is_symmetric:  # as rotary embeddings are
        angle = torch.cat((angle[..., :4], angle[..., :4]), -1)
    cos, sin = angle.cos(), angle.sin()
    if is_transposed:
        x, cos, sin = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, cos, sin))
    found = gradients(lambda x: rotate(x, cos, sin), x)
    wanted = gradients(lambda x: naive_rotation(x, cos, sin), x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    turned_back = gradients(lambda x: naive_rotation(x, cos, -sin), x)
    assert float((found[1] - turned_back[1]).abs().max()) > 0.1  # negative control


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_a_norm_computes_the_gradient_that_is_asked_for(needs: tuple[bool, bool]) -> None:
    x = numbers(4, 8).requires_grad_(needs[0])
    weight = numbers(8, seed=1).requires_grad_(needs[1])
    leaf = x if needs[0] else weight
    found, wanted = (
        torch.autograd.grad(y.sin().sum(), leaf)
        for y in (rms_norm(x, weight, EPS), naive_norm(x, weight))
    )
    torch.testing.assert_close(found, wanted)


def test_second_derivatives_are_refused() -> None:
    x, weight = numbers(4, 8).requires_grad_(), numbers(8, seed=1)
    (grad,) = torch.autograd.grad(rms_norm(x, weight, EPS).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_gated_unit_and_its_gradients_are_those_of_its_formula() -> None:
    gate, up = 3 * numbers(4, 5, 8), numbers(4, 5, 8, seed=1)
    wanted = gradients(lambda gate, up: gate / (1 + (-gate).exp()) * up, gate, up)
    torch.testing.assert_close(gradients(swiglu, gate, up), wanted, rtol=1e-12, atol=1e-13)
    swapped = gradients(lambda gate, up: swiglu(up, gate), gate, up)
    assert float((swapped[1] - wanted[1]).abs().max()) > 0.1  # negative control


def test_a_gated_unit_keeps_its_inputs_and_nothing_else() -> None:
    """A layer's widest activation is computed again in the backward pass."""
    kept: list[int] = []
    gate, up = (numbers(6, 8, seed=seed).requires_grad_() for seed in (0, 1))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.data_ptr()), x)[1], id):
        swiglu(gate, up)
    assert sorted(kept) == sorted((gate.data_ptr(), up.data_ptr()))
