"""Draws that give the same numbers in every Python version, so that prompts can be made again.

Of `random.Random`, only seeding with text and `random()` are promised to stay as they are.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
_HELD_OUT_ONE_IN = 16


def below(limit: int, rng: random.Random) -> int:
    """An integer from 0 to limit - 1."""
    return int(rng.random() * limit)


def shuffled(values: Sequence[T], rng: random.Random) -> tuple[T, ...]:
    """The values in an order drawn uniformly."""
    return tuple(sorted(values, key=lambda _: rng.random()))


def between(low: int, high: int, rng: random.Random) -> int:
    """An integer from low to high, both included."""
    return low + below(high - low + 1, rng)


def pick(values: Sequence[T], rng: random.Random) -> T:
    """One of the values."""
    return values[below(len(values), rng)]


def is_held_out(text: str) -> bool:
    """Whether a prompt with this content is for evaluation: one in sixteen, by a hash of the text.

    A stream of prompts that is drawn again until it is on its side never meets the other side.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _HELD_OUT_ONE_IN == 0
