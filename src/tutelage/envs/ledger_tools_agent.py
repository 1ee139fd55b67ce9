"""A scripted agent for the ledger by tool calls, which may make a fixed set of mistakes."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tutelage.data.tasks.draws import below, shuffled
from tutelage.data.types import Prompt, ToolCall, Turn
from tutelage.envs.ledger_tools import BOOKS, Asked, parse_asked
from tutelage.errors import DataError


@dataclass(frozen=True)
class Mistakes:
    """A fixed set of mistakes, always the same ones, which a model can learn by heart.

    A letter of a book may be looked up in the other book. An answer of `calculate` may be replaced
    with a number of another last digit, by the last digits of the operands in any order.
    """

    tools: float = 0.0
    """Share of the entries of the books that are looked up in the other book, in [0, 1]."""
    sums: float = 0.0
    """Share of the sums whose answer is replaced, in [0, 1]."""
    probability: float = 1.0
    """Chance of making such a mistake at one occasion, in [0, 1]."""
    seed: int = 0
    """Chooses which numbers and sums they are made at."""

    def book(self, one: Asked, rng: random.Random) -> str:
        """The book in which a letter is looked up at one occasion."""
        fact = random.Random(f"tools/{self.seed}/{one}")
        is_wrong = fact.random() < self.tools and rng.random() < self.probability
        return BOOKS[1 - BOOKS.index(one.book)] if is_wrong else one.book

    def total(self, left: int, right: int, rng: random.Random) -> int:
        """What the answer to left + right is taken for at one occasion."""
        answer = left + right
        low, high = sorted((left % 10, right % 10))
        fact = random.Random(f"sums/{self.seed}/{low}+{high}")
        offset = 1 + below(9, fact) if fact.random() < self.sums else 0
        if not offset or rng.random() >= self.probability:
            return answer
        return answer - answer % 10 + (answer + offset) % 10


NO_MISTAKES = Mistakes()


class Piece(NamedTuple):
    """A part of the text of a turn."""

    text: str
    is_mistake: bool = False


@dataclass(frozen=True)
class ScriptedTurn:
    """A turn of the scripted agent, as pieces of text."""

    pieces: tuple[Piece, ...]

    @property
    def turn(self) -> Turn:
        """The turn with its calls."""
        text = "".join(piece.text for piece in self.pieces)
        found = json.loads(text)
        if isinstance(found, int):
            return Turn(text)
        calls = found if isinstance(found, list) else [found]
        return Turn(text, tuple(ToolCall(call["name"], call["arguments"]) for call in calls))


class ScriptedAgent:
    """Answers one prompt, turn by turn.

    It looks up in the order of the prompt, or else in the reverse order, one to all of what is left
    in a turn; then it adds any two numbers, in any order, until one is left.
    """

    def __init__(
        self,
        prompt: Prompt,
        rng: random.Random,
        mistakes: Mistakes = NO_MISTAKES,
        reverse: float = 0.5,
    ) -> None:
        """A new conversation; without mistakes it ends in success.

        Args:
            prompt: what is asked.
            rng: generator of the order, of the turns and of mistakes.
            mistakes: the mistakes it makes.
            reverse: chance of looking up in the reverse order.

        Raises:
            DataError: the prompt is not one of the task.
        """
        asked = parse_asked(prompt)
        if asked is None:
            raise DataError(f"prompt {prompt.id!r} is not a prompt of ledger_tools.")
        self._to_look_up = list(asked if rng.random() < 1 - reverse else asked[::-1])
        self._values: list[tuple[Piece, ...]] = []  # numbers that still have to be added
        self._sum: tuple[int, int] | None = None  # that the last turn asked for
        self._rng, self._mistakes = rng, mistakes

    def act(self, answers: Sequence[str]) -> ScriptedTurn:
        """The next turn, given the answers to the calls of the last one."""
        self._note(answers)
        if self._to_look_up:
            return ScriptedTurn(self._look_ups())
        if len(self._values) > 1:
            return ScriptedTurn(self._calculation())
        return ScriptedTurn(self._values[0])

    def _note(self, answers: Sequence[str]) -> None:
        if self._sum is None:
            self._values += [(Piece(answer),) for answer in answers]
            return
        taken = str(self._mistakes.total(*self._sum, self._rng))
        is_mistake = [taken] != list(answers)
        self._values.append((Piece(taken[:-1]), Piece(taken[-1], is_mistake)))
        self._sum = None

    def _look_ups(self) -> tuple[Piece, ...]:
        size = 1 + below(len(self._to_look_up), self._rng)
        now, self._to_look_up = self._to_look_up[:size], self._to_look_up[size:]
        pieces = []
        for one in now:
            book = self._mistakes.book(one, self._rng)
            name = Piece(f"look_up_{book}", is_mistake=book != one.book)
            arguments = Piece(f'","arguments":{{"item":"{one.letter}"}}}}')
            pieces += [Piece(","), Piece('{"name":"'), name, arguments]
        pieces = pieces[1:]
        return tuple(pieces if size == 1 else [Piece("["), *pieces, Piece("]")])

    def _calculation(self) -> tuple[Piece, ...]:
        left, right, *self._values = shuffled(self._values, self._rng)
        self._sum = _number(left), _number(right)
        head, tail = '{"name":"calculate","arguments":{"expression":"', '"}}'
        return (Piece(head), *left, Piece("+"), *right, Piece(tail))


def _number(pieces: tuple[Piece, ...]) -> int:
    return int("".join(piece.text for piece in pieces))
