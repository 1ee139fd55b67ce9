"""Draws whose numbers must never change: prompts are made again from them."""

from __future__ import annotations

import random

from tutelage.data.tasks.draws import below, between, is_held_out, pick, shuffled


def test_draws_stay_the_same_for_ever() -> None:
    rng = random.Random("draws")
    drawn = (below(100, rng), between(-5, 5, rng), pick("abcdef", rng), shuffled("abcdef", rng))
    assert drawn == (43, 2, "d", ("f", "d", "e", "c", "b", "a"))


def test_one_text_in_sixteen_is_held_out() -> None:
    found = [number for number in range(160) if is_held_out(f"text {number}")]
    assert found == [14, 21, 23, 76, 80, 90, 127, 155]
