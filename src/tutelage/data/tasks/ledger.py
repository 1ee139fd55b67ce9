"""The ledger task: little sums whose steps may be written in many orders, graded step by step.

A prompt lists items, each a letter and a sum: ``e4+7;j7-6;n3+7;m0-6;b9*7;>``. A completion visits
every item once, in any order and with the operands of + and * in either order, writes its value
modulo 10 and the running sum modulo 10, and ends with the last running sum:
``b9*7=3~3;e7+4=1~4;j7-6=1~5;m0-6=4~9;n3+7=0~9;#9``, then the end-of-sequence token.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from tutelage.data.tasks.draws import below, is_held_out, shuffled
from tutelage.data.types import Prompt
from tutelage.errors import ConfigError, DataError

LETTERS = "abcdefghijklmnop"
DIGITS = "0123456789"
OPERATORS = "+-*"
PUNCTUATION = "=;#~>"
ALPHABET = LETTERS + DIGITS + OPERATORS + PUNCTUATION
"""All that prompts and completions are written with."""

_ITEM = re.compile(r"([a-p])([0-9])([-+*])([0-9]);")
_PROMPT = re.compile(rf"(?:{_ITEM.pattern})+>")
_STEP = re.compile(r"([a-p])([0-9])([-+*])([0-9])=([0-9])~([0-9]);")
_COMPLETION = re.compile(rf"(?P<steps>(?:{_STEP.pattern})+)#(?P<answer>[0-9])")


class Item(NamedTuple):
    """One named sum of a prompt: letter, left operand, operator, right operand."""

    letter: str
    left: int
    operator: str
    right: int

    @property
    def value(self) -> int:
        """The value of the sum modulo 10."""
        match self.operator:
            case "+":
                return (self.left + self.right) % 10
            case "-":
                return (self.left - self.right) % 10
            case _:
                return (self.left * self.right) % 10

    @property
    def swapped(self) -> Item:
        """The same sum with its operands exchanged; a difference stays as it is."""
        return self if self.operator == "-" else self._replace(left=self.right, right=self.left)

    def __str__(self) -> str:
        return f"{self.letter}{self.left}{self.operator}{self.right}"


Facts: TypeAlias = Callable[[Item, random.Random], int]
"""What a solver believes the value of an item to be (0 to 9); may draw from the generator."""


def true_facts(item: Item, rng: random.Random) -> int:
    """The value of the item; the generator is not used."""
    return item.value


@dataclass(frozen=True)
class WrongFacts:
    """Arithmetic in which a fixed set of facts is wrong, always by the same amount.

    Whether a fact is wrong depends on the operator and the operands (in any order for + and *),
    never on the letter, so a model can learn the wrong value by heart.
    """

    fraction: float
    """Share of the arithmetic facts that are wrong, in [0, 1]."""
    probability: float = 1.0
    """Chance that a wrong fact is answered wrongly at one occasion, in [0, 1]."""
    seed: int = 0
    """Chooses which facts are wrong, and by how much."""

    def __call__(self, item: Item, rng: random.Random) -> int:
        """What these facts say at one occasion."""
        offset = self.offset(item)
        return (
            (item.value + offset) % 10 if offset and rng.random() < self.probability else item.value
        )

    def offset(self, item: Item) -> int:
        """How far the fact is off, modulo 10; 0 for a fact that is right."""
        left, right = min(item.left, item.swapped.left), max(item.right, item.swapped.right)
        fact = random.Random(f"facts/{self.seed}/{left}{item.operator}{right}")
        return 1 + int(fact.random() * 9) if fact.random() < self.fraction else 0


def parse_items(prompt: Prompt) -> tuple[Item, ...] | None:
    """The items of a ledger prompt in the order listed; None when it is not a ledger prompt."""
    if not isinstance(prompt.content, str) or _PROMPT.fullmatch(prompt.content) is None:
        return None
    found = _ITEM.findall(prompt.content)
    items = tuple(Item(letter, int(left), op, int(right)) for letter, left, op, right in found)
    return items if len({item.letter for item in items}) == len(items) else None


def solve(
    prompt: Prompt,
    rng: random.Random,
    *,
    order: Literal["random", "listed"] = "random",
    swap: float = 0.5,
    facts: Facts = true_facts,
) -> str:
    """One completion of a ledger prompt, without the end-of-sequence token.

    Args:
        prompt: a ledger prompt.
        rng: generator of the order, of the operand swaps and of whatever `facts` draws.
        order: "random" visits the items in any order, "listed" in the order of the prompt.
        swap: chance of exchanging the operands of a sum or a product.
        facts: the arithmetic; `true_facts` gives a completion that grades as right.

    Returns:
        The completion as text.

    Raises:
        DataError: the prompt is not a ledger prompt.
    """
    items = parse_items(prompt)
    if items is None:
        raise DataError(f"prompt {prompt.id!r} is not a ledger prompt. Use LedgerTask.prompts().")
    visits = shuffled(items, rng) if order == "random" else items
    total = 0
    steps = []
    for item in visits:
        value = facts(item, rng)
        total = (total + value) % 10
        written = item.swapped if rng.random() < swap else item
        steps.append(f"{written}={value}~{total};")
    return "".join(steps) + f"#{total}"


@dataclass(frozen=True)
class LedgerTask:
    """Ledger prompts from a counter, and their graders; see the module for the format.

    Training and held-out prompts cannot collide, whatever the seeds: a hash of the items (in
    sorted order) assigns each set of items to one of the two, one in sixteen to the held-out
    side, and each stream draws again until it has a prompt of its own side.
    """

    num_items: int = 5
    """Items in a prompt, from 1 to 16."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_items <= len(LETTERS):
            raise ConfigError(
                f"data.num_items must be from 1 to {len(LETTERS)}, got {self.num_items}. "
                "The embedded models were trained on 5."
            )

    @property
    def name(self) -> str:
        """Name of the task in configurations, logs and reports."""
        return "ledger"

    def prompts(self, step: int, num_prompts: int, seed: int) -> list[Prompt]:
        """Training prompts of one step: a pure function of (seed, step, position in the list)."""
        return [
            self._prompt(f"ledger{self.num_items}-train-{seed}-{step}-{index}", is_held_out=False)
            for index in range(num_prompts)
        ]

    def held_out(self, num_prompts: int, seed: int = 0) -> list[Prompt]:
        """Evaluation prompts: a pure function of (seed, position), never met in training."""
        return [
            self._prompt(f"ledger{self.num_items}-held_out-{seed}-{index}", is_held_out=True)
            for index in range(num_prompts)
        ]

    def grade(self, prompt: Prompt, text: str, is_truncated: bool = False) -> bool | None:
        """Whether every step of a completion is right, and nothing else was written.

        Args:
            prompt: a ledger prompt with its answer.
            text: the decoded completion without special tokens.
            is_truncated: it was cut off before it ended, and is wrong.

        Returns:
            True or False; None when the prompt is not a ledger prompt or has no answer.
        """
        items = parse_items(prompt)
        if items is None or prompt.answer is None:
            return None
        match = None if is_truncated else _COMPLETION.fullmatch(text)
        if match is None or match["answer"] != prompt.answer:
            return False
        return _final_sum(_STEP.findall(match["steps"]), items) == prompt.answer

    def grade_answer(self, prompt: Prompt, text: str) -> bool | None:
        """Whether the final answer alone is right, however it was reached; None as in `grade`."""
        if parse_items(prompt) is None or prompt.answer is None:
            return None
        return text.partition("#")[2] == prompt.answer

    def _prompt(self, identity: str, is_held_out: bool) -> Prompt:
        rng = random.Random(identity)  # seeding with text hashes it: the same on every machine
        items = _draw_items(rng, self.num_items)
        while _is_held_out(items) != is_held_out:
            items = _draw_items(rng, self.num_items)
        content = "".join(f"{item};" for item in items) + ">"
        return Prompt(identity, content, str(sum(item.value for item in items) % 10))


def _final_sum(steps: list[tuple[str, ...]], items: tuple[Item, ...]) -> str | None:
    """The last running sum as text, or None when a step is wrong, missing or repeated."""
    unvisited = {item.letter: item for item in items}
    total = 0
    for letter, left, operator, right, value, running in steps:
        item = unvisited.pop(letter, None)
        if item is None or f"{letter}{left}{operator}{right}" not in (str(item), str(item.swapped)):
            return None
        total = (total + item.value) % 10
        if (value, running) != (str(item.value), str(total)):
            return None
    return None if unvisited else str(total)


def _draw_items(rng: random.Random, num_items: int) -> tuple[Item, ...]:
    """Items with distinct letters, drawn uniformly."""
    letters = shuffled(tuple(LETTERS), rng)[:num_items]
    return tuple(
        Item(name, below(10, rng), OPERATORS[below(3, rng)], below(10, rng)) for name in letters
    )


def _is_held_out(items: tuple[Item, ...]) -> bool:
    """The side of a set of items; the order in which a prompt lists them does not matter."""
    return is_held_out(" ".join(sorted(map(str, items))))
