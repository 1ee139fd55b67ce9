"""The shopping task: generated cases, and the environment of one conversation about one of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tutelage.data.types import Message, Outcome, Prompt, Turn
from tutelage.envs.environment import Opening, Reply
from tutelage.envs.shopping.cart import Cart
from tutelage.envs.shopping.generate import Case, Size, draw_case
from tutelage.envs.shopping.query import Solution
from tutelage.envs.shopping.scores import score_cart
from tutelage.envs.shopping.tools import make_tools, schemas
from tutelage.envs.shopping.wording import system_text
from tutelage.envs.shopping.world import World
from tutelage.envs.tools import reply_to
from tutelage.errors import ConfigError, DataError

MIN_PRODUCTS = 60
"""Room for the products around the slots of every query."""
_ID = re.compile(r"shopping([123])-(train-\d+-\d+-\d+|held_out-\d+-\d+)")


class ShoppingEnvironment:
    """A shop for one conversation: a cart of its own over a world that is never changed."""

    def __init__(self, find: Callable[[Prompt], tuple[World, Solution]]) -> None:
        self._find = find
        self._started: tuple[Cart, Solution] | None = None

    def start(self, prompt: Prompt, seed: int) -> Opening:
        """Begin with the prompt's world and messages; the seed changes nothing."""
        world, solution = self._find(prompt)
        self._started = (Cart(world), solution)
        return Opening(opening_messages(prompt), schemas())

    def act(self, turn: Turn) -> Reply:
        """Carry out the calls; a turn without calls ends the conversation."""
        return reply_to(make_tools(self.cart.world, self.cart), turn)

    def score(self) -> Outcome:
        """The scores of the cart as it is."""
        return score_cart(self.cart.products, self.cart.coupons, self._state[1])

    @property
    def cart(self) -> Cart:
        """The cart of this conversation."""
        return self._state[0]

    @property
    def _state(self) -> tuple[Cart, Solution]:
        if self._started is None:
            raise DataError("the conversation has not begun. Call start() first.")
        return self._started


def opening_messages(prompt: Prompt) -> tuple[Message, ...]:
    """The messages of a prompt."""
    if isinstance(prompt.content, str):
        raise DataError(f"prompt {prompt.id!r} has no messages. Use the prompts of this task.")
    return prompt.content


def make_prompt(identity: str, system: str, text: str) -> Prompt:
    """A prompt with the tools, a system message and what the user says."""
    messages: tuple[Message, ...] = (
        {"role": "system", "content": system},
        {"role": "user", "content": text},
    )
    return Prompt(identity, messages, tools=schemas())


@dataclass(frozen=True)
class ShoppingTask:
    """Shopping queries over generated catalogues, answered with the benchmark's 15 tools.

    A world and its query are a pure function of the prompt's id and of these parameters. Training
    and held-out prompts cannot collide, whatever the seeds: a hash of what a query asks in words
    assigns it to one of the two, one in sixteen to the held-out side, and each stream draws again
    until it has a query of its own side.
    """

    level: int = 1
    """1: each slot of the query has one product; 2: a budget decides among several; 3: the lowest
    price after the user's coupons does."""
    num_products: int = 150
    """Size of the catalogue, at least 60."""
    max_items: int = 5
    """Products that a query asks for, at most, from 2 to 5; they are at least 2."""

    def __post_init__(self) -> None:
        if self.level not in (1, 2, 3):
            raise ConfigError(f"data.level must be 1, 2 or 3, got {self.level!r}. Choose one.")
        if self.num_products < MIN_PRODUCTS:
            raise ConfigError(
                f"data.num_products must be at least {MIN_PRODUCTS}, got {self.num_products}. "
                "The default is 150."
            )
        if not 2 <= self.max_items <= 5:
            raise ConfigError(
                f"data.max_items must be from 2 to 5, got {self.max_items}. The default is 5."
            )

    @property
    def name(self) -> str:
        """Name of the task in configurations, logs and reports."""
        return "shopping"

    def prompts(self, step: int, num_prompts: int, seed: int) -> list[Prompt]:
        """Training prompts of one step: a pure function of (seed, step, position in the list)."""
        return [self._prompt(f"train-{seed}-{step}-{index}") for index in range(num_prompts)]

    def held_out(self, num_prompts: int, seed: int = 0) -> list[Prompt]:
        """Evaluation prompts: a pure function of (seed, position), never met in training."""
        return [self._prompt(f"held_out-{seed}-{index}") for index in range(num_prompts)]

    def grade(self, prompt: Prompt, text: str, is_truncated: bool = False) -> bool | None:
        """None: the environment's outcome is the grade."""
        return None

    def environment(self) -> ShoppingEnvironment:
        """A new shop."""
        return ShoppingEnvironment(self._find)

    def case(self, prompt: Prompt) -> Case:
        """The world, the structured query and the solution of a prompt.

        Raises:
            DataError: the prompt is not of this task with these parameters.
        """
        match = _ID.fullmatch(prompt.id)
        if match is None or int(match[1]) != self.level:
            raise DataError(
                f"prompt {prompt.id!r} is not a shopping prompt of level {self.level}. "
                "Use ShoppingTask.prompts()."
            )
        case = self._draw(prompt.id)
        if make_prompt(prompt.id, system_text(self.level), case.text).content != prompt.content:
            raise DataError(
                f"prompt {prompt.id!r} does not have the text that these parameters give it. "
                "Use the parameters that it was made with."
            )
        return case

    def _draw(self, identity: str) -> Case:
        size = Size(self.level, self.num_products, self.max_items)
        return draw_case(identity, size, is_held_out="-held_out-" in identity)

    def _prompt(self, name: str) -> Prompt:
        identity = f"shopping{self.level}-{name}"
        return make_prompt(identity, system_text(self.level), self._draw(identity).text)

    def _find(self, prompt: Prompt) -> tuple[World, Solution]:
        case = self.case(prompt)
        return case.world, case.solution
