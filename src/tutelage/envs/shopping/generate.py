"""Cases: a query, a world that holds exactly one solution of it, and that solution.

A case is drawn in three steps. First the words in which the query asks for each product (brand,
color, part of the name, ...), which also decide whether a case is for training or held out. Then,
for each slot, a product, thresholds that it passes, and products around it: some that satisfy the
slot too (levels 2 and 3), and near misses, each of which fails exactly one constraint, at least one
for every constraint. Then the rest of the catalogue, in which nothing satisfies a slot. The
solution is found by searching through all products, combinations and coupons; a draw with another
number of solutions than one is drawn again.

Products for all seasons are suitable for winter too. All that satisfy a slot for winter are for
winter alone, so that the right cart is the same if "suitable for winter" is read more strictly.

No two tools are enough. Every slot has a constraint on words and one on numbers, and a near miss
for each: no filter on words drops the number's near miss, no filter on numbers the word's,
the details of a product need an id that another tool found, and the cart takes a tool of its own.
"""

from __future__ import annotations

import json
import math
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tutelage.data.tasks.draws import below, between, is_held_out, pick, shuffled
from tutelage.envs.shopping.catalogue import Product, draw_product
from tutelage.envs.shopping.coupons import COUPONS, every_use
from tutelage.envs.shopping.products import Group, Wish, draw_group, draw_wish
from tutelage.envs.shopping.query import (
    Query,
    Slot,
    Solution,
    cheapest,
    combinations,
    fits,
    price_of,
    solutions,
)
from tutelage.envs.shopping.transport import PROVINCES
from tutelage.envs.shopping.wording import query_text
from tutelage.envs.shopping.world import World

MIN_NEAR_MISSES = 5
"""Near misses of every slot, at least."""
MIN_DISTRACTORS = 20
"""Near misses of all slots together, at least."""
_MIN_ITEMS = 2
"""Products that a query asks for, at least."""
_MAX_COMBINATIONS = 36
_MIN_GAP = 6
"""Between the price of a solution and those of other combinations, in yuan."""
_MAX_SLACK = 60
"""Between the price of a solution and the ends of its budget, in yuan."""
_COUPON_TRIES = 8
_LOCK = threading.Lock()
"""Held while a case is drawn, so that no other thread draws the same one meanwhile."""


@dataclass(frozen=True)
class Case:
    """A world, what is asked of it in words and as constraints, and the one right cart."""

    world: World
    query: Query
    solution: Solution
    text: str


@dataclass(frozen=True)
class Size:
    """How large cases are."""

    level: int
    num_products: int
    max_items: int


def draw_case(identity: str, size: Size, is_held_out: bool) -> Case:
    """The case of a name: the same name, size and side always give the same case.

    Conversations about one prompt share it, also those that begin at the same time in threads.
    """
    with _LOCK:
        return _draw_case(identity, size, is_held_out)


@lru_cache(maxsize=16)  # a case of 5,000 products takes 8 MB
def _draw_case(identity: str, size: Size, is_held_out: bool) -> Case:
    rng = random.Random(identity)  # seeding with text hashes it: the same on every machine
    wishes = draw_wishes(rng, size, is_held_out)
    while True:
        case = _try_case(rng, size, wishes)
        if case is not None:
            return case


def draw_wishes(rng: random.Random, size: Size, is_held_out: bool) -> list[Wish]:
    """What is asked of each product in words, for training or held out; no two are the same."""
    while True:
        num_items = between(_MIN_ITEMS, size.max_items, rng)
        wishes: dict[str, Wish] = {}
        while len(wishes) < num_items:
            wish = draw_wish(rng)
            wishes[_key(wish)] = wish
        found = list(wishes.values())
        if _is_held_out(found) == is_held_out:
            return found


def _is_held_out(wishes: Sequence[Wish]) -> bool:
    """The side of a query by what it asks in words, in whatever order.

    A query's text has all of these words, so that no text is on both sides.
    """
    return is_held_out("\n".join(sorted(_key(wish) for wish in wishes)))


def _key(wish: Wish) -> str:
    return json.dumps([[constraint.key, constraint.value] for constraint in wish.constraints])


