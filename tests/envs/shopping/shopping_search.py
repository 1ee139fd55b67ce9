"""What a shopping query asks for, found again from its constraints without the package's search."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from typing import Any

from tutelage.envs.shopping.query import Constraint, Query
from tutelage.envs.shopping.world import World

DAYS = """
   NC NE EC CC SC SW NW
NC  1  2  2  2  3  3  3
NE  2  1  3  3  4  4  4
EC  2  3  1  2  2  3  4
CC  2  3  2  1  2  2  3
SC  3  4  2  2  1  3  4
SW  3  4  3  2  3  1  3
NW  3  4  4  3  4  3  1
"""
PROVINCES = {
    "NC": "beijing tianjin hebei shanxi innermongolia",
    "NE": "liaoning jilin heilongjiang",
    "EC": "shanghai jiangsu zhejiang anhui fujian jiangxi shandong",
    "CC": "henan hubei hunan",
    "SC": "guangdong guangxi hainan hongkong macau taiwan",
    "SW": "sichuan chongqing guizhou yunnan tibet",
    "NW": "shaanxi gansu qinghai ningxia xinjiang",
}
ADDED = {"sf_express": -2, "jd_logistics": -1, "ems": 0, "deppon_express": 0, "china_post": 2}
"""Days of the providers that add other than one day."""
REMOTE = ("tibet", "xinjiang", "qinghai", "innermongolia")

Cart = tuple[frozenset[str], frozenset[tuple[str, int]]]
"""Ids of products, and coupons with their quantities."""


HEAD, *ROWS = (line.split() for line in DAYS.strip().splitlines())
TABLE = {row[0]: dict(zip(HEAD, map(int, row[1:]), strict=True)) for row in ROWS}
REGION = {p: name for name, provinces in PROVINCES.items() for p in provinces.split()}


def days(origin: str, destination: str, provider: str) -> int:
    remote = 2 if origin in REMOTE or destination in REMOTE else 0
    found = TABLE[REGION[origin]][REGION[destination]] + remote + ADDED.get(provider, 1)
    return max(found, 1)


def holds(constraint: Constraint, product: dict[str, Any], province: str) -> bool:
    if constraint.key == "transport_days":
        found: Any = days(product["shipping_info"]["origin"], province, _provider(product))
    elif "." in constraint.key:
        group, name = constraint.key.split(".")
        found = product[group][name]
    else:
        found = product[constraint.key]
    compared = {
        "is": lambda: found == constraint.value or is_for_all_seasons(constraint, product),
        "contains": lambda: constraint.value in found,
        "<": lambda: found < constraint.value,
        ">": lambda: found > constraint.value,
    }
    return bool(compared[constraint.operator]())


def is_for_all_seasons(constraint: Constraint, product: dict[str, Any]) -> bool:
    """Whether a product satisfies a constraint on the season because it suits every season."""
    return constraint.key == "suitable_season" and product["suitable_season"] == "All Seasons"


def _provider(product: dict[str, Any]) -> str:
    return str(product["shipping_info"]["provider"])


def failures(slot: tuple[Constraint, ...], product: dict[str, Any], province: str) -> list[str]:
    return [c.key for c in slot if not holds(c, product, province)]


def right_carts(world: World, query: Query) -> set[Cart]:
    """Every cart that the query asks for, by trying all of them."""
    province = world.user["address"]["province"]
    groups = [
        [product for product in world.products if not failures(slot, product, province)]
        for slot in query.slots
    ]
    carts: dict[Cart, int] = {}
    for products in itertools.product(*groups):
        total = sum(product["price"] for product in products)
        ids = frozenset(product["product_id"] for product in products)
        if query.level == 2:
            assert query.budget is not None
            if not query.budget[0] <= total <= query.budget[1]:
                continue
        for coupons in owned_choices(world) if query.level == 3 else [{}]:
            if allowed(coupons, products, world.user["is_vip"]):
                price = total - sum(amounts(name)[0] * n for name, n in coupons.items())
                carts[ids, frozenset((k, n) for k, n in coupons.items() if n)] = price
    if query.level < 3:
        return set(carts)
    return {cart for cart, price in carts.items() if price == min(carts.values())}


def owned_choices(world: World) -> list[dict[str, int]]:
    owned = world.user["coupons"]
    ranges = itertools.product(*(range(count + 1) for count in owned.values()))
    return [dict(zip(owned, counts, strict=True)) for counts in ranges]


def amounts(coupon: str) -> tuple[int, int]:
    """Discount and threshold, from a coupon's name."""
    found = re.findall(r"¥([\d,]+)", coupon)
    return int(found[0].replace(",", "")), int(found[1].replace(",", ""))


def allowed(coupons: dict[str, int], products: tuple[dict[str, Any], ...], is_vip: bool) -> bool:
    """Whether the rules of coupons let these be used with these products."""
    if sum(amounts(name)[1] * n for name, n in coupons.items()) > sum(p["price"] for p in products):
        return False
    for name, count in coupons.items():
        if count and name.startswith("VIP") and not is_vip:
            return False
        listing = [p for p in products if name in p["applicable_coupons"]]
        by_brand: dict[str, int] = defaultdict(int)
        for product in listing:
            by_brand[product["brand"] if name.startswith("Same-brand") else "all"] += product[
                "price"
            ]
        if sum(price // amounts(name)[1] for price in by_brand.values()) < count:
            return False
    return True
