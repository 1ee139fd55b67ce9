"""More draws that give the same numbers in every Python version."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from tutelage.data.tasks.draws import below

T = TypeVar("T")


def between(low: int, high: int, rng: random.Random) -> int:
    """An integer from low to high, both included."""
    return low + below(high - low + 1, rng)


def pick(values: Sequence[T], rng: random.Random) -> T:
    """One of the values."""
    return values[below(len(values), rng)]


def other(values: Sequence[T], value: T, rng: random.Random) -> T:
    """One of the values that is not the given one."""
    return pick([v for v in values if v != value], rng)
