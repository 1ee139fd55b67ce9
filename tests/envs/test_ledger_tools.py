"""The ledger by tool calls: what it asks, what it answers, and how it judges every call."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.data.types import Outcome, Prompt, ToolCall, Turn
from tutelage.envs.environment import AgentTask, Environment
from tutelage.envs.ledger_tools import (
    LETTERS,
    MISTAKES,
    Asked,
    LedgerToolsTask,
    ledger_of,
    parse_asked,
)
from tutelage.envs.ledger_tools_agent import NO_MISTAKES, Mistakes, ScriptedAgent
from tutelage.errors import ConfigError, DataError

TASK = LedgerToolsTask()
PROMPT = TASK.prompts(0, 1, 0)[0]
ASKED = parse_asked(PROMPT) or ()
LEDGER = ledger_of(PROMPT.id)
VALUES = [LEDGER[one] for one in ASKED]
NOT_ASKED = next(letter for letter in LETTERS if all(letter != one.letter for one in ASKED))


def look_up(one: Asked) -> ToolCall:
    return ToolCall(f"look_up_{one.book}", {"item": one.letter})


def add(left: int, right: int) -> ToolCall:
    return ToolCall("calculate", {"expression": f"{left}+{right}"})


LOOK_UPS = [look_up(one) for one in ASKED]
A, B, C = VALUES
SUMS = [[add(A, B)], [add(C, A + B)]]
TOTAL = str(A + B + C)


def play(turns: Sequence[Sequence[ToolCall]], answer: str | None = TOTAL) -> Outcome:
    """The outcome of turns of calls and a final answer; None for a conversation cut short."""
    environment = opened(PROMPT)
    for calls in turns:
        reply = environment.act(Turn("", tuple(calls)))
        assert not reply.is_done
        assert len(reply.messages) == len(calls)
    if answer is not None:
        assert environment.act(Turn(answer)).is_done
    return environment.score()


def opened(prompt: Prompt, seed: int = 0) -> Environment:
    environment = TASK.environment()
    environment.start(prompt, seed)
    return environment


def mistakes(outcome: Outcome) -> dict[str, float | int | str]:
    return {name: outcome.details[name] for name in MISTAKES if outcome.details[name]}


def converse(
    prompt: Prompt, rng: random.Random, mistakes: Mistakes = NO_MISTAKES
) -> tuple[list[str], Outcome]:
    """The texts of the scripted agent's turns, and their outcome."""
    environment, agent = opened(prompt), ScriptedAgent(prompt, rng, mistakes)
    texts: list[str] = []
    answers: list[str] = []
    while True:
        turn = agent.act(answers).turn
        texts.append(turn.text)
        reply = environment.act(turn)
        if reply.is_done:
            return texts, environment.score()
        answers = [message["content"] for message in reply.messages]


# The scripted agent


def test_the_scripted_agent_solves_a_thousand_prompts_in_many_ways() -> None:
    rng = random.Random(0)
    prompts = TASK.prompts(3, 500, seed=1) + TASK.held_out(500, seed=1)
    forms = set()
    for prompt in prompts:
        texts, outcome = converse(prompt, rng)
        assert outcome.is_success
        assert outcome.score == 1
        assert outcome.details == dict.fromkeys(MISTAKES, 0) | {"num_calls": 5, "answer_only": 1.0}
        assert type(outcome.details["answer_only"]) is float  # a share, not a count
        assert TASK.grade(prompt, texts[-1])
        forms.add(tuple(text.count("name") for text in texts))
    assert forms == {(3, 1, 1, 0), (2, 1, 1, 1, 0), (1, 2, 1, 1, 0), (1, 1, 1, 1, 1, 0)}


@pytest.mark.parametrize("num_items", [2, 5, 16])
def test_it_solves_prompts_of_any_number_of_items(num_items: int) -> None:
    for prompt in LedgerToolsTask(num_items).held_out(5):
        assert converse(prompt, random.Random(1))[1].score == 1


def test_its_wrong_beliefs_are_caught_each_by_its_name() -> None:
    rng = random.Random(2)
    for mistakes, name in (
        (Mistakes(tools=1.0), "wrong_tool"),
        (Mistakes(sums=1.0), "ignored_answer"),
    ):
        outcomes = [converse(prompt, rng, mistakes)[1] for prompt in TASK.held_out(50)]
        assert not any(outcome.is_success for outcome in outcomes)
        assert all(outcome.details[name] for outcome in outcomes)


