"""Benchmark problems among training prompts: inserted ones are found, the rest are not."""

from __future__ import annotations

import random

import pytest

from tutelage.data.contamination import find_overlaps
from tutelage.data.types import Prompt

WORDS = [f"word{i}" for i in range(400)]
ENDING = " where m and n are relatively prime positive integers, find the sum m+n."


def problem(seed: int, length: int = 40) -> str:
    chance = random.Random(seed)
    return " ".join(chance.choice(WORDS) for _ in range(length)) + ENDING


BENCHMARK = [Prompt(f"b{i}", problem(i)) for i in range(30)] + [Prompt("short", "Find $2+2$.")]
TRAINING = [Prompt(f"t{i}", problem(1000 + i)) for i in range(200)]


def test_other_problems_with_the_same_ending_are_not_reported() -> None:
    assert find_overlaps(TRAINING, BENCHMARK) == []


def changed(text: str) -> str:
    """One word in twenty is another."""
    words = text.split(" ")
    return " ".join("other" if i % 20 == 10 else word for i, word in enumerate(words))


@pytest.mark.parametrize(
    "disguise",
    [
        str,
        str.upper,
        lambda text: text.replace(" ", "\n  "),
        lambda text: "$" + text.replace(" ", "$ $") + "$",
        lambda text: f"Solve the following problem step by step.\n\n{text}\n\nAnswer: ",
        lambda text: text[: len(text) * 7 // 10],
        changed,
    ],
)
def test_every_inserted_problem_is_found(disguise: object) -> None:
    assert callable(disguise)
    inserted = [Prompt(f"x{i}", disguise(problem(i))) for i in range(30)]
    chats = [Prompt(f"c{i}", ({"role": "user", "content": str(p.content)},)) for i, p in
             enumerate(inserted)]  # fmt: skip
    mixed = [*TRAINING[:100], *inserted, *TRAINING[100:], *chats]
    found = find_overlaps(mixed, BENCHMARK)
    assert [(o.prompt_id, o.benchmark_id) for o in found] == [
        (f"{kind}{i}", f"b{i}") for kind in "xc" for i in range(30)
    ]
    assert all(0.5 <= overlap.share <= 1 for overlap in found)


def test_short_problems_count_as_a_whole() -> None:
    training = [
        Prompt("same", "find 2 + 2"),
        Prompt("longer", "Find 2 + 2 and the rest."),
    ]
    assert [o.prompt_id for o in find_overlaps(training, BENCHMARK)] == ["same"]


def test_a_prompt_without_words_overlaps_with_nothing() -> None:
    assert find_overlaps([Prompt("?", "???")], [Prompt("!", "!!!")]) == []
