"""The ledger task: a strict grader, prompt streams that can be repeated, and its solver."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.data.tasks import LedgerTask
from tutelage.data.tasks.ledger import (
    DIGITS,
    LETTERS,
    OPERATORS,
    PUNCTUATION,
    Item,
    WrongFacts,
    _is_held_out,
    parse_items,
    solve,
    true_facts,
)
from tutelage.data.types import Prompt
from tutelage.errors import ConfigError, DataError

ALPHABET = LETTERS + DIGITS + OPERATORS + PUNCTUATION + "$ \n?A٣²"
TASK = LedgerTask()
PROMPT = Prompt("p", "e4+7;j7-6;n3+7;m0-6;b9*7;>", "9")
RIGHT = "b9*7=3~3;e7+4=1~4;j7-6=1~5;m0-6=4~9;n3+7=0~9;#9"

seeds = st.integers(min_value=0, max_value=10**6)


def all_right_completions(content: str) -> set[str]:
    """Every completion that is right, by enumeration and with no code of the package."""
    items = content.removesuffix(";>").split(";")
    completions = set()
    for visits in itertools.permutations(items):
        spelled = []
        for name, left, operator, right in visits:
            pairs = {(left, right)} | ({(right, left)} if operator in "+*" else set())
            spelled.append([f"{name}{a}{operator}{b}" for a, b in pairs])
        for written in itertools.product(*spelled):
            total, text = 0, ""
            for sum_ in written:
                value = eval_sum(sum_[1:])
                total += value
                text += f"{sum_}={value}~{total % 10};"
            completions.add(f"{text}#{total % 10}")
    return completions


def eval_sum(text: str) -> int:
    """The last digit of "a+b", "a-b" or "a*b" by repeated counting, a - b wrapping below 0."""
    left, right = int(text[0]), int(text[2])
    match text[1]:
        case "+":
            return len([*range(left), *range(right)]) % 10
        case "-":
            return list(range(10))[left - right]
        case "*":
            return len(list(itertools.product(range(left), range(right)))) % 10
    raise AssertionError(text)


def mutations(text: str) -> list[str]:
    """All texts one replaced, inserted or deleted character away."""
    cuts = [(text[:i], text[i:]) for i in range(len(text) + 1)]
    replaced = [a + c + b[1:] for a, b in cuts if b for c in ALPHABET]
    inserted = [a + c + b for a, b in cuts for c in ALPHABET]
    deleted = [a + b[1:] for a, b in cuts if b]
    return [changed for changed in replaced + inserted + deleted if changed != text]


# The grader


@pytest.mark.parametrize("num_items", [1, 2, 3])
def test_grader_accepts_exactly_the_enumerated_completions(num_items: int) -> None:
    task = LedgerTask(num_items)
    for prompt in task.prompts(0, 4, seed=num_items):
        right = all_right_completions(str(prompt.content))
        assert all(task.grade(prompt, text) for text in right)
        sample = random.Random(0).sample(sorted(right), k=min(2, len(right)))
        for changed in itertools.chain.from_iterable(map(mutations, sample)):
            assert task.grade(prompt, changed) == (changed in right), changed


@given(seed=seeds)
def test_no_single_change_of_a_right_completion_passes_by_mistake(seed: int) -> None:
    prompt = TASK.prompts(0, 1, seed)[0]
    text = solve(prompt, random.Random(seed))
    passed = {changed for changed in mutations(text) if TASK.grade(prompt, changed)}
    # No two right completions are one character apart: a spelling changes two digits or none.
    assert passed == set()


@given(seed=seeds, data=st.data())
def test_grader_agrees_with_enumeration_on_rewritten_completions(
    seed: int, data: st.DataObject
) -> None:
    task = LedgerTask(3)
    prompt = task.prompts(0, 1, seed)[0]
    right = all_right_completions(str(prompt.content))
    steps = data.draw(st.sampled_from(sorted(right))).split(";")[:-1]
    chosen = data.draw(st.lists(st.sampled_from(steps), max_size=4))
    text = "".join(f"{step};" for step in chosen) + f"#{data.draw(st.sampled_from(DIGITS))}"
    assert task.grade(prompt, text) == (text in right)


def test_the_documented_completion_is_right() -> None:
    assert TASK.grade(PROMPT, RIGHT) is True


@pytest.mark.parametrize(
    "text",
    [
        RIGHT + "$",
        RIGHT + "9",
        RIGHT + "\n",
        RIGHT + RIGHT,
        " " + RIGHT,
        RIGHT[:-1],
        RIGHT[:-2],
        "#9",
        "",
        RIGHT.replace("n3+7=0~9;", ""),
        RIGHT.replace("n3+7=0~9;", "n3+7=0~9;n3+7=0~9;"),
        RIGHT.replace("n3+7=0~9;", "b9*7=3~2;").replace("#9", "#2"),
        RIGHT.replace("j7-6", "j6-7"),
        RIGHT.replace("j7-6=1", "j6-7=9").replace("~5", "~3"),
        RIGHT.replace("m0-6=4~9", "m0-6=5~9"),
        RIGHT.replace("b9*7=3~3;e7+4=1~4", "b9*7=4~4;e7+4=0~4"),
        RIGHT.replace("n3+7", "n4+6"),
        RIGHT.replace("3", "٣"),
    ],
)
def test_grader_rejects(text: str) -> None:
    assert TASK.grade(PROMPT, text) is False


def test_a_prompt_with_an_impossible_answer_has_no_right_completion() -> None:
    assert TASK.grade(Prompt("p", PROMPT.content, "8"), RIGHT) is False
    assert TASK.grade(Prompt("p", PROMPT.content, "8"), RIGHT[:-1] + "8") is False


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt("no answer", PROMPT.content),
        Prompt("chat", ({"role": "user", "content": str(PROMPT.content)},), "9"),
        Prompt("not a ledger", "What is 4 + 7?", "11"),
        Prompt("no items", ">", "0"),
        Prompt("cut off", str(PROMPT.content)[:-1], "9"),
        Prompt("a letter twice", "e4+7;e4+7;>", "2"),
    ],
    ids=lambda prompt: prompt.id,
)
def test_what_cannot_be_graded_gives_none(prompt: Prompt) -> None:
    assert TASK.grade(prompt, RIGHT) is None
    assert TASK.grade_answer(prompt, RIGHT) is None


def test_the_lenient_grader_looks_at_the_answer_only() -> None:
    wrong_step = RIGHT.replace("m0-6=4~9", "m0-6=5~9")
    assert TASK.grade_answer(PROMPT, wrong_step) is True
    assert TASK.grade_answer(PROMPT, "#9") is True
    for text in (RIGHT[:-1] + "8", RIGHT + "x", RIGHT + "#9", RIGHT[:-2], "9"):
        assert TASK.grade_answer(PROMPT, text) is False


# The streams of prompts


@given(seed=seeds, step=seeds, count=st.integers(0, 6), more=st.integers(0, 3))
def test_prompts_are_a_pure_function_of_their_counters(
    seed: int, step: int, count: int, more: int
) -> None:
    before = random.getstate()
    prompts = TASK.prompts(step, count + more, seed)
    assert random.getstate() == before
    assert LedgerTask().prompts(step, count, seed) == prompts[:count]
    assert TASK.held_out(count, seed) == TASK.held_out(count + more, seed)[:count]


def test_prompts_do_not_depend_on_the_process() -> None:
    code = "from tutelage.data.tasks import LedgerTask as T; print(T().prompts(3, 2, 1))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    }
    assert printed == {str(TASK.prompts(3, 2, seed=1))}


def test_ids_and_contents_differ_between_steps_seeds_and_streams() -> None:
    streams = [TASK.prompts(step, 50, seed) for step in range(3) for seed in range(3)]
    prompts = [*itertools.chain.from_iterable(streams), *TASK.held_out(50), *TASK.held_out(50, 1)]
    assert len({p.id for p in prompts}) == len(prompts)
    assert len({p.content for p in prompts}) == len(prompts)


def test_training_and_held_out_prompts_never_meet() -> None:
    # With one item the whole space is 16 x 300 prompts, so independent streams would collide.
    task = LedgerTask(1)
    training = {p.content for step in range(100) for p in task.prompts(step, 300, seed=0)}
    held_out = {p.content for p in task.held_out(3000)}
    assert not training & held_out
    assert 4300 < len(training) < 4700
    assert 220 < len(held_out) < 400


@given(seed=seeds, data=st.data())
def test_listing_the_items_otherwise_does_not_change_the_side(
    seed: int, data: st.DataObject
) -> None:
    for prompt, side in ((TASK.prompts(0, 1, seed)[0], False), (TASK.held_out(1, seed)[0], True)):
        items = data.draw(st.permutations(parse_items(prompt) or ()))
        assert _is_held_out(tuple(items)) is side


@given(seed=seeds)
def test_the_answer_is_the_sum_of_the_items(seed: int) -> None:
    prompt = TASK.held_out(1, seed)[0]
    total = sum(eval_sum(item[1:]) for item in str(prompt.content)[:-2].split(";"))
    assert prompt.answer == str(total % 10)


def test_every_letter_digit_and_operator_is_drawn_evenly() -> None:
    items = [i for p in TASK.prompts(0, 2000, seed=0) for i in parse_items(p) or ()]
    for values, kinds in (
        ([i.letter for i in items], 16),
        ([i.left for i in items], 10),
        ([i.operator for i in items], 3),
        ([i.right for i in items], 10),
    ):
        counts = Counter(values).values()
        expected = len(items) / kinds
        assert len(counts) == kinds
        assert max(abs(c - expected) for c in counts) < 5 * expected**0.5


@pytest.mark.parametrize("num_items", [0, -1, 17])
def test_an_impossible_number_of_items_is_refused(num_items: int) -> None:
    with pytest.raises(ConfigError, match=rf"1 to 16, got {num_items}\. [^\n]+$"):
        LedgerTask(num_items)


# The solver


@given(seed=seeds, num_items=st.integers(1, 16), swap=st.sampled_from([0.0, 0.5, 1.0]))
def test_the_solver_is_right_with_true_facts(seed: int, num_items: int, swap: float) -> None:
    task = LedgerTask(num_items)
    prompt = task.prompts(0, 1, seed)[0]
    text = solve(prompt, random.Random(seed), swap=swap)
    assert task.grade(prompt, text) is True
    assert len(text) == 9 * num_items + 2


def test_the_solver_writes_every_right_completion() -> None:
    task = LedgerTask(3)
    prompt = task.prompts(0, 1, seed=4)[0]
    rng = random.Random(0)
    written = {solve(prompt, rng) for _ in range(2000)}
    assert written == all_right_completions(str(prompt.content))


def test_listed_order_without_swaps_is_one_completion() -> None:
    written = {solve(PROMPT, random.Random(s), order="listed", swap=0.0) for s in range(20)}
    assert written == {"e4+7=1~1;j7-6=1~2;n3+7=0~2;m0-6=4~6;b9*7=3~9;#9"}


@given(seed=seeds)
def test_the_solver_is_never_right_when_all_facts_are_wrong(seed: int) -> None:
    prompt = TASK.prompts(0, 1, seed)[0]
    text = solve(prompt, random.Random(seed), facts=WrongFacts(fraction=1.0))
    assert TASK.grade(prompt, text) is False


def test_solving_what_is_not_a_ledger_prompt_is_one_clear_line() -> None:
    with pytest.raises(DataError, match=r"^prompt 'x' is not a ledger prompt\. [^\n]+$"):
        solve(Prompt("x", "hello", "1"), random.Random(0))


def all_items(letter: str) -> list[Item]:
    return [Item(letter, a, op, b) for op in OPERATORS for a in range(10) for b in range(10)]


def test_wrong_facts_depend_on_the_arithmetic_alone() -> None:
    facts = WrongFacts(fraction=0.5, seed=1)
    for item, other in zip(all_items("a"), all_items("p"), strict=True):
        assert facts.offset(item) == facts.offset(other) == facts.offset(item.swapped)
        assert true_facts(item, random.Random(0)) == eval_sum(str(item)[1:])


def test_wrong_facts_have_the_fraction_and_probability_asked_for() -> None:
    facts = WrongFacts(fraction=0.25, probability=0.85)
    wrong = [item for item in all_items("a") if facts.offset(item)]
    assert 0.15 < len(wrong) / 300 < 0.35
    rng = random.Random(0)
    said = [facts(item, rng) for item in wrong for _ in range(100)]
    truth = [item.value for item in wrong for _ in range(100)]
    share = sum(a != b for a, b in zip(said, truth, strict=True)) / len(said)
    assert abs(share - 0.85) < 0.02
    assert not any(WrongFacts(fraction=0.0).offset(item) for item in all_items("a"))
