"""Scores of carts, and how the published ones can be had for nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.data.types import ToolCall, Turn
from tutelage.envs.shopping import ShoppingTask
from tutelage.envs.shopping.query import Solution
from tutelage.envs.shopping.scores import score_cart

EXPECTED = Solution({"a": 1, "b": 1}, {"C": 2})
amounts = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 3), max_size=5)


@pytest.mark.parametrize(
    ("products", "coupons", "exact", "f1", "match_rate", "case_score"),
    [
        ({"a": 1, "b": 1}, {"C": 2}, 1, 1.0, 1.0, 1.0),
        ({"b": 1, "a": 1}, {"C": 2}, 1, 1.0, 1.0, 1.0),
        ({}, {}, 0, 0.0, 0.0, 0.0),
        ({"a": 1}, {}, 0, 2 / 5, 1 / 3, 0.0),
        ({"a": 1, "x": 1}, {}, 0, 2 / 6, 1 / 3, 0.0),
        ({"a": 1, "b": 1}, {"C": 1}, 0, 6 / 7, 2 / 3, 0.0),
        ({"a": 1, "b": 1}, {"D": 2}, 0, 4 / 8, 2 / 3, 0.0),
        ({"a": 2, "b": 1}, {"C": 2}, 0, 8 / 9, 1.0, 1.0),
        ({"a": 1, "b": 1, "x": 5}, {"C": 2}, 0, 8 / 13, 1.0, 1.0),
        ({"a": 1, "b": 1}, {"C": 2, "D": 1}, 0, 8 / 9, 1.0, 1.0),
        ({"C": 2}, {"a": 1, "b": 1}, 0, 0.0, 0.0, 0.0),
    ],
)
def test_scores_by_hand(
    products: dict[str, int],
    coupons: dict[str, int],
    exact: int,
    f1: float,
    match_rate: float,
    case_score: float,
) -> None:
    outcome = score_cart(products, coupons, EXPECTED)
    assert outcome.is_success is bool(exact)
    assert outcome.score == outcome.details["f1"] == pytest.approx(f1, abs=1e-12)
    assert outcome.details["exact"] == exact
    assert outcome.details["match_rate"] == pytest.approx(match_rate, abs=1e-12)
    assert outcome.details["case_score"] == case_score


@given(held=amounts, wanted=amounts.filter(bool))
def test_only_the_exact_cart_has_f1_of_one(held: dict[str, int], wanted: dict[str, int]) -> None:
    outcome = score_cart(held, {}, Solution(wanted))
    assert 0 <= outcome.score <= 1
    assert outcome.is_success is (outcome.score == 1) is (held == wanted)
    assert (outcome.score == 0) is not bool(held.keys() & wanted.keys())


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_cart_with_the_whole_catalogue_has_the_published_score_but_not_ours(level: int) -> None:
    task = ShoppingTask(level)
    for prompt in task.prompts(0, 3, 0):
        case = task.case(prompt)
        environment = task.environment()
        environment.start(prompt, 0)
        everything = [
            ToolCall("add_product_to_cart", {"product_id": p["product_id"]})
            for p in case.world.products
        ]
        coupons = [
            ToolCall("add_coupon_to_cart", {"coupon_name": name, "quantity": count})
            for name, count in case.solution.coupons.items()
        ]
        assert environment.act(Turn("", (*everything, *coupons))).num_errors == 0
        outcome = environment.score()
        assert outcome.details["case_score"] == outcome.details["match_rate"] == 1.0
        assert outcome.details["exact"] == 0
        assert not outcome.is_success
        assert outcome.score < 0.12
