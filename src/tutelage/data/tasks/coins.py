"""The coins task: pay an amount exactly with coins of three values, asked in plain sentences.

A prompt states an amount and the coins' values: ``Ann buys a pen for 29 cents. There are coins of
4, 7 and 9 cents. Which coins pay for it?`` and a line break. A completion names coins in any order,
each as often as it likes, in one of three styles: ``Pay 9 + 9 + 7 + 4 = 29.``, ``Pay 9, 20 left,
9, 11 left, 7, 4 left, 4, 0 left.`` or ``Pay 29 - 9 = 20 - 9 = 11 - 7 = 4 - 4 = 0.``. It is right
if all that it says is true and the amount is paid. Many amounts have dead ends: after 9 + 9 + 9 of
29 cents the rest cannot be paid.
"""

from __future__ import annotations

import functools
import random
import re
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeAlias, get_args

from tutelage.data.tasks.draws import below, between, is_held_out, pick, shuffled
from tutelage.data.types import Prompt
from tutelage.errors import DataError

VALUES = (4, 5, 7, 8, 9, 11, 12, 13)
"""What coins may be worth, in cents."""
AMOUNTS = (20, 60)
"""The least and the largest amount of a prompt."""
MAX_COINS = 8
"""No payment of a prompt's amount has more coins."""

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo")
THINGS = ("pen", "bun", "map", "ball", "kite", "lamp", "book", "bell")
OFFERS = (
    "{name} buys a {thing} for {amount} cents.",
    "{name} owes {amount} cents for a {thing}.",
    "A {thing} costs {amount} cents and {name} wants it.",
    "The price of the {thing} that {name} chose is {amount} cents.",
)
PURSES = (
    "There are coins of {coins} cents.",
    "The purse holds many coins of {coins} cents.",
    "People pay here with coins of {coins} cents.",
)
QUESTIONS = (
    "Which coins pay for it?",
    "How can {name} pay exactly?",
    "What does {name} hand over?",
    "Which coins make the price?",
)
VERBS = ("Pay", "Give", "Take")
PIECE = r" ?[A-Za-z]+| ?[0-9]+| ?[^A-Za-z0-9\s]|\s"
"""Words, numbers and signs, each with the space before it."""

Style: TypeAlias = Literal["sum", "left", "minus"]
STYLES: tuple[Style, ...] = get_args(Style)

_COINS = re.compile(r" coins of ([0-9]+), ([0-9]+) and ([0-9]+) cents[ .]")
_AMOUNT = re.compile(r" ([0-9]+) cents[ .]")
_VERB = rf"(?:{'|'.join(VERBS)}) "
_NUMBER = "[0-9]{1,9}"  # int() refuses thousands of digits, which no right completion has
_SUM = re.compile(rf"{_VERB}({_NUMBER}(?: \+ {_NUMBER})*) = {_NUMBER}\.")
_LEFT = re.compile(rf"{_VERB}({_NUMBER}, {_NUMBER} left(?:, {_NUMBER}, {_NUMBER} left)*)\.")
_MINUS = re.compile(rf"{_VERB}{_NUMBER}((?: - {_NUMBER} = {_NUMBER})+)\.")


@dataclass(frozen=True)
class Purchase:
    """What a prompt asks: an amount and the values of the coins, of which there are enough."""

    amount: int
    coins: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.amount} by {' '.join(map(str, sorted(self.coins)))}"


def vocabulary() -> tuple[str, ...]:
    """Every piece that prompts and completions are written with, in a fixed order."""
    facts = (*OFFERS, *PURSES)  # which stand first or second
    sentences = (*facts, *(f" {text}" for text in (*facts, *QUESTIONS)))
    words = [
        text.format(name=name, thing=thing, amount=0, coins="0, 0 and 0")
        for text in sentences
        for name, thing in zip(NAMES, THINGS, strict=True)
    ]
    numbers = [f" {number}" for number in range(AMOUNTS[1] + 1)]
    texts = [*words, *VERBS, *numbers, " left, + - =.\n"]
    found = [piece for text in texts for piece in re.findall(PIECE, text)]
    return tuple(dict.fromkeys(found))


def parse_purchase(prompt: Prompt) -> Purchase | None:
    """What a prompt asks; None when it is not a prompt of the coins task."""
    if not isinstance(prompt.content, str) or not prompt.content.endswith("\n"):
        return None
    coins = _COINS.findall(prompt.content)
    amounts = _AMOUNT.findall(_COINS.sub(" ", prompt.content))
    if len(coins) != 1 or len(amounts) != 1 or amounts[0] != prompt.answer:
        return None
    return Purchase(int(amounts[0]), tuple(map(int, coins[0])))


@functools.cache
def payable(coins: frozenset[int]) -> frozenset[int]:
    """The amounts up to the largest of a prompt that coins of these values make, 0 among them."""
    found = {0}
    for amount in range(1, AMOUNTS[1] + 1):
        if any(amount - coin in found for coin in coins):
            found.add(amount)
    return frozenset(found)


