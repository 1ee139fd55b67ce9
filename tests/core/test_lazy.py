"""Lazy logits: what a block of them says, and what slicing and cutting leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tutelage.core import LazyLogits

Make = Callable[..., Any]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_blocks_equal_the_materialised_logits(
    make_pair: Make, has_bias: bool, scale: float, softcap: float | None
) -> None:
    pair = make_pair(has_bias=has_bias, scale=scale, softcap=softcap)
    with torch.no_grad():
        found = torch.cat([pair.student.block(0, 3), pair.student.block(3, 7)])
    torch.testing.assert_close(found, pair.reference[0].logits(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_heads_give_float32_logits_of_their_own_precision(
    make_pair: Make, dtype: torch.dtype
) -> None:
    student = make_pair(dtype=dtype, has_bias=True).student
    truth = student.hidden.double() @ student.weight.double().t() + student.bias.double()
    with torch.no_grad():
        found = student.block(0, 7)
    assert found.dtype == torch.float32
    bound = 4 * torch.finfo(dtype).eps * truth.abs().max()
    assert (found.double() - truth).abs().max() <= bound


def test_selecting_rows_selects_logits(make_pair: Make) -> None:
    student = make_pair(has_bias=True).student
    rows = torch.tensor([5, 0, 0, 3])
    with torch.no_grad():
        expected = student.block(0, 7)[rows]
        torch.testing.assert_close(student[rows].block(0, 4), expected, rtol=1e-14, atol=0)
        is_kept = torch.tensor([True, False] * 3 + [True])
        assert len(student[is_kept]) == 4


def test_cutting_drops_the_last_ids_and_their_gradient(make_pair: Make) -> None:
    pair = make_pair(has_bias=True)
    cut = pair.student.cut(8)
    assert cut.vocab_size == 8
    with torch.no_grad():
        torch.testing.assert_close(cut.block(0, 7), pair.student.block(0, 7)[:, :8])
    cut.weight.sum().backward()
    assert (pair.student.weight.grad[8:] == 0).all()
    assert pair.student.cut(11).weight is pair.student.weight


@pytest.mark.parametrize("size", [0, -1, 12])
def test_refuses_to_cut_to_ids_that_do_not_exist(make_pair: Make, size: int) -> None:
    with pytest.raises(ValueError, match=f"cannot cut a vocabulary of 11 to {size} ids"):
        make_pair().student.cut(size)


@pytest.mark.parametrize(
    ("hidden", "weight", "message"),
    [
        ((2, 3), (5, 4), "must share D, got 3 and 4"),
        ((2, 3, 4), (5, 4), r"hidden must be \[N, D\]"),
        ((3,), (5, 3), r"hidden must be \[N, D\]"),
        ((2, 3), (5,), r"weight \[V, D\]"),
    ],
)
def test_refuses_shapes_that_do_not_project(
    hidden: tuple[int, ...], weight: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LazyLogits(torch.zeros(hidden), torch.zeros(weight))
