"""Products with the benchmark's fields, and how a random one is drawn."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, TypeAlias

from tutelage.data.tasks.draws import below, between, pick, shuffled
from tutelage.envs.shopping import words
from tutelage.envs.shopping.coupons import COUPONS
from tutelage.envs.shopping.transport import PROVIDERS, PROVINCES

Product: TypeAlias = dict[str, Any]
"""One record of a catalogue; never changed once it is in a world."""

STARS = ("five_star", "four_star", "three_star", "two_star", "one_star")
"""Keys of `rating` with the numbers of reviews, from the best to the worst."""
_SHIPPERS = tuple(name for name in PROVIDERS if name != "default")


def field_of(product: Mapping[str, Any], key: str) -> Any:
    """A field by its dotted name, such as sales_volume.monthly; None where there is none."""
    value: Any = product
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def draw_product(rng: random.Random, fixed: Mapping[str, Any]) -> Product:
    """A random product, without an id yet.

    Args:
        rng: the stream.
        fixed: fields that are given: brand, color, size, suitable_season, target_demographic,
            `line` (the middle of the name) and `kind` (a `words.Kind`).
    """
    kind = fixed.get("kind") or pick(
        [kind for kind in words.KINDS if fixed.get("size", kind.sizes[0]) in kind.sizes], rng
    )
    line = fixed.get("line") or f"{pick(words.LINE_STARTS, rng)} {pick(words.LINE_ENDS, rng)}"
    audience = fixed.get("target_demographic") or pick(words.AUDIENCES, rng)
    return {
        "product_id": "",
        "name": f"{audience}'s {line} {kind.name}",
        "brand": fixed.get("brand") or pick(words.BRANDS, rng),
        "category": kind.category,
        "color": fixed.get("color") or pick(words.COLORS, rng),
        "size": fixed.get("size") or pick(kind.sizes, rng),
        "suitable_season": fixed.get("suitable_season") or pick(words.SEASONS, rng),
        "target_demographic": audience,
        "tags": list(shuffled(words.TAGS, rng)[:2]),
        "price": between(kind.prices[0], kind.prices[1], rng),
        "stock_quantity": between(5, 500, rng),
        "sales_volume": _draw_sales(rng),
        "rating": rating_of(_draw_counts(rng)),
        "shipping_info": draw_shipping(rng),
        "applicable_coupons": [name for name in COUPONS if rng.random() < 0.25],
    }


def _draw_sales(rng: random.Random) -> dict[str, int]:
    monthly = between(20, 1500, rng)
    return {"monthly": monthly, "total": monthly * between(3, 14, rng) + below(100, rng)}


def _draw_counts(rng: random.Random) -> list[int]:
    best = between(40, 900, rng)
    shares = ((5, 30), (1, 10), (0, 5), (0, 4))
    return [best, *(best * between(low, high, rng) // 100 for low, high in shares)]


def draw_shipping(rng: random.Random) -> dict[str, str]:
    """Where a product is sent from, and by whom."""
    return {"origin": pick(PROVINCES, rng), "provider": pick(_SHIPPERS, rng)}


def rating_of(counts: list[int]) -> dict[str, float | int]:
    """The rating with these numbers of reviews, the best first; the average to one decimal."""
    total = sum(counts)
    points = sum(stars * count for stars, count in zip((5, 4, 3, 2, 1), counts, strict=True))
    average = (20 * points + total) // (2 * total) / 10 if total else 0.0
    return {
        "average_score": average,
        "total_reviews": total,
        **dict(zip(STARS, counts, strict=True)),
    }
