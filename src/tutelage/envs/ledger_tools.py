"""The ledger by tool calls: totals of numbers that tools return, every call graded.

Every prompt has a ledger of its own, which the model does not see: a price and a stock for each of
the letters a to p, whole numbers of two digits. The user asks for the total of some of them:
``Total: price e, stock k, price a``. The model looks each one up in the right book, in any order
and also several in one turn, adds the answers two at a time by `calculate`, in any order too, and
ends with the total alone:

    [{"name":"look_up_price","arguments":{"item":"a"}},{"name":"look_up_price",...}]  ->  42, 17
    {"name":"look_up_stock","arguments":{"item":"k"}}                                 ->  88
    {"name":"calculate","arguments":{"expression":"17+88"}}                           ->  105
    {"name":"calculate","arguments":{"expression":"42+105"}}                          ->  147
    147
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from pydantic import Field

from tutelage.data.tasks.draws import below, is_held_out, shuffled
from tutelage.data.types import Outcome, Prompt, Turn
from tutelage.envs.environment import Environment, Opening, Reply
from tutelage.envs.tools import Arguments, Tool, ToolError, reply_to
from tutelage.errors import ConfigError, DataError

LETTERS = "abcdefghijklmnop"
BOOKS = ("price", "stock")
MISTAKES = (
    *("wrong_tool", "superfluous", "repeated"),
    *("wrong_value", "ignored_answer", "malformed", "missing"),
)
"""What is counted besides right calls; see `LedgerToolsEnvironment.score`."""

_SMALLEST, _NUM_VALUES = 10, 90  # the numbers of two digits
_ASKED = re.compile(r"(price|stock) ([a-p])")
_PROMPT = re.compile(rf"Total: {_ASKED.pattern}(?:, {_ASKED.pattern})*")
_NUMBER = r"(0|[1-9][0-9]{0,5})"
_SUM = re.compile(rf"{_NUMBER}\+{_NUMBER}")


class Asked(NamedTuple):
    """One number that the user asks for."""

    book: str
    """ "price" or "stock"."""
    letter: str

    def __str__(self) -> str:
        return f"{self.book} {self.letter}"


def parse_asked(prompt: Prompt) -> tuple[Asked, ...] | None:
    """What a prompt asks for, in its order; None when it is not a prompt of this task."""
    if isinstance(prompt.content, str) or len(prompt.content) != 1:
        return None
    content = prompt.content[0].get("content", "")
    if _PROMPT.fullmatch(content) is None:
        return None
    asked = tuple(Asked(*found) for found in _ASKED.findall(content))
    return asked if len({one.letter for one in asked}) == len(asked) else None


def ledger_of(identity: str) -> dict[Asked, int]:
    """The ledger of the prompt with this id: price and stock of a letter are never the same."""
    rng = random.Random(f"{identity}/ledger")
    ledger = {}
    for letter in LETTERS:
        price = below(_NUM_VALUES, rng)
        stock = (price + 1 + below(_NUM_VALUES - 1, rng)) % _NUM_VALUES
        ledger[Asked("price", letter)] = _SMALLEST + price
        ledger[Asked("stock", letter)] = _SMALLEST + stock
    return ledger


@dataclass(frozen=True)
class LedgerToolsTask:
    """Prompts from a counter, and environments for them; see the module.

    Training and held-out prompts cannot collide, whatever the seeds: a hash of what is asked (in
    sorted order) assigns each question to one of the two, one in sixteen to the held-out side.
    """

    num_items: int = 3
    """Numbers that a prompt asks for, from 2 to 16."""

    def __post_init__(self) -> None:
        if not 2 <= self.num_items <= len(LETTERS):
            raise ConfigError(
                f"data.num_items must be from 2 to {len(LETTERS)}, got {self.num_items}. "
                "The embedded models were trained on 3."
            )

    @property
    def name(self) -> str:
        """Name of the task in configurations, logs and reports."""
        return "ledger_tools"

    def prompts(self, step: int, num_prompts: int, seed: int) -> list[Prompt]:
        """Training prompts of one step: a pure function of (seed, step, position in the list)."""
        return [self._prompt(f"train-{seed}-{step}-{i}", False) for i in range(num_prompts)]

    def held_out(self, num_prompts: int, seed: int = 0) -> list[Prompt]:
        """Evaluation prompts: a pure function of (seed, position), never met in training."""
        return [self._prompt(f"held_out-{seed}-{i}", True) for i in range(num_prompts)]

    def grade(self, prompt: Prompt, text: str, is_truncated: bool = False) -> bool | None:
        """Whether a final answer is right, however it was reached.

        Args:
            prompt: a prompt of this task with its answer.
            text: the decoded last turn without special tokens.
            is_truncated: it was cut off before it ended, and is wrong.

        Returns:
            True or False; None when it is not a prompt of this task or has no answer.
        """
        if parse_asked(prompt) is None or prompt.answer is None:
            return None
        return not is_truncated and text.strip() == prompt.answer

    def environment(self) -> Environment:
        """A new environment, for one conversation."""
        return LedgerToolsEnvironment()

    def _prompt(self, tail: str, is_held_out: bool) -> Prompt:
        identity = f"ledger_tools{self.num_items}-{tail}"
        rng = random.Random(identity)  # seeding with text hashes it: the same on every machine
        asked = _draw_asked(rng, self.num_items)
        while _is_held_out(asked) != is_held_out:
            asked = _draw_asked(rng, self.num_items)
        ledger = ledger_of(identity)
        content = f"Total: {', '.join(map(str, asked))}"
        total = sum(ledger[one] for one in asked)
        return Prompt(identity, ({"role": "user", "content": content},), str(total))


def _draw_asked(rng: random.Random, num_items: int) -> tuple[Asked, ...]:
    """Questions with distinct letters, drawn uniformly."""
    letters = shuffled(LETTERS, rng)[:num_items]
    return tuple(Asked(BOOKS[below(2, rng)], letter) for letter in letters)


def _is_held_out(asked: tuple[Asked, ...]) -> bool:
    """The side of a question; the order in which a prompt asks does not matter."""
    return is_held_out(", ".join(sorted(map(str, asked))))


class _LookUp(Arguments):
    item: str = Field(description="Letter of the item, a to p.")


class _Calculate(Arguments):
    expression: str = Field(description="Sum of two whole numbers, such as 42+17.")


class LedgerToolsEnvironment:
    """One conversation about the ledger of a prompt, with the judgement of every call."""

    def __init__(self) -> None:
        self._ledger: dict[Asked, int] = {}
        self._grading = _Grading(())
        self._tools = (
            Tool("look_up_price", "Price of an item.", _LookUp, self._look_up("price")),
            Tool("look_up_stock", "Stock of an item.", _LookUp, self._look_up("stock")),
            Tool("calculate", "Adds two numbers.", _Calculate, self._calculate),
        )

    def start(self, prompt: Prompt, seed: int) -> Opening:
        """Open the ledger of a prompt; it is the same for every seed.

        Raises:
            DataError: it is not a prompt of this task.
        """
        asked = parse_asked(prompt)
        if asked is None or isinstance(prompt.content, str):
            raise DataError(
                f"prompt {prompt.id!r} is not a prompt of ledger_tools. "
                "Use LedgerToolsTask.prompts()."
            )
        self._ledger = ledger_of(prompt.id)
        self._grading = _Grading(asked, sum(self._ledger[one] for one in asked))
        return Opening(prompt.content, tuple(tool.schema for tool in self._tools))

    def act(self, turn: Turn) -> Reply:
        """Carry out and judge the calls of a turn; one without calls is the final answer."""
        reply = reply_to(self._tools, turn)
        self._grading.end_turn(len(turn.calls), reply.num_errors)
        if reply.is_done:
            self._grading.judge_answer(turn.text.strip())
        return reply

    def score(self) -> Outcome:
        """The share of what was done that is right, and success if all is and nothing is missing.

        With n numbers asked for there are n look-ups and n - 1 sums to do. The score is (right
        calls + right final answer) / (calls made, or calls to do if these are more, + 1). A call is
        right if it is a look-up of something asked for that was not looked up before, or a sum of
        two answers that right calls gave in earlier turns, each of them used once.

        The details count the others: `wrong_tool` (a letter asked for, in the other book),
        `superfluous` (a letter not asked for), `repeated` (the same call again), `wrong_value` (a
        sum with the answer of a call that was not right), `ignored_answer` (a sum with, or a final
        answer of, a number that no earlier answer gave or that was used already), `malformed`
        (answered with an error), and `missing`, calls to do that were not made; `answer_only` is
        1.0 if the final answer is right, however it was reached.
        """
        return self._grading.outcome()

    def _look_up(self, book: str) -> Callable[[_LookUp], int]:
        def run(arguments: _LookUp) -> int:
            one = Asked(book, arguments.item)
            if one not in self._ledger:
                raise ToolError(f"there is no item {arguments.item!r}; the items are a to p")
            self._grading.judge_look_up(one, self._ledger[one])
            return self._ledger[one]

        return run

    def _calculate(self, arguments: _Calculate) -> int:
        found = _SUM.fullmatch(arguments.expression)
        if found is None:
            raise ToolError(
                "expression must be two whole numbers with + between them, such as 42+17; "
                f"got {arguments.expression!r}"
            )
        left, right = int(found[1]), int(found[2])
        self._grading.judge_sum(left, right)
        return left + right


@dataclass
class _Grading:
    """What was done in one conversation, and what of it was right."""

    asked: tuple[Asked, ...]
    total: int = 0
    num_calls: int = 0
    num_right: int = 0
    mistakes: Counter[str] = field(default_factory=Counter)
    is_answered: bool = False
    """Whether the final answer is right."""
    made: set[Asked | tuple[int, int]] = field(default_factory=set)
    """Look-ups, and sums with the smaller number first, that were made."""
    right: Counter[int] = field(default_factory=Counter)
    """Answers of right calls that were not used yet."""
    other: Counter[int] = field(default_factory=Counter)
    """Answers of other calls that were not used yet."""
    fresh: list[tuple[Counter[int], int]] = field(default_factory=list)
    """Answers of this turn, which its own calls cannot use."""

    def judge_look_up(self, one: Asked, value: int) -> None:
        is_right = one in self.asked and one not in self.made
        if is_right:
            self.num_right += 1
        elif one in self.made:
            self.mistakes["repeated"] += 1
        elif any(one.letter == asked.letter for asked in self.asked):
            self.mistakes["wrong_tool"] += 1
        else:
            self.mistakes["superfluous"] += 1
        self.made.add(one)
        self.fresh.append((self.right if is_right else self.other, value))

    def judge_sum(self, left: int, right: int) -> None:
        used, pair = Counter((left, right)), (min(left, right), max(left, right))
        is_right = used <= self.right
        if is_right:
            self.num_right += 1
        elif used <= self.right + self.other:
            self.mistakes["wrong_value"] += 1
        elif pair in self.made:
            self.mistakes["repeated"] += 1
        else:
            self.mistakes["ignored_answer"] += 1
        self.made.add(pair)
        self.fresh.append((self.right if is_right else self.other, left + right))
        from_right = used & self.right
        self.right -= from_right
        self.other -= used - from_right

    def end_turn(self, num_calls: int, num_errors: int) -> None:
        self.num_calls += num_calls
        self.mistakes["malformed"] += num_errors
        for values, value in self.fresh:
            values[value] += 1
        self.fresh.clear()

    def judge_answer(self, answer: str) -> None:
        known = map(str, self.right + self.other)
        self.mistakes["ignored_answer"] += answer not in known
        self.is_answered = answer == str(self.total)

    def outcome(self) -> Outcome:
        num_to_do = 2 * len(self.asked) - 1
        missing = num_to_do - self.num_right
        counts = self.mistakes | Counter(missing=missing)
        details: dict[str, float | int | str] = {name: counts[name] for name in MISTAKES}
        details |= {"num_calls": self.num_calls, "answer_only": float(self.is_answered)}
        done = self.num_right + self.is_answered
        score = done / (max(self.num_calls, num_to_do) + 1)
        return Outcome(score, score == 1, details)
