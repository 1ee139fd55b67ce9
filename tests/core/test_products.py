"""Products by a registered library, where it says that it is faster, and by torch elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tutelage.core import products
from tutelage.core.products import FastProduct, add_product_, product, product_, register_product


@pytest.mark.parametrize("is_faster", [True, False])
def test_a_registered_product_is_used_where_it_is_faster(
    is_faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(a: Tensor, b: Tensor) -> Tensor:
        return 2 * (a @ b.t())

    monkeypatch.setattr(products, "_FAST", {})
    register_product("meta", FastProduct(lambda *_: True, lambda *_: torch.ones(1)))
    a, b = torch.arange(6.0).view(3, 2), torch.arange(8.0).view(4, 2)
    exact = a @ b.t()
    assert bool((product(a, b) == exact).all())  # of another device
    register_product("cpu", FastProduct(lambda *_: is_faster, twice))
    expected = exact * (2 if is_faster else 1)
    assert bool((product(a, b) == expected).all())
    out = torch.full_like(expected, torch.nan)
    product_(out, a, b)
    assert bool((out == expected).all())
    add_product_(out, a, b)
    assert bool((out == 2 * expected).all())
