"""Random numbers that are a pure function of their counters, so nothing hidden can be lost."""

from __future__ import annotations

from torch import Tensor

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
"""Increment between the states of SplitMix64."""
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of signed 64-bit integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """The output of SplitMix64 for states `x`: a bijection of 64-bit integers."""
    x = x + GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def random_bits(x: Tensor) -> Tensor:
    """The upper 53 bits of `x` as a float64 in [0, 1)."""
    return _shift_right(x, 11).double() * 0.5**53


def counter_uniform(seed: tuple[int, ...], *counters: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), a pure function of the seed and of each row's counters.

    The same row has the same number whatever batch, order or rank it is computed in.

    Args:
        seed: integers shared by all rows, e.g. (run seed, step, purpose).
        *counters: int64 tensors `[N]` that name a row, e.g. completion and position.

    Returns:
        float64 `[N]`.

    Raises:
        ValueError: no counters were given.

    Example:
        >>> import torch
        >>> four = counter_uniform((1, 2), torch.arange(4))
        >>> bool((four[:2] == counter_uniform((1, 2), torch.arange(2))).all())
        True
    """
    if not counters:
        raise ValueError("counter_uniform needs at least one tensor of counters.")
    state = counters[0].new_zeros(counters[0].shape)
    for part in seed:
        state = splitmix64(state ^ part)
    for counter in counters:
        state = splitmix64(state ^ counter)
    # The middle of one of 2**52 cells: neither 0 nor 1 can occur, not even by rounding.
    return (_shift_right(state, 12).double() + 0.5) * 0.5**52
