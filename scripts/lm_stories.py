"""Arithmetic stories from templates: a task in words for a small language model.

A story is a number that is changed two times, told by one of many templates; the solution is
written in one of several valid ways and ends like GSM8K's, with `#### n`. Templates of the test are
never used in training. Every story is a pure function of its
seed, split and number.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import TypeAlias

Split: TypeAlias = str
Record: TypeAlias = dict[str, str]

LARGEST = 99
"""Numbers of a story and of its solution are between 1 and this."""

_NAMES = (
    *(("Mia", "She"), ("Tom", "He"), ("Anna", "She"), ("Ben", "He"), ("Lucy", "She")),
    *(("Sam", "He"), ("Ella", "She"), ("Jack", "He"), ("Rosa", "She"), ("Omar", "He")),
)
_THINGS = (
    *("apples", "books", "coins", "cards", "shells", "stamps", "pencils", "marbles"),
    *("cookies", "eggs", "flowers", "stones"),
)
_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
}

TRAINING = (
    ("++", "{n} has {a} {t}. {p} finds {b} more and then buys {c} more. How many {t} are there?"),
    ("++", "There are {a} {t} in a box. {n} adds {b} and later {c}. How many {t} are in the box?"),
    ("++", "{n} sold {a} {t} on Monday, {b} on Tuesday and {c} on Friday. How many in all?"),
    ("++", "A bag holds {a} {t}, a second one {b} and a third one {c}. How many {t} together?"),
    ("+-", "{n} has {a} {t}. {p} buys {b} more and gives away {c}. How many {t} are left?"),
    ("+-", "There were {a} {t} on a table. {n} put {b} there and took {c}. How many remain?"),
    ("+-", "{n} picks {a} {t}, then {b} more, and loses {c}. How many {t} does {n} still have?"),
    ("+-", "{n} had {a} {t} and got {b} as a present. {p} sold {c}. How many {t} are left?"),
    ("-+", "{n} has {a} {t}. {p} loses {b} and then finds {c}. How many {t} does {n} have now?"),
    ("-+", "A shop has {a} {t}. It sells {b} and gets {c} new ones. How many {t} does it have?"),
    ("-+", "{n} gave {b} of {a} {t} to a friend and later got {c} more. How many {t} now?"),
    ("-+", "A jar had {a} {t}. {n} took out {b} and put in {c}. How many {t} are in the jar?"),
    ("--", "{n} has {a} {t}. {p} gives {b} to a friend and {c} to a neighbor. How many are left?"),
    ("--", "Of {a} {t}, {b} are broken and {c} are lost. How many {t} are still good?"),
    ("--", "{n} had {a} {t}. {p} sold {b} on one day and {c} on the next. How many remain?"),
    ("--", "A box held {a} {t}. {n} took {b}, then {c}. How many {t} are still in it?"),
    ("*+", "{n} has {a} bags with {b} {t} each and {c} more. How many {t} are there in all?"),
    ("*+", "Each of {a} boxes holds {b} {t}. {n} adds {c} loose ones. How many {t} together?"),
    ("*+", "{n} buys {b} {t} a day for {a} days and then {c} more. How many {t} does {n} have?"),
    ("*-", "{n} has {a} bags with {b} {t} each and gives away {c}. How many {t} are left?"),
    ("*-", "Each of {a} boxes holds {b} {t}. {n} sells {c} of them. How many {t} remain?"),
    ("*-", "{n} makes {b} {t} a day for {a} days. {p} loses {c}. How many {t} are left?"),
    ("+*", "A bag has {a} red and {b} blue {t}. {n} has {c} such bags. How many {t} in all?"),
    ("+*", "Every day {n} finds {a} {t} at home and {b} outside. How many {t} in {c} days?"),
)
"""Signs of the two changes, and the words."""

HELD_OUT = (
    ("++", "{n} collects {a} {t} in May, {b} in June and {c} in July. How many {t} altogether?"),
    ("+-", "{n} starts with {a} {t}, wins {b} in a game and then loses {c}. How many {t} now?"),
    ("-+", "{n} owned {a} {t}. {p} sold {b}, but bought {c} new ones. How many {t} has {n} now?"),
    ("--", "A farm has {a} {t}. {b} go to {n} and {c} to the market. How many {t} stay?"),
    ("*+", "There are {a} shelves with {b} {t} each, and {c} on the floor. How many {t} in all?"),
    ("*-", "{n} fills {a} baskets with {b} {t} each. Then {c} fall out. How many {t} are inside?"),
    ("+*", "A kit needs {a} small and {b} large {t}. How many {t} does {n} need for {c} kits?"),
)


def stories(seed: int, split: Split, count: int) -> list[Record]:
    """Records with id, prompt, solution and answer.

    Args:
        seed: Of all draws.
        split: `train` and `prompts` are told by the templates of training, `test` by the others;
            the three never share a draw.
        count: Stories, each with a prompt of its own.

    Returns:
        The records; a solution begins with a space and ends with `#### n`.
    """
    templates = HELD_OUT if split == "test" else TRAINING
    found: dict[str, Record] = {}
    number = 0
    while len(found) < count:
        rng = random.Random(f"{seed}/{split}/{number}")
        record = _story(rng, *templates[number % len(templates)])
        found.setdefault(record["prompt"], {"id": f"stories/{split}/{number}", **record})
        number += 1
    return list(found.values())


def _story(rng: random.Random, signs: str, words: str) -> Record:
    a, b, c = _numbers(rng, signs)
    name, pronoun = rng.choice(_NAMES)
    text = words.format(n=name, p=pronoun, t=rng.choice(_THINGS), a=a, b=b, c=c)
    answer = apply(signs[1], apply(signs[0], a, b), c)
    solution = rng.choice(ways(signs, a, b, c))
    return {
        "prompt": f"Question: {text}\nAnswer:",
        "solution": f" {solution} #### {answer}",
        "answer": str(answer),
        "signs": signs,
    }


def apply(sign: str, left: int, right: int) -> int:
    """The value of one change."""
    return _OPERATIONS[sign](left, right)


def _numbers(rng: random.Random, signs: str) -> tuple[int, int, int]:
    """Three numbers whose story stays between 1 and `LARGEST` at every step."""
    while True:
        most = 5 if signs[0] == "*" else 9
        a, b, c = rng.randint(2, most), rng.randint(2, most), rng.randint(2, 9)
        if signs[1] == "*":
            c = rng.randint(2, 4)
        if signs[0] == "-":
            a += rng.randint(0, 9)
        middle = apply(signs[0], a, b)
        if 1 <= middle <= LARGEST and 1 <= apply(signs[1], middle, c) <= LARGEST:
            return a, b, c


def ways(signs: str, a: int, b: int, c: int) -> list[str]:
    """All ways in which a solution is written: in two steps, in other words or order, in one."""
    first, second = signs[0], signs[1]
    middle = apply(first, a, b)
    answer = apply(second, middle, c)
    one, two = f"{a} {first} {b} = {middle}", f"{middle} {second} {c} = {answer}"
    brackets = first != "*" and second == "*"
    whole = f"({a} {first} {b}) {second} {c}" if brackets else f"{a} {first} {b} {second} {c}"
    found = [f"{one}, {two}.", f"First {one}. Then {two}.", f"{whole} = {answer}."]
    if "*" not in signs and (other := apply(second, a, c)) >= 1:
        found.append(f"{a} {second} {c} = {other}, {other} {first} {b} = {answer}.")
    if first == "*":
        found.append(f"{b} * {a} = {middle}, {two}.")
    return found