def solve(prompt: Prompt, rng: random.Random, *, styles: tuple[Style, ...] = STYLES) -> str:
    """One right completion of a prompt, without the end-of-sequence token.

    Every coin is drawn evenly from those after which the rest can still be paid; the style and
    the first word are drawn evenly.

    Raises:
        DataError: the prompt is not one of the coins task, or its amount cannot be paid.
    """
    purchase = parse_purchase(prompt)
    if purchase is None or purchase.amount not in payable(frozenset(purchase.coins)):
        raise DataError(
            f"prompt {prompt.id!r} is not a prompt of the coins task that can be answered. "
            "Use CoinsTask.prompts()."
        )
    later = payable(frozenset(purchase.coins))
    paid: list[int] = []
    while rest := purchase.amount - sum(paid):
        paid.append(pick([coin for coin in sorted(purchase.coins) if rest - coin in later], rng))
    return completion(paid, purchase.amount, rng, styles)


def completion(
    paid: list[int], amount: int, rng: random.Random, styles: tuple[Style, ...] = STYLES
) -> str:
    """The whole text that names these coins; the first word and then the style drawn evenly."""
    return f"{pick(VERBS, rng)} {written(paid, amount, pick(styles, rng))}."


def written(paid: list[int], amount: int, style: Style) -> str:
    """A completion's text between its first word and the full stop."""
    steps = [(coin, amount - total) for coin, total in zip(paid, accumulate(paid), strict=True)]
    match style:
        case "sum":
            return f"{' + '.join(map(str, paid))} = {amount}"
        case "left":
            return ", ".join(f"{coin}, {rest} left" for coin, rest in steps)
        case _:
            return f"{amount}" + "".join(f" - {coin} = {rest}" for coin, rest in steps)


@dataclass(frozen=True)
class CoinsTask:
    """Prompts of the coins task from a counter, and their grader; see the module for the format.

    Training and held-out prompts never ask the same, whatever the seeds and the sentences: a hash
    of the amount and the set of coins assigns each purchase to one of the two, one in sixteen to
    the held-out side, and each stream draws again until it has a prompt of its own side.
    """

    @property
    def name(self) -> str:
        """Name of the task in configurations, logs and reports."""
        return "coins"

    def prompts(self, step: int, num_prompts: int, seed: int) -> list[Prompt]:
        """Training prompts of one step: a pure function of (seed, step, position in the list)."""
        return [
            _prompt(f"coins-train-{seed}-{step}-{index}", on_held_out_side=False)
            for index in range(num_prompts)
        ]

    def held_out(self, num_prompts: int, seed: int = 0) -> list[Prompt]:
        """Evaluation prompts: a pure function of (seed, position), never met in training."""
        return [
            _prompt(f"coins-held_out-{seed}-{index}", on_held_out_side=True)
            for index in range(num_prompts)
        ]

    def grade(self, prompt: Prompt, text: str, is_truncated: bool = False) -> bool | None:
        """Whether a completion pays the amount, all that it says is true, and nothing else stands.

        Args:
            prompt: a prompt of the coins task with its answer, the amount.
            text: the decoded completion without special tokens.
            is_truncated: it was cut off before it ended, and is wrong.

        Returns:
            True or False; None when the prompt is not one of the coins task.
        """
        purchase = parse_purchase(prompt)
        if purchase is None:
            return None
        said = None if is_truncated else _said(text)
        if said is None:
            return False
        paid, style = said
        is_allowed = set(paid) <= set(purchase.coins) and sum(paid) == purchase.amount
        return is_allowed and text.partition(" ")[2] == f"{written(paid, purchase.amount, style)}."


def _said(text: str) -> tuple[list[int], Style] | None:
    """The coins that a completion names and its style; None for a text in none of the styles."""
    if found := _SUM.fullmatch(text):
        return [int(coin) for coin in found[1].split(" + ")], "sum"
    if found := _LEFT.fullmatch(text):
        return [int(coin) for coin in found[1].split(", ")[::2]], "left"
    if found := _MINUS.fullmatch(text):
        return [int(coin) for coin in found[1].split(" ")[2::4]], "minus"
    return None


def _prompt(identity: str, on_held_out_side: bool) -> Prompt:
    rng = random.Random(identity)  # seeding with text hashes it: the same on every machine
    purchase = _draw_purchase(rng)
    while is_held_out(str(purchase)) != on_held_out_side:
        purchase = _draw_purchase(rng)
    first, second, third = map(str, purchase.coins)
    words = {"name": pick(NAMES, rng), "thing": pick(THINGS, rng), "amount": purchase.amount}
    facts = (pick(OFFERS, rng), pick(PURSES, rng))
    if below(2, rng):
        facts = facts[::-1]
    text = " ".join([*facts, pick(QUESTIONS, rng)])
    content = text.format(**words, coins=f"{first}, {second} and {third}") + "\n"
    return Prompt(identity, content, str(purchase.amount))


def _draw_purchase(rng: random.Random) -> Purchase:
    """Three coins and an amount that they pay, drawn evenly among those that can be asked."""
    while True:
        purchase = Purchase(between(*AMOUNTS, rng), shuffled(VALUES, rng)[:3])
        is_short = purchase.amount <= MAX_COINS * min(purchase.coins)
        if is_short and purchase.amount in payable(frozenset(purchase.coins)):
            return purchase