def test_wrong_beliefs_are_a_fixed_set_of_about_that_share() -> None:
    mistakes = Mistakes(tools=0.25, sums=0.25)
    rng = random.Random(3)
    wrong = {
        (one, mistakes.book(one, rng))
        for one in LEDGER
        for _ in range(3)
        if mistakes.book(one, rng) != one.book
    }
    assert 2 <= len(wrong) <= 16
    pairs = [(a, b) for a in range(10, 20) for b in range(10, 20)]
    changed = {p: mistakes.total(*p, rng) for p in pairs if mistakes.total(*p, rng) != sum(p)}
    assert 10 <= len(changed) <= 50
    assert all(changed[b, a] == total for (a, b), total in changed.items())
    assert all(abs(total - sum(p)) < 10 for p, total in changed.items())


# Judgement


@pytest.mark.parametrize(
    "turns",
    [
        [[call] for call in LOOK_UPS] + SUMS,
        [LOOK_UPS, *SUMS],
        [LOOK_UPS[::-1], [add(C, B)], [add(B + C, A)]],
        [LOOK_UPS[:2], SUMS[0], LOOK_UPS[2:], SUMS[1]],
        [LOOK_UPS[:2], [*SUMS[0], LOOK_UPS[2]], SUMS[1]],
    ],
)
def test_any_order_of_the_right_calls_is_a_success(turns: list[list[ToolCall]]) -> None:
    outcome = play(turns)
    assert outcome.is_success
    assert outcome.score == 1


OTHER_BOOK = Asked("stock" if ASKED[2].book == "price" else "price", ASKED[2].letter)
W = LEDGER[OTHER_BOOK]
WRONG_TOOL = [LOOK_UPS[0], LOOK_UPS[1], look_up(OTHER_BOOK)]
SPARE = look_up(Asked("price", NOT_ASKED))
S = LEDGER[Asked("price", NOT_ASKED)]


@pytest.mark.parametrize(
    ("turns", "answer", "found", "score"),
    [
        ([], TOTAL, {"ignored_answer": 1, "missing": 5}, 1 / 6),
        ([], "", {"ignored_answer": 1, "missing": 5}, 0),
        ([LOOK_UPS], TOTAL, {"ignored_answer": 1, "missing": 2}, 4 / 6),
        ([LOOK_UPS, SUMS[0]], TOTAL, {"ignored_answer": 1, "missing": 1}, 5 / 6),
        ([LOOK_UPS, *SUMS], str(A + B + C + 1), {"ignored_answer": 1}, 5 / 6),
        ([LOOK_UPS, *SUMS], f"The total is {TOTAL}", {"ignored_answer": 1}, 5 / 6),
        ([LOOK_UPS, *SUMS], None, {}, 5 / 6),
        ([WRONG_TOOL, [add(A, B)], [add(W, A + B)]], str(A + B + W),
         {"wrong_tool": 1, "wrong_value": 1, "missing": 2}, 3 / 6),
        ([[*LOOK_UPS, look_up(OTHER_BOOK)], *SUMS], TOTAL, {"wrong_tool": 1}, 6 / 7),
        ([[*LOOK_UPS, SPARE], *SUMS], TOTAL, {"superfluous": 1}, 6 / 7),
        ([[*LOOK_UPS[:2], SPARE], [add(A, B)], [add(S, A + B)]], str(A + B + S),
         {"superfluous": 1, "wrong_value": 1, "missing": 2}, 3 / 6),
        ([[*LOOK_UPS, LOOK_UPS[0]], *SUMS], TOTAL, {"repeated": 1}, 6 / 7),
        ([LOOK_UPS, SUMS[0], SUMS[0], SUMS[1]], TOTAL, {"repeated": 1}, 6 / 7),
        ([LOOK_UPS, [add(A, B), add(B, A)], SUMS[1]], TOTAL, {"repeated": 1}, 6 / 7),
        ([LOOK_UPS, [add(A, B + 1)], [add(C, A + B)]], TOTAL,
         {"ignored_answer": 2, "missing": 2}, 4 / 6),
        ([LOOK_UPS, SUMS[0], [add(C, A + B + 1)]], str(A + B + C + 1),
         {"ignored_answer": 1, "missing": 1}, 4 / 6),
        ([LOOK_UPS, [*SUMS[0], *SUMS[1]]], TOTAL, {"ignored_answer": 1, "missing": 1}, 5 / 6),
        ([[*LOOK_UPS, *SUMS[0]], SUMS[1]], TOTAL,
         {"ignored_answer": 1, "wrong_value": 1, "missing": 2}, 4 / 6),
        ([LOOK_UPS, [add(A, A)], SUMS[1]], TOTAL, {"ignored_answer": 2, "missing": 2}, 4 / 6),
        ([[*LOOK_UPS, ToolCall("add", {})], *SUMS], TOTAL, {"malformed": 1}, 6 / 7),
        ([[*LOOK_UPS, ToolCall("", error="no JSON")], *SUMS], TOTAL, {"malformed": 1}, 6 / 7),
    ],
)  # fmt: skip
def test_every_mistake_is_caught(
    turns: list[list[ToolCall]], answer: str | None, found: dict[str, int], score: float
) -> None:
    outcome = play(turns, answer)
    assert not outcome.is_success
    assert mistakes(outcome) == found
    assert outcome.score == pytest.approx(score)
    assert outcome.details["answer_only"] == (answer == TOTAL)


