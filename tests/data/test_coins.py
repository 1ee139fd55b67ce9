"""The coins task: a strict grader, prompt streams that can be repeated, and its solver."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.data.tasks import CoinsTask
from tutelage.data.tasks.coins import (
    AMOUNTS,
    MAX_COINS,
    PIECE,
    VALUES,
    VERBS,
    Purchase,
    parse_purchase,
    payable,
    solve,
    vocabulary,
)
from tutelage.data.types import Prompt
from tutelage.errors import DataError

TASK = CoinsTask()
TEXT = "Ann buys a pen for 29 cents. There are coins of 4, 7 and 9 cents. Which coins pay for it?\n"
PROMPT = Prompt("p", TEXT, "29")
SUM = "Pay 9 + 9 + 7 + 4 = 29."
LEFT = "Pay 9, 20 left, 9, 11 left, 7, 4 left, 4, 0 left."
MINUS = "Pay 29 - 9 = 20 - 9 = 11 - 7 = 4 - 4 = 0."

seeds = st.integers(min_value=0, max_value=10**6)


def payments(amount: int, coins: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Every order of coins that pays the amount, by trying all of every length."""
    lengths = range(1, amount // min(coins) + 1)
    tried = itertools.chain.from_iterable(itertools.product(coins, repeat=n) for n in lengths)
    return {paid for paid in tried if sum(paid) == amount}


def all_right_completions(amount: int, coins: tuple[int, ...]) -> set[str]:
    """Every completion that is right, by enumeration and with no code of the package."""
    texts = set()
    for paid in payments(amount, coins):
        left, minus = [], str(amount)
        for i, coin in enumerate(paid, 1):
            left.append(f"{coin}, {amount - sum(paid[:i])} left")
            minus += f" - {coin} = {amount - sum(paid[:i])}"
        bodies = (f"{' + '.join(map(str, paid))} = {amount}", ", ".join(left), minus)
        texts |= {f"{verb} {body}." for verb in ("Pay", "Give", "Take") for body in bodies}
    return texts


def asked(amount: int, coins: tuple[int, ...]) -> Prompt:
    first, second, third = coins
    offer, purse = f"Ben owes {amount} cents for a bun.", f"{first}, {second} and {third} cents."
    question = "How can Ben pay exactly?\n"
    return Prompt("q", f"{offer} People pay here with coins of {purse} {question}", str(amount))


# The grader


@pytest.mark.parametrize(
    ("amount", "coins"), [(20, (4, 8, 12)), (24, (11, 13, 5)), (23, (7, 9, 8))]
)
def test_grader_accepts_exactly_the_enumerated_completions(
    amount: int, coins: tuple[int, ...]
) -> None:
    right, prompt = all_right_completions(amount, coins), asked(amount, coins)
    assert right
    assert all(TASK.grade(prompt, text) for text in right)
    for text in random.Random(0).sample(sorted(right), k=3):
        cuts = [(text[:i], text[i:]) for i in range(len(text) + 1)]
        swaps = [a + c + b[1:] for a, b in cuts if b for c in "0123456789 +-=,.aT\n"]
        added = [a + c + b for a, b in cuts for c in "0123456789 +-=,.aT\n"]
        for changed in [*swaps, *added, *(a + b[1:] for a, b in cuts if b)]:
            assert TASK.grade(prompt, changed) == (changed in right), changed


@pytest.mark.parametrize("text", [SUM, LEFT, MINUS, SUM.replace("9 + 9 + 7 + 4", "7 + 9 + 4 + 9")])
def test_the_documented_completions_are_right(text: str) -> None:
    assert TASK.grade(PROMPT, text) is True
    assert TASK.grade(PROMPT, text, is_truncated=True) is False


@pytest.mark.parametrize(
    "text",
    [
        "",
        "29",
        "Pay .",
        "Pay 29 = 29.",
        "Pay 9 + 9 + 9 = 29.",
        "Pay 9 + 9 + 9 + 2 = 29.",
        "Pay 9 + 9 + 7 = 25.",
        "Pay 9 + 9 + 9 = 27.",
        "Pay 9 + 9 + 7 + 4 + 0 = 29.",
        "Pay 9 + 9 + 11 = 29.",
        "Pay 09 + 9 + 7 + 4 = 29.",
        "pay 9 + 9 + 7 + 4 = 29.",
        "Pay 9 + 9 + 7 + 4 = 29",
        " Pay 9 + 9 + 7 + 4 = 29.",
        "Pay 9 + 9 + 7 + 4 = 29.\n",
        SUM + SUM,
        f"{SUM} {LEFT}",
        "Pay 9 + 9 + 7 + ٤ = 29.",
        "Pay 9, 20 left, 9, 11 left, 7, 4 left.",
        "Pay 9, 20 left, 9, 10 left, 7, 4 left, 4, 0 left.",
        "Pay 9, 20 left, 9, 11 left, 7, 4 left, 4, 0 left, 0, 0 left.",
        "Pay 9, 20 left, 9, 11 left, 9, 2 left.",
        "Pay 29.",
        "Pay 29 - 9 = 20 - 9 = 11 - 7 = 4.",
        "Pay 29 - 9 = 20 - 9 = 10 - 7 = 4 - 4 = 0.",
        "Pay 29 - 9 = 20, 20 - 9 = 11, 11 - 7 = 4, 4 - 4 = 0.",
        "Pay 20 - 9 = 11 - 7 = 4 - 4 = 0.",
        "Pay 29 - 9 = 20, 9, 11 left, 7, 4 left, 4, 0 left.",
        f"Pay {'9' * 5000} = 29.",  # int() of a text refuses so many digits
        f"Pay 9, {'9' * 5000} left.",
        f"Pay 29 - {'9' * 5000} = 20.",
    ],
)
def test_grader_rejects(text: str) -> None:
    assert TASK.grade(PROMPT, text) is False


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt("no answer", TEXT),
        Prompt("another answer", TEXT, "30"),
        Prompt("chat", ({"role": "user", "content": TEXT},), "29"),
        Prompt("of another task", "e4+7;j7-6;>", "2"),
        Prompt("not asked", TEXT.strip(), "29"),
        Prompt("no coins", "Ann buys a pen for 29 cents. Which coins pay for it?\n", "29"),
        Prompt("no amount", TEXT.replace("29", "some"), "29"),
        Prompt("two amounts", TEXT.replace("a pen for", "a pen for 28 cents or"), "29"),
    ],
    ids=lambda prompt: prompt.id,
)
def test_what_cannot_be_graded_gives_none(prompt: Prompt) -> None:
    assert TASK.grade(prompt, SUM) is None