def _try_case(rng: random.Random, size: Size, wishes: Sequence[Wish]) -> Case | None:
    """A case with these words, or None if this draw has not exactly one solution."""
    province = pick(PROVINCES, rng)
    groups = _draw_groups(rng, size, wishes, province)
    around = [p for group in groups for p in (*group.fitting, *group.near_misses)]
    num_fitting = sum(len(group.fitting) for group in groups)
    if sum(fits(g.slot, p, province) for g in groups for p in around) != num_fitting:
        return None  # one satisfies a slot that is not its own
    ids = _draw_ids(rng, size.num_products)
    for product in around:
        product["product_id"] = next(ids)
    query, user = _complete(rng, size.level, groups, _draw_user(rng, province))
    found = solutions(World(tuple(around), user), query)
    if len(found) != 1 or (size.level == 3 and not found[0].coupons):
        return None
    others = _draw_others(rng, [group.slot for group in groups], province)
    rest = [{**next(others), "product_id": key} for key in ids]
    world = World(shuffled((*around, *rest), rng), user)
    if solutions(world, query) != found:
        return None
    return Case(world, query, found[0], query_text(query, rng))


def _draw_groups(
    rng: random.Random, size: Size, wishes: Sequence[Wish], province: str
) -> list[Group]:
    counts = [1 if size.level == 1 else between(2, 3, rng) for _ in wishes]
    while math.prod(counts) > _MAX_COMBINATIONS:
        counts[counts.index(3)] = 2
    return [
        draw_group(
            rng,
            wish,
            province,
            has_price=size.level == 1,
            num_fitting=count,
            num_near_misses=max(MIN_NEAR_MISSES, math.ceil(MIN_DISTRACTORS / len(wishes))),
        )
        for wish, count in zip(wishes, counts, strict=True)
    ]


def _draw_others(rng: random.Random, slots: Sequence[Slot], province: str) -> Iterator[Product]:
    """Products that satisfy no slot."""
    while True:
        product = draw_product(rng, {})
        if not any(fits(slot, product, province) for slot in slots):
            yield product


def _draw_ids(rng: random.Random, count: int) -> Iterator[str]:
    """Different ids; short, because conversations have many of them."""
    ids: dict[str, None] = {}
    while len(ids) < count:
        ids[f"{below(1 << 16, rng):04x}"] = None
    return iter(ids)


def _draw_user(rng: random.Random, province: str) -> dict[str, Any]:
    return {
        "user_id": f"user_{below(1 << 24, rng):06x}",
        "address": {"province": province},
        "height_cm": between(150, 195, rng),
        "weight_kg": between(45, 100, rng),
        "is_vip": rng.random() < 0.5,
        "coupons": {},
    }


def _complete(
    rng: random.Random, level: int, groups: Sequence[Group], user: dict[str, Any]
) -> tuple[Query, dict[str, Any]]:
    """The query with its budget, and the user with coupons."""
    slots = tuple(group.slot for group in groups)
    chosen = list(combinations([group.fitting for group in groups]))
    if level == 2:
        return Query(level, slots, _draw_budget(rng, [price_of(p) for p in chosen])), user
    if level == 3:
        user = {**user, "coupons": _draw_coupons(rng, chosen, user["is_vip"])}
    return Query(level, slots), user


def _draw_budget(rng: random.Random, prices: Sequence[int]) -> tuple[int, int]:
    """A budget that one combination meets, if there is one whose price is far from all others."""
    ordered = sorted(prices)
    far = ordered[-1] + 10 * _MAX_SLACK
    gaps = [
        (price - before, after - price, price)
        for before, price, after in zip(
            [-far, *ordered], ordered, [*ordered[1:], far], strict=False
        )
    ]
    wide = [gap for gap in gaps if min(gap[:2]) >= _MIN_GAP]
    if not wide:
        return (ordered[0], ordered[-1])
    below_gap, above_gap, price = pick(wide, rng)
    low = price - below(min(_MAX_SLACK, below_gap), rng)
    return low, price + below(min(_MAX_SLACK, above_gap), rng)


def _draw_coupons(
    rng: random.Random, chosen: Sequence[tuple[Product, ...]], is_vip: bool
) -> dict[str, int]:
    """Coupons with which one choice of products and coupons is cheapest; if there are some, such
    that the products are not those that are cheapest without coupons."""
    lowest = min(price_of(products) for products in chosen)
    coupons: dict[str, int] = {}
    for _ in range(_COUPON_TRIES):
        drawn = {name: between(1, 2, rng) for name in shuffled(tuple(COUPONS), rng)[:3]}
        best = cheapest(chosen, every_use(drawn, is_vip))
        if len(best) == 1 and best[0].coupons:
            coupons = drawn
            ids = best[0].products
            prices = [price_of(p) for p in chosen if {q["product_id"] for q in p} == set(ids)]
            if prices[0] > lowest:
                break
    return coupons