@given(st.lists(st.lists(st.sampled_from([*LOOK_UPS, *SUMS[0], *SUMS[1], SPARE]), max_size=4)))
def test_only_the_right_calls_in_their_order_are_a_success(
    turns: list[list[ToolCall]],
) -> None:
    outcome = play([calls for calls in turns if calls])
    made = [call for calls in turns for call in calls]
    # An independent statement: each call once, nothing else, and no sum before its operands.
    ends = {json.dumps(c.arguments) + c.name: i for i, calls in enumerate(turns) for c in calls}
    when = [ends.get(json.dumps(c.arguments) + c.name, -1) for c in (*LOOK_UPS, *SUMS[0], *SUMS[1])]
    is_ordered = max(when[:2]) < when[3] < when[4] > when[2] and min(when) >= 0
    assert outcome.is_success == (len(made) == 5 and is_ordered)
    assert (outcome.score == 1) == outcome.is_success
    assert 0 <= outcome.score <= 1


# Answers


def test_every_tool_answers_with_its_number() -> None:
    environment = opened(PROMPT)
    for letter in LETTERS:
        calls = tuple(look_up(Asked(book, letter)) for book in ("price", "stock"))
        reply = environment.act(Turn("", calls))
        shown = [LEDGER[Asked(book, letter)] for book in ("price", "stock")]
        assert [message["content"] for message in reply.messages] == [str(value) for value in shown]
        assert shown[0] != shown[1]
        assert all(10 <= value <= 99 for value in shown)
    reply = environment.act(Turn("", (add(0, 999999),)))
    assert reply.messages == ({"role": "tool", "name": "calculate", "content": "999999"},)


JUNK: list[Any] = [
    *(None, 3, 2.5, True, [], {}, "", "q", "ee", "A", "é", "\ud800", "e ", "1+", "1+2+3", "01+2"),
    *("1-2", "1 + 2", "1+2\n", "٣+٤", "9999999+1", "__import__('os')", "a" * 5000),
]


def malformed(rng: random.Random) -> ToolCall:
    """One of very many calls that no tool can carry out."""
    name = rng.choice(["look_up_price", "look_up_stock", "calculate", "", "look_up", "Calculate"])
    value, key = rng.choice(JUNK), rng.choice(["item", "expression", "items", "", "self"])
    match rng.randrange(4):
        case 0:
            return ToolCall(name, {key: value})
        case 1:
            return ToolCall(name, {key: value, rng.choice("xyz"): rng.choice(JUNK)})
        case 2:
            return ToolCall(name, {"item": "e", "expression": "1+2"})
        case _:
            return ToolCall(name, {}, error=rng.choice(["", "not JSON", "x" * 5000]))


def check_malformed(num_calls: int) -> None:
    rng = random.Random(4)
    environment = opened(PROMPT)
    for _ in range(num_calls):
        reply = environment.act(Turn("", (malformed(rng),)))
        assert reply.num_errors == 1
        assert not reply.is_done
        content = json.loads(reply.messages[0]["content"])
        assert content["error"]
        assert len(content["error"]) <= 400
    for calls in ([*LOOK_UPS], *SUMS):
        assert environment.act(Turn("", tuple(calls))).num_errors == 0
    environment.act(Turn(TOTAL))
    outcome = environment.score()
    assert mistakes(outcome) == {"malformed": num_calls}  # nothing else was done by them
    assert outcome.score == 6 / (num_calls + 6)


