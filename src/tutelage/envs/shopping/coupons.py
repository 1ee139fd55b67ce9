"""Coupons: their names, the rules for using them, and every way to use what a user owns.

A coupon takes its discount off once for every time that its threshold is reached:

- The thresholds of all coupons in use add up to at most the cart's price.
- A coupon counts only the products that list it under `applicable_coupons`; its thresholds add up
  to at most their price.
- A same-brand coupon reaches its threshold with the products of one brand.
- A VIP coupon is for users who are VIPs.

The benchmark's published tools check the first and the last of these.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Coupon:
    """A discount for every time that a threshold is reached; both in yuan."""

    name: str
    kind: str
    discount: int
    threshold: int


def _coupon(kind: str, discount: int, threshold: int) -> Coupon:
    return Coupon(f"{kind}: ¥{discount} off every ¥{threshold:,}", kind, discount, threshold)


COUPONS = {
    coupon.name: coupon
    for coupon in (
        _coupon("Cross-store", 30, 300),
        _coupon("Cross-store", 60, 500),
        _coupon("Cross-store", 120, 900),
        _coupon("Cross-store", 200, 1200),
        _coupon("Cross-store", 300, 1500),
        _coupon("Same-brand", 25, 200),
        _coupon("Same-brand", 60, 400),
        _coupon("Same-brand", 180, 1000),
        _coupon("Same-brand", 300, 1200),
        _coupon("VIP", 200, 1000),
    )
}
"""The benchmark's coupons by name."""


def discount_of(used: Mapping[str, int]) -> int:
    """What coupons take off, in yuan."""
    return sum(COUPONS[name].discount * quantity for name, quantity in used.items())


def threshold_of(used: Mapping[str, int]) -> int:
    """The sum of the thresholds of coupons, in yuan."""
    return sum(COUPONS[name].threshold * quantity for name, quantity in used.items())


def why_unusable(
    used: Mapping[str, int], items: Sequence[tuple[Mapping[str, Any], int]], has_scopes: bool
) -> str:
    """Why coupons cannot be used with these products and quantities; "" if they can.

    Args:
        used: quantities by coupon name.
        items: products and their quantities.
        has_scopes: whether a coupon counts only products that list it, and a same-brand coupon
            those of one brand.
    """
    total = sum(product["price"] * quantity for product, quantity in items)
    if total < threshold_of(used):
        return (
            f"the cart's price of {total:g} is below the sum of the coupons' thresholds, "
            f"{threshold_of(used)}"
        )
    for name, quantity in used.items() if has_scopes else ():
        most = _most_uses(COUPONS[name], items)
        if quantity > most:
            return f"the products in the cart allow {most} of {name!r}, not {quantity}"
    return ""


def _most_uses(coupon: Coupon, items: Sequence[tuple[Mapping[str, Any], int]]) -> int:
    """How often the products that list a coupon reach its threshold."""
    prices: dict[str, float] = {}
    for product, quantity in items:
        if coupon.name in product["applicable_coupons"]:
            group = product["brand"] if coupon.kind == "Same-brand" else ""
            prices[group] = prices.get(group, 0) + product["price"] * quantity
    return sum(int(price // coupon.threshold) for price in prices.values())


def every_use(owned: Mapping[str, int], is_vip: bool) -> list[dict[str, int]]:
    """Every choice among owned coupons, none of them included."""
    usable = [name for name in owned if is_vip or COUPONS[name].kind != "VIP"]
    counts: Iterable[tuple[int, ...]] = itertools.product(*(range(owned[n] + 1) for n in usable))
    return [
        {name: count for name, count in zip(usable, chosen, strict=True) if count}
        for chosen in counts
    ]
