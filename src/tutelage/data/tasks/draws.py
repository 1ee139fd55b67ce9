"""Draws that give the same numbers in every Python version, so that prompts can be made again.

Of `random.Random`, only seeding with text and `random()` are promised to stay as they are.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def below(limit: int, rng: random.Random) -> int:
    """An integer from 0 to limit - 1."""
    return int(rng.random() * limit)


def shuffled(values: Sequence[T], rng: random.Random) -> tuple[T, ...]:
    """The values in an order drawn uniformly."""
    return tuple(sorted(values, key=lambda _: rng.random()))
