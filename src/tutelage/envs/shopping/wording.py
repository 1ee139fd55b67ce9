"""Queries in plain English, and what the system message says."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tutelage.data.tasks.draws import pick
from tutelage.envs.shopping.catalogue import STARS
from tutelage.envs.shopping.query import TRANSPORT, Constraint, Query, Slot

_ROLE = (
    "You are a shopping assistant. Use the tools to find the products that the user asks for, one "
    "product for each thing asked for, and put them into the cart, one of each and nothing else. "
    "Every condition of a product has to be met. What is in the cart at the end is what the user "
    "buys. When the cart is right, answer with a short summary and call no tool."
)
_BUDGET = " The price of all products together has to be within the user's budget."
_COUPONS = (
    " Among all products that meet the conditions, choose those whose total price is lowest "
    "after the user's coupons, and add those coupons to the cart. A coupon takes its discount "
    "off once for every time that its threshold is reached, at most as often as the user owns "
    "it. The thresholds of all coupons used add up to at most the price of the cart. "
)
_KINDS = (
    "a Same-brand coupon reaches its threshold with products of one brand; a VIP coupon is for "
    "VIPs."
)
_RULES = {
    1: "",
    2: _BUDGET,
    3: f"{_COUPONS}A coupon counts only products that list it under applicable_coupons; {_KINDS}",
}
_OFFICIAL_RULES = {
    1: "",
    2: _BUDGET,
    3: f"{_COUPONS}A Cross-store coupon counts the whole cart; {_KINDS}",
}
_OFFICIAL = (
    " Where several products meet all conditions, take those with the lowest total price. A size "
    "or an audience that the user leaves out follows from the user's profile: see get_user_info."
)
_INTROS = (
    "I'm refreshing my wardrobe and need to order a few specific things.",
    "I'm getting ready for a trip and would like to buy some items online.",
    "I'm putting together a new outfit and have clear ideas about it.",
    "The season is changing, and there are a few pieces that I still need.",
    "I'd like to place one order for several things.",
    "I'm updating my closet and am rather picky this time.",
)
_FIRST = ("First, I'm looking for", "To begin with, I need", "First, I'd like")
_NEXT = ("Next, I need", "I also want", "Then I'm looking for", "To go with that, I'd like")
_LAST = ("Finally, I need", "Lastly, I'm looking for", "Finally, I want")
_DEMANDS = ("It must have", "It should have", "I want one with", "Please make sure that it has")
_BUDGETS = (
    "My budget is between {} and {} yuan for everything.",
    "I'd like to keep my total spending between {} and {} yuan.",
    "All of it together should cost no less than {} and no more than {} yuan.",
)
_SAVINGS = (
    "I'd like to pay as little as possible, so please use my coupons where they help.",
    "Please find the cheapest way to buy all of this with the coupons that I have.",
)
_NOUNS = {
    "price": "a price",
    "stock_quantity": "a stock quantity",
    "sales_volume.monthly": "a monthly sales volume",
    "sales_volume.total": "a total sales volume",
    "rating.average_score": "an average score",
}
_COUNTS = {"rating.total_reviews": "reviews in total"} | {
    f"rating.{star}": f"{star.replace('_', '-')} reviews" for star in STARS
}


def system_text(level: int) -> str:
    """The system message of a level of generated cases."""
    return _ROLE + _RULES[level]


def official_system_text(level: int) -> str:
    """The system message of a level of the benchmark's cases, whose coupons have no list of
    products that they count."""
    return _ROLE + _OFFICIAL_RULES[level] + _OFFICIAL


def query_text(query: Query, rng: random.Random) -> str:
    """What the user says; every constraint is in it with its value."""
    last = len(query.slots) - 1
    parts = [pick(_INTROS, rng)]
    for place, slot in enumerate(query.slots):
        starts = _FIRST if place == 0 else _LAST if place == last else _NEXT
        parts.append(f"{pick(starts, rng)} {_thing(slot)}. {_demand(slot, rng)}")
    if query.budget is not None:
        parts.append(pick(_BUDGETS, rng).format(*query.budget))
    if query.level == 3:
        parts.append(pick(_SAVINGS, rng))
    return " ".join(parts)


def _thing(slot: Slot) -> str:
    """What the product is, by the constraints on words."""
    values = {constraint.key: str(constraint.value) for constraint in slot}
    text = "something"
    if "target_demographic" in values:
        text += f" for {values['target_demographic'].lower()}"
    if "brand" in values:
        text += f" from {values['brand']}"
    if "color" in values:
        text += f" in {values['color'].lower()}"
    if "size" in values:
        text += f" in size {values['size']}"
    if "name" in values:
        text += f" with '{values['name']}' in its name"
    if "suitable_season" in values:
        text += f" that is suitable for {_season(values['suitable_season'])}"
    return text


def _season(season: str) -> str:
    return season.lower().replace("/", " and ")


def _demand(slot: Slot, rng: random.Random) -> str:
    """What is asked of the product's numbers."""
    phrases = [_phrase(c) for c in slot if c.operator in "<>"]
    return f"{pick(_DEMANDS, rng)} {_enumeration(phrases)}."


def _phrase(constraint: Constraint) -> str:
    key, value = constraint.key, f"{constraint.value:g}"
    if key == TRANSPORT:
        return f"a transport time to my address of less than {value} days"
    if key in _COUNTS:
        return f"{'more' if constraint.operator == '>' else 'fewer'} than {value} {_COUNTS[key]}"
    return f"{_NOUNS[key]} {'above' if constraint.operator == '>' else 'below'} {value}"


def _enumeration(phrases: Sequence[str]) -> str:
    if len(phrases) == 1:
        return phrases[0]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"
