"""A scripted agent that answers shopping queries through the tools alone.

It is given the query as constraints, reads nothing but what the tools answer, and works on all
slots of a query at the same time: their calls share a turn. Its conversations are correct examples
of what a model has to do.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, TypeAlias, TypeVar

from tutelage.data.types import ToolCall
from tutelage.envs.shopping.catalogue import Product
from tutelage.envs.shopping.coupons import every_use
from tutelage.envs.shopping.query import (
    RANGE_KEYS,
    TRANSPORT,
    Constraint,
    Query,
    Slot,
    Solution,
    cheapest,
    combinations,
    price_of,
)

T = TypeVar("T")
Plan: TypeAlias = Generator[list[ToolCall], list[Any], T]
"""Gives the calls of a turn, is sent the answers as JSON values, and returns a result."""

_WORD_FILTERS = {  # those that usually leave fewest first
    "brand": ("filter_by_brand", "brand_names"),
    "color": ("filter_by_color", "colors"),
    "size": ("filter_by_size", "sizes"),
}


def solve(query: Query) -> Plan[str]:
    """The turns that answer a query; returns the final text."""
    (user,) = yield [ToolCall("get_user_info")]
    province = user["address"]["province"]
    found = yield from _together([_find(slot, query.level, province) for slot in query.slots])
    chosen = _choose(query, found, user)
    yield [ToolCall("add_product_to_cart", {"product_id": key}) for key in chosen.products]
    if chosen.coupons:
        yield [
            ToolCall("add_coupon_to_cart", {"coupon_name": name, "quantity": count})
            for name, count in chosen.coupons.items()
        ]
    (cart,) = yield [ToolCall("get_cart_info")]
    names = ", ".join(item["name"] for item in cart["items"])
    return f"Your cart holds {names}. The total is ¥{cart['summary']['total_price']:g}."


def _choose(query: Query, found: Sequence[Sequence[Product]], user: dict[str, Any]) -> Solution:
    """The products, one for each slot, and the coupons that the query asks for."""
    chosen = list(combinations(found))
    if query.budget is not None:
        low, high = query.budget
        chosen = [products for products in chosen if low <= price_of(products) <= high]
    if query.level == 3:
        return cheapest(chosen, every_use(user["coupons"], user["is_vip"]))[0]
    return Solution({product["product_id"]: 1 for product in chosen[0]})


def _find(slot: Slot, level: int, province: str) -> Plan[list[Product]]:
    """The products that satisfy a slot; their other fields only where they are needed."""
    ids: list[str] | None = None
    for call in _filters(slot):
        among = {} if ids is None else {"product_ids": ids}
        (answer,) = yield [ToolCall(call.name, {**among, **call.arguments})]
        (ids,) = answer.values()
    unchecked = [c for c in slot if not _is_filtered(c) and c.key != TRANSPORT]
    products: list[Product] = [{"product_id": key} for key in ids or ()]
    if unchecked or level > 1:
        (answer,) = yield [ToolCall("get_product_details", {"product_ids": ids or []})]
        products = [p for p in answer["products"] if all(_holds(c, p) for c in unchecked)]
    limit = next((constraint.value for constraint in slot if constraint.key == TRANSPORT), None)
    if limit is None:
        return products
    answers = yield [
        ToolCall(
            "calculate_transport_time",
            {"product_id": product["product_id"], "destination_address": province},
        )
        for product in products
    ]
    pairs = zip(products, answers, strict=True)
    return [product for product, answer in pairs if answer["estimated_delivery_days"] < limit]


def _filters(slot: Slot) -> list[ToolCall]:
    """The calls that narrow a slot down, without the ids that they are to look among."""
    values = {c.key: c.value for c in slot}
    search = [ToolCall("search_products", {"query": values["name"]})] if "name" in values else []
    words = [
        ToolCall(tool, {argument: [values[key]]})
        for key, (tool, argument) in _WORD_FILTERS.items()
        if key in values
    ]
    numbers = [
        ToolCall(
            "filter_by_range",
            {"condition_key": c.key, "operator": c.operator, "value": c.value},
        )
        for c in slot
        if c.key in RANGE_KEYS
    ]
    # A search cannot look among ids, so it has to be the first.
    return search + words + numbers


def _is_filtered(constraint: Constraint) -> bool:
    return constraint.key in RANGE_KEYS or constraint.key in _WORD_FILTERS


def _holds(constraint: Constraint, product: Product) -> bool:
    """A constraint on a field of the details."""
    return constraint.holds(product, "")


def _together(plans: Sequence[Plan[T]]) -> Plan[list[T]]:
    """Run plans side by side: a turn has the next calls of all that are not done."""
    results: dict[int, T] = {}
    answers: dict[int, list[Any]] = {}
    while len(results) < len(plans):
        asked: dict[int, list[ToolCall]] = {}
        for place, plan in enumerate(plans):
            if place in results:
                continue
            try:
                asked[place] = plan.send(answers[place]) if place in answers else next(plan)
            except StopIteration as end:
                results[place] = end.value
        if asked:
            flat = yield [call for calls in asked.values() for call in calls]
            for place, calls in asked.items():
                answers[place], flat = flat[: len(calls)], flat[len(calls) :]
    return [results[place] for place in range(len(plans))]