# The streams of prompts


@given(seed=seeds, step=seeds, count=st.integers(0, 4), more=st.integers(0, 3))
def test_prompts_are_a_pure_function_of_their_counters(
    seed: int, step: int, count: int, more: int
) -> None:
    before = random.getstate()
    prompts = TASK.prompts(step, count + more, seed)
    assert random.getstate() == before
    assert CoinsTask().prompts(step, count, seed) == prompts[:count]
    assert TASK.held_out(count, seed) == TASK.held_out(count + more, seed)[:count]


def test_prompts_stay_as_they_are() -> None:
    training, held_out = TASK.prompts(3, 1, seed=1)[0], TASK.held_out(1)[0]
    assert (training.id, training.answer) == ("coins-train-1-3-0", "40")
    assert training.content == (
        "People pay here with coins of 5, 12 and 13 cents. A book costs 40 cents and Cleo wants "
        "it. How can Cleo pay exactly?\n"
    )
    assert (held_out.id, held_out.answer) == ("coins-held_out-0-0", "30")
    assert held_out.content == (
        "Eva buys a bell for 30 cents. People pay here with coins of 7, 9 and 5 cents. "
        "Which coins make the price?\n"
    )


def test_training_and_held_out_prompts_never_ask_the_same() -> None:
    streams = ([p for step in range(40) for p in TASK.prompts(step, 50, seed=0)],
               TASK.held_out(400))  # fmt: skip
    training, held_out = ({str(parse_purchase(p)) for p in stream} for stream in streams)
    assert not training & held_out
    assert len({p.id for stream in streams for p in stream}) == 2400
    assert len(held_out) > 50