def test_malformed_calls_get_an_error_and_do_nothing() -> None:
    check_malformed(500)


@pytest.mark.slow
def test_ten_thousand_malformed_calls() -> None:
    check_malformed(10_000)


def test_conversations_share_nothing() -> None:
    first, second, control = (opened(PROMPT) for _ in range(3))
    for calls in (LOOK_UPS, *SUMS):
        first.act(Turn("", tuple(calls)))
        second.act(Turn("", (SPARE,)))
        control.act(Turn("", tuple(calls)))
    for environment in (first, second, control):
        environment.act(Turn(TOTAL))
    assert first.score() == control.score()
    assert first.score().is_success
    assert not second.score().is_success


def test_an_environment_that_is_started_again_forgets() -> None:
    environment = opened(PROMPT)
    environment.act(Turn("", (SPARE,)))
    environment.start(PROMPT, 0)
    for calls in (LOOK_UPS, *SUMS):
        environment.act(Turn("", tuple(calls)))
    environment.act(Turn(TOTAL))
    assert environment.score().is_success
    assert environment.score() == environment.score()


# Prompts


def test_it_is_an_agent_task_whose_prompts_are_those_of_today() -> None:
    assert isinstance(TASK, AgentTask)
    assert PROMPT.id == "ledger_tools3-train-0-0-0"
    assert PROMPT.content == ({"role": "user", "content": "Total: stock g, price b, price p"},)
    assert PROMPT.answer == TOTAL == "153"
    assert [ledger_of("x")[Asked(book, "e")] for book in ("price", "stock")] == [20, 95]


def test_prompts_are_pure_functions_of_their_counters() -> None:
    some = TASK.prompts(5, 4, seed=7)
    assert TASK.prompts(5, 9, seed=7)[:4] == some
    assert (
        len({parse_asked(p) for p in (*TASK.prompts(5, 9, 8), *TASK.prompts(6, 9, 7), *some)}) > 18
    )
    assert TASK.held_out(9, 3)[:4] == TASK.held_out(4, 3)


def test_the_same_prompt_has_the_same_world_and_opening() -> None:
    first, second = TASK.environment(), TASK.environment()
    opening = first.start(PROMPT, 5)
    assert opening == second.start(PROMPT, 5)
    assert opening.messages == PROMPT.content
    names = [tool["function"]["name"] for tool in opening.tools]
    assert names == ["look_up_price", "look_up_stock", "calculate"]
    calls = tuple(LOOK_UPS)
    assert first.act(Turn("", calls)) == second.act(Turn("", calls))
    worlds = {tuple(ledger_of(prompt.id).values()) for prompt in TASK.prompts(0, 50, 0)}
    assert len(worlds) == 50


def test_training_never_meets_a_held_out_question() -> None:
    def questions(prompts: list[Prompt]) -> set[frozenset[Asked]]:
        return {frozenset(parse_asked(prompt) or ()) for prompt in prompts}

    training = questions([p for step in range(20) for p in TASK.prompts(step, 100, seed=step)])
    held_out = questions([p for seed in range(5) for p in TASK.held_out(100, seed)])
    assert len(training) > 1000
    assert len(held_out) > 150
    assert not training & held_out


def test_grade_looks_at_the_final_answer_alone() -> None:
    assert TASK.grade(PROMPT, f" {TOTAL}\n") is True
    assert TASK.grade(PROMPT, TOTAL + "0") is False
    assert TASK.grade(PROMPT, TOTAL, is_truncated=True) is False
    assert TASK.grade(Prompt("x", "Total: price e", "3"), "3") is None


@pytest.mark.parametrize(
    "content",
    ["Total: price e", ({"role": "user", "content": "Total: price e, stock e"},),
     ({"role": "user", "content": "Total: price z"},), ()],
)  # fmt: skip
def test_other_prompts_are_refused(content: str | tuple[dict[str, str], ...]) -> None:
    with pytest.raises(DataError, match="not a prompt of ledger_tools"):
        TASK.environment().start(Prompt("x", content), 0)
    with pytest.raises(DataError, match="not a prompt of ledger_tools"):
        ScriptedAgent(Prompt("x", content), random.Random(0))


@pytest.mark.parametrize("num_items", [1, 17])
def test_numbers_of_items_that_no_ledger_has_are_refused(num_items: int) -> None:
    with pytest.raises(ConfigError, match=f"from 2 to 16, got {num_items}"):
        LedgerToolsTask(num_items)
