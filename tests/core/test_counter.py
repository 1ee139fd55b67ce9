"""Counter-based uniform numbers: the published algorithm, uniform, independent, batch-free."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from tutelage.core import counter_uniform

INTEGERS = st.integers(-(2**63), 2**63 - 1)


@given(
    seed=st.lists(INTEGERS, max_size=3),
    rows=st.lists(st.tuples(INTEGERS, INTEGERS), min_size=1, max_size=5),
)
def test_equals_plain_integer_arithmetic(seed: list[int], rows: list[tuple[int, int]]) -> None:
    first, second = (torch.tensor(column) for column in zip(*rows, strict=True))
    found = counter_uniform(tuple(seed), first, second).tolist()
    assert found == [reference.counter_uniform(seed, row) for row in rows]
    assert all(0.0 < u < 1.0 for u in found)


def test_splitmix64_of_the_reference_matches_published_values() -> None:
    """First outputs of the generator seeded with 1234567 (Rosetta Code, Vigna's C source)."""
    golden = 0x9E3779B97F4A7C15
    outputs = [reference.splitmix64(1234567 + i * golden) for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_is_uniform() -> None:
    u = counter_uniform((7, 3), torch.arange(20000))
    assert scipy.stats.kstest(u.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("other", [(7, 4), (8, 3), (7, 3, 0)])
def test_other_seeds_and_neighbouring_counters_are_independent(other: tuple[int, ...]) -> None:
    rows = torch.arange(5000)
    u = counter_uniform((7, 3), rows)
    for v in (counter_uniform(other, rows), counter_uniform((7, 3), rows + 1)):
        joint = torch.stack([u * 8, v * 8]).long()
        table = torch.bincount(joint[0] * 8 + joint[1], minlength=64)
        assert scipy.stats.chisquare(table.numpy()).pvalue > 1e-4


def test_a_row_draws_the_same_number_in_any_batch_and_order() -> None:
    completion, position = torch.tensor([0, 0, 1, 5]), torch.tensor([0, 1, 0, 9])
    whole = counter_uniform((1,), completion, position)
    for order in ([2], [3, 0], [1, 3, 2, 0]):
        part = counter_uniform((1,), completion[order], position[order])
        assert part.tolist() == whole[order].tolist()
    assert len(set(whole.tolist())) == 4


def test_counters_do_not_commute() -> None:
    one, two = torch.tensor([1]), torch.tensor([2])
    assert counter_uniform((0,), one, two) != counter_uniform((0,), two, one)


def test_refuses_to_draw_without_counters() -> None:
    with pytest.raises(ValueError, match="at least one tensor of counters"):
        counter_uniform((1, 2))