@given(coins=st.permutations(VALUES), amount=st.integers(*AMOUNTS))
def test_the_order_of_the_coins_does_not_change_the_side(coins: list[int], amount: int) -> None:
    assert str(Purchase(amount, tuple(coins[:3]))) == str(
        Purchase(amount, tuple(sorted(coins[:3])))
    )


@given(seed=seeds)
def test_every_prompt_can_be_answered_and_says_what_is_asked(seed: int) -> None:
    prompt = TASK.held_out(1, seed)[0]
    purchase = parse_purchase(prompt)
    assert purchase is not None
    numbers = sorted(map(int, re.findall("[0-9]+", str(prompt.content))))
    assert numbers == sorted([purchase.amount, *purchase.coins])
    assert len(set(purchase.coins)) == 3
    assert set(purchase.coins) <= set(VALUES)
    assert AMOUNTS[0] <= purchase.amount <= min(AMOUNTS[1], MAX_COINS * min(purchase.coins))
    assert purchase.amount in payable(frozenset(purchase.coins))


def test_payable_amounts_are_those_of_an_enumeration() -> None:
    for coins in ((4, 8, 12), (5, 11, 13), (9, 12, 13)):
        tried = {n for n in range(1, 31) if payments(n, coins)}
        assert {n for n in payable(frozenset(coins)) if 0 < n <= 30} == tried


# The solver and the vocabulary


@given(seed=seeds)
def test_the_solver_is_right(seed: int) -> None:
    prompt = TASK.prompts(0, 1, seed)[0]
    assert TASK.grade(prompt, solve(prompt, random.Random(seed))) is True
    assert " left" in solve(prompt, random.Random(seed), styles=("left",))


def test_the_solver_writes_every_right_completion() -> None:
    rng = random.Random(0)
    written = {solve(asked(24, (11, 13, 5)), rng) for _ in range(300)}
    assert written == all_right_completions(24, (11, 13, 5))


def test_coins_that_do_not_lead_to_a_dead_end_are_drawn_evenly() -> None:
    # 29 by 4, 7 and 9: none of 20, 22 and 25 is a dead end, but 2 and 3 are.
    rng = random.Random(0)
    firsts = Counter(solve(PROMPT, rng, styles=("sum",)).split()[1] for _ in range(1500))
    assert firsts.keys() == {"4", "7", "9"}
    assert max(abs(count - 500) for count in firsts.values()) < 80


def test_solving_what_has_no_answer_is_one_clear_line() -> None:
    for prompt in (Prompt("x", "hello\n", "1"), asked(6, (4, 7, 9))):
        with pytest.raises(
            DataError, match=r"^prompt '[xq]' is not a prompt of the coins task[^\n]+$"
        ):
            solve(prompt, random.Random(0))


def test_prompts_and_completions_are_written_with_the_vocabulary_and_all_of_it() -> None:
    rng, met = random.Random(0), set()
    for prompt in (p for step in range(10) for p in TASK.prompts(step, 50, seed=0)):
        text = f"{prompt.content}{solve(prompt, rng)}"
        pieces = re.findall(PIECE, text)
        assert "".join(pieces) == text
        met |= set(pieces)
    words = vocabulary()
    assert len(set(words)) == len(words) < 150
    assert met <= set(words)
    assert {word for word in words if not word.strip().isdigit()} <= met
    assert VERBS == ("Pay", "Give", "Take")
