"""Scores of a cart against the one that was asked for.

`exact` is 1 for the same products and coupons in the same quantities and nothing else. `f1` is that
of the two multisets of single products and coupons, 0 for an empty cart. `match_rate` and
`case_score` are the benchmark's: the share of the expected products that are in the cart (in any
quantity) and of the expected coupons that are used in the expected quantity, and whether that is
all of them. Whatever else is in the cart costs nothing there: a cart with the whole catalogue has a
case score of 1, on level 3 with the right coupons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from tutelage.data.types import Outcome
from tutelage.envs.shopping.query import Solution


def score_cart(
    products: Mapping[str, int], coupons: Mapping[str, int], expected: Solution
) -> Outcome:
    """The outcome of a conversation that ended with these quantities in the cart."""
    is_exact = dict(products) == expected.products and dict(coupons) == expected.coupons
    held = _units(products, coupons)
    wanted = _units(expected.products, expected.coupons)
    f1 = 2 * (held & wanted).total() / (held.total() + wanted.total())
    matched = sum(key in products for key in expected.products)
    matched += sum(coupons.get(name) == count for name, count in expected.coupons.items())
    num_expected = len(expected.products) + len(expected.coupons)
    details: dict[str, float | int | str] = {
        "exact": float(is_exact),
        "f1": f1,
        "match_rate": matched / num_expected,
        "case_score": float(matched == num_expected),
        "num_extra": (held - wanted).total(),
    }
    return Outcome(f1, is_exact, details)


def _units(products: Mapping[str, int], coupons: Mapping[str, int]) -> Counter[tuple[str, str]]:
    """Single products and coupons with how many there are of each."""
    units = {("product", key): count for key, count in products.items()}
    return Counter(units | {("coupon", name): count for name, count in coupons.items()})
