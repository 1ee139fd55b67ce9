"""What a user asks for, and every way to satisfy it, by exhaustive search."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from tutelage.envs.shopping import words
from tutelage.envs.shopping.catalogue import Product, field_of
from tutelage.envs.shopping.coupons import discount_of, every_use, threshold_of, why_unusable
from tutelage.envs.shopping.transport import transport_days
from tutelage.envs.shopping.world import World

Operator: TypeAlias = Literal["is", "contains", "<", ">"]

TRANSPORT = "transport_days"
"""The key of a constraint on the days of transport to the user's province."""
WORD_KEYS = ("name", "brand", "color", "size", "suitable_season", "target_demographic")
"""Keys whose constraints are on words; the others are on numbers."""
FILTER_KEYS = ("name", "brand", "color", "size")
"""Those with a search or a filter of their own; every slot has one of them."""
RANGE_KEYS = (
    "price",
    "stock_quantity",
    "sales_volume.monthly",
    "sales_volume.total",
    "rating.average_score",
    "rating.total_reviews",
)
"""Keys of the tool filter_by_range."""


@dataclass(frozen=True, order=True)
class Constraint:
    """One condition on a product.

    A product for all seasons is suitable for each of them, so that it satisfies a constraint on any
    season; only products for all seasons satisfy one on `words.ALL_SEASONS`.
    """

    key: str
    """A product's field by its dotted name, or `TRANSPORT`."""
    operator: Operator
    value: str | float

    def holds(self, product: Product, province: str) -> bool:
        """Whether a product of a generated world satisfies it for a user in a province."""
        found = field_of(product, self.key)
        if self.key == TRANSPORT:
            found = transport_days(product, province)
        match self.operator:
            case "is" if self.key == "suitable_season":
                return found in (self.value, words.ALL_SEASONS)
            case "is":
                return bool(found == self.value)
            case "contains":
                return str(self.value) in found
            case "<":
                return bool(found < self.value)
            case _:
                return bool(found > self.value)


Slot: TypeAlias = tuple[Constraint, ...]
"""All that is asked of one product."""


@dataclass(frozen=True)
class Query:
    """What a user asks for, as an agent would have understood it."""

    level: int
    """1: products; 2: with a budget; 3: at the lowest price after coupons."""
    slots: tuple[Slot, ...]
    """What is asked of each product."""
    budget: tuple[int, int] | None = None
    """Lowest and highest price of all together, in yuan; on level 2."""


@dataclass(frozen=True)
class Solution:
    """The cart that a query asks for."""

    products: dict[str, int]
    """Quantities by product id."""
    coupons: dict[str, int] = field(default_factory=dict)
    """Quantities by coupon name."""


def fits(slot: Slot, product: Product, province: str) -> bool:
    """Whether a product satisfies everything that is asked."""
    return all(constraint.holds(product, province) for constraint in slot)


def candidates(world: World, query: Query) -> list[list[Product]]:
    """The products that satisfy each slot."""
    province = world.user["address"]["province"]
    return [[p for p in world.products if fits(slot, p, province)] for slot in query.slots]


def solutions(world: World, query: Query) -> list[Solution]:
    """Every cart that the query asks for: one product a slot, within the budget, at level 3 those
    with the lowest price after coupons."""
    chosen = list(combinations(candidates(world, query)))
    if query.level == 1:
        return [Solution(_ones(products)) for products in chosen]
    if query.budget is not None:
        low, high = query.budget
        return [Solution(_ones(p)) for p in chosen if low <= price_of(p) <= high]
    return cheapest(chosen, every_use(world.user["coupons"], world.user["is_vip"]))


def combinations(groups: Sequence[Sequence[Product]]) -> Iterator[tuple[Product, ...]]:
    """Every choice of one product from each group, no product twice."""
    for products in itertools.product(*groups):
        if len(_ones(products)) == len(products):
            yield products


def cheapest(
    chosen: Sequence[tuple[Product, ...]], uses: Sequence[dict[str, int]]
) -> list[Solution]:
    """Products and coupons of the lowest price, of all combinations of both."""
    best: list[Solution] = []
    lowest = float("inf")
    ordered = sorted(((discount_of(u), threshold_of(u), u) for u in uses), key=lambda u: -u[0])
    for products in sorted(chosen, key=price_of):
        full, items = price_of(products), [(product, 1) for product in products]
        for discount, threshold, used in ordered:
            if full - discount > lowest:
                break  # all further coupons take off less
            if threshold > full or why_unusable(used, items, has_scopes=True):
                continue
            best = best if full - discount == lowest else []
            lowest = full - discount
            best.append(Solution(_ones(products), used))
    return best


def price_of(products: Sequence[Product]) -> int:
    """The price of one of each, in yuan, before coupons."""
    return sum(product["price"] for product in products)


def _ones(products: Sequence[Product]) -> dict[str, int]:
    return {product["product_id"]: 1 for product in products}
