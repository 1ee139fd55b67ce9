"""Generated shopping worlds: queries with one right cart, which the scripted agent finds."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import time
from functools import partial

import pytest
from shopping_agent import demonstrate
from shopping_search import Cart, failures, right_carts

from tutelage.envs.environment import Opening
from tutelage.envs.guard import attempt_all
from tutelage.envs.shopping import ShoppingTask, generate, words
from tutelage.envs.shopping.generate import (
    MIN_DISTRACTORS,
    MIN_NEAR_MISSES,
    Case,
    Size,
    draw_case,
    draw_wishes,
)
from tutelage.envs.shopping.products import Wish
from tutelage.envs.shopping.query import WORD_KEYS, Constraint, Solution, cheapest

LEVELS = (1, 2, 3)
SIDES = (("train", False), ("held_out", True))

DIGESTS = {
    1: "0a857f12536a2aec8d9f2ef2f041f4e463f4f69a1b4dfa68902d0e1c5640dec6",
    2: "3dfa50d016aeefd85676dc705fab04d741647cd8d9f29573c39c8ca75b10cbda",
    3: "a91cae2d0f0518751093534f76fc7c809a11cc7da027560fc9181df7f656b1f6",
}
"""Of the first held-out world of each level. A change makes other worlds of the same seeds."""


def case_of(level: int, number: int) -> Case:
    """Training and held-out cases in turn."""
    side, is_held_out = SIDES[number % 2]
    return draw_case(f"shopping{level}-{side}-7-{number}", Size(level, 150, 5), is_held_out)


def cart_of(solution: Solution) -> Cart:
    assert set(solution.products.values()) == {1}
    return frozenset(solution.products), frozenset(solution.coupons.items())


def check_case(case: Case) -> None:
    """One right cart; near misses for every constraint; all that is asked is in the text."""
    province = case.world.user["address"]["province"]
    ids = {product["product_id"] for product in case.world.products}
    assert len(ids) == len(case.world.products) == 150
    assert right_carts(case.world, case.query) == {cart_of(case.solution)}
    assert bool(case.solution.coupons) is (case.query.level == 3)
    num_distractors = 0
    for slot in case.query.slots:
        failed = [failures(slot, product, province) for product in case.world.products]
        near = [keys[0] for keys in failed if len(keys) == 1]
        keys = [constraint.key for constraint in slot]
        assert set(near) == set(keys)
        assert len(near) >= MIN_NEAR_MISSES
        assert 0 < sum(key in WORD_KEYS for key in keys) < len(keys)
        assert len(set(keys)) == len(keys)
        num_distractors += len(near)
        for product, missed in zip(case.world.products, failed, strict=True):
            # "Suitable for winter" gives the same products if all seasons are not taken for winter.
            values = {c.value for c in slot if c.key == "suitable_season"}
            assert missed or values <= {product["suitable_season"]}
    assert num_distractors >= MIN_DISTRACTORS
    assert set(case.solution.products) <= ids


def check_demonstration(task: ShoppingTask, number: int) -> None:
    """The agent fills the right cart with the tools alone."""
    prompt = (task.prompts(number, 1, 3) + task.held_out(1, number))[number % 2]
    query = task.case(prompt).query
    done = demonstrate(task.environment(), prompt, query)
    assert done.outcome.is_success
    assert done.outcome.score == 1.0
    assert done.num_errors == 0
    assert len({call.name for call in done.calls}) >= 4
    assert "total is ¥" in done.text


@pytest.mark.parametrize("level", LEVELS)
def test_queries_have_one_right_cart_among_near_misses(level: int) -> None:
    for number in range(8):
        check_case(case_of(level, number))


@pytest.mark.parametrize("level", LEVELS)
def test_the_scripted_agent_fills_the_right_cart(level: int) -> None:
    for number in range(6):
        check_demonstration(ShoppingTask(level), number)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_a_thousand_queries_have_one_right_cart_and_are_solved(level: int) -> None:
    for number in range(1000):
        check_case(case_of(level, number))
        check_demonstration(ShoppingTask(level), number)


def test_the_search_of_the_tests_sees_a_second_right_cart() -> None:
    case = case_of(1, 0)
    place = next(
        i for i, p in enumerate(case.world.products) if p["product_id"] in case.solution.products
    )
    products = list(case.world.products)
    twin = {**products[place], "product_id": "twin"}
    world = type(case.world)((*products, twin), case.world.user)
    assert len(right_carts(world, case.query)) == 2


def test_a_product_for_all_seasons_suits_each_of_them() -> None:
    for season in words.SEASONS:
        wish = Constraint("suitable_season", "is", season)
        right = [s for s in words.SEASONS if wish.holds({"suitable_season": s}, "")]
        assert right == [s for s in words.SEASONS if s in (season, "All Seasons")]


@pytest.mark.parametrize("level", LEVELS)
def test_seasons_leave_one_right_cart(level: int) -> None:
    cases = (case_of(level, number) for number in itertools.count())
    seasonal = (
        c for c in cases if any(w.key == "suitable_season" for s in c.query.slots for w in s)
    )
    for case in itertools.islice(seasonal, 6):
        check_case(case)


def test_equal_prices_are_two_solutions() -> None:
    products = [
        {"product_id": key, "price": price} for key, price in (("a", 9), ("b", 9), ("c", 8))
    ]
    assert [s.products for s in cheapest([(p,) for p in products[:2]], [{}])] == [
        {"a": 1},
        {"b": 1},
    ]
    assert [s.products for s in cheapest([(p,) for p in products], [{}])] == [{"c": 1}]


def test_coupons_sometimes_decide_which_products_are_right() -> None:
    num_dearer = 0
    for number in range(20):
        case = case_of(3, number)
        prices = {p["product_id"]: p["price"] for p in case.world.products}
        province = case.world.user["address"]["province"]
        cheapest = sum(
            min(p["price"] for p in case.world.products if not failures(slot, p, province))
            for slot in case.query.slots
        )
        num_dearer += sum(prices[key] for key in case.solution.products) > cheapest
    assert 4 <= num_dearer <= 18


@pytest.mark.parametrize("level", LEVELS)
def test_the_text_tells_every_constraint(level: int) -> None:
    for number in range(10):
        case = case_of(level, number)
        text = case.text.lower()
        for constraint in itertools.chain.from_iterable(case.query.slots):
            value = constraint.value
            told = value.lower() if isinstance(value, str) else f"{value:g}"
            told = told.replace("spring/autumn", "spring and autumn")
            assert told in text, (constraint, text)
        assert ("coupons" in text) is (level == 3)
        for amount in case.query.budget or ():
            assert f" {amount} " in text
        assert (case.query.budget is not None) is (level == 2)


# Streams


@pytest.mark.parametrize("level", LEVELS)
def test_the_same_seed_gives_the_same_world_for_ever(level: int) -> None:
    task = ShoppingTask(level)
    assert task.case(task.held_out(1)[0]).world.digest == DIGESTS[level]


def test_prompts_do_not_depend_on_the_process() -> None:
    code = (
        "from tutelage.envs.shopping import ShoppingTask as T; t = T(3);"
        "print([(p.content, t.case(p).world.digest) for p in t.prompts(3, 2, 1)])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONIOENCODING": "utf-8"},
        check=True,
        capture_output=True,
        encoding="utf-8",
    ).stdout.strip()
    task, again = ShoppingTask(3), ShoppingTask(3)
    prompts = task.prompts(3, 2, 1)
    assert printed == str([(p.content, again.case(p).world.digest) for p in prompts])


def test_prompts_are_a_pure_function_of_their_counters() -> None:
    task = ShoppingTask(2)
    before = random.getstate()
    prompts = task.prompts(4, 3, seed=5)
    generate._draw_case.cache_clear()
    assert random.getstate() == before
    assert ShoppingTask(2).prompts(4, 2, seed=5) == prompts[:2]
    assert task.held_out(2, 1) == task.held_out(3, 1)[:2]
    streams = [task.prompts(step, 3, seed) for step in range(2) for seed in range(2)]
    found = [*itertools.chain.from_iterable(streams), *task.held_out(3), *task.held_out(3, 1)]
    assert len({p.id for p in found}) == len({str(p.content) for p in found}) == len(found)
    assert prompts[0].id == "shopping2-train-5-4-0"
    assert task.held_out(1, 2)[0].id == "shopping2-held_out-2-0"


def test_conversations_that_begin_together_share_one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[object] = []

    def draw_slowly(rng: random.Random, size: Size, is_held_out: bool) -> list[Wish]:
        drawn.append(size)
        time.sleep(0.05)  # the others begin meanwhile
        return draw_wishes(rng, size, is_held_out)

    task = ShoppingTask(1, num_products=60)
    prompts = [prompt for prompt in task.prompts(0, 3, 77) for _ in range(8)]
    generate._draw_case.cache_clear()
    monkeypatch.setattr(generate, "draw_wishes", draw_slowly)
    openings = attempt_all([partial(task.environment().start, p, 0) for p in prompts], 60)
    assert [o.messages for o in openings if isinstance(o, Opening)] == [p.content for p in prompts]
    assert len(drawn) == 3


def test_few_cases_are_kept() -> None:
    assert generate._draw_case.cache_parameters()["maxsize"] <= 16


def test_training_and_held_out_queries_never_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    # So few words that independent streams would collide.
    for name, size in (("BRANDS", 2), ("COLORS", 2), ("LINE_STARTS", 1), ("LINE_ENDS", 1)):
        monkeypatch.setattr(words, name, getattr(words, name)[:size])
    monkeypatch.setattr(words, "KINDS", words.KINDS[:1])

    def texts(is_held_out: bool, seed: int) -> set[frozenset[object]]:
        rng, size = random.Random(f"{is_held_out}/{seed}"), Size(1, 150, 2)
        drawn = (draw_wishes(rng, size, is_held_out) for _ in range(300))
        return {frozenset(wish.constraints for wish in wishes) for wishes in drawn}

    training, held_out = texts(False, 0), texts(True, 0)
    assert training & texts(False, 1)  # the streams do collide within a side
    assert held_out & texts(True, 1)
    assert not training & held_out
    assert len(held_out) > 50
