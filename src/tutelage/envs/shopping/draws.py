"""Draws from a stream that is the same in every version of Python."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


# Only random() is promised to give the same numbers in every Python version; nothing else is used.
def below(limit: int, rng: random.Random) -> int:
    """A whole number from 0 to limit - 1."""
    return int(rng.random() * limit)


def between(low: int, high: int, rng: random.Random) -> int:
    """A whole number from low to high, both included."""
    return low + below(high - low + 1, rng)


def pick(values: Sequence[T], rng: random.Random) -> T:
    """One of the values."""
    return values[below(len(values), rng)]


def other(values: Sequence[T], value: T, rng: random.Random) -> T:
    """One of the values that is not the given one."""
    return pick([v for v in values if v != value], rng)


def shuffled(values: Sequence[T], rng: random.Random) -> list[T]:
    """The values in a random order."""
    return sorted(values, key=lambda _: rng.random())
