"""The products around one slot of a query: those that satisfy it, and near misses."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.data.tasks.draws import below, between, pick, shuffled
from tutelage.envs.shopping import words
from tutelage.envs.shopping.catalogue import (
    STARS,
    Product,
    draw_product,
    draw_shipping,
    field_of,
    rating_of,
)
from tutelage.envs.shopping.query import FILTER_KEYS, RANGE_KEYS, TRANSPORT, Constraint, Slot, fits
from tutelage.envs.shopping.transport import transport_days

_TRIES = 8
_UPPER = ("price", "rating.three_star", "rating.two_star", "rating.one_star")
"""Keys of numbers that have to be small; the others have to be large."""


@dataclass(frozen=True)
class Wish:
    """What a query asks of one product in words."""

    constraints: Slot
    """On words, sorted by key."""
    fixed: Mapping[str, Any]
    """The fields that they fix, as `draw_product` takes them."""


@dataclass(frozen=True)
class Group:
    """A slot and the products drawn around it."""

    slot: Slot
    fitting: tuple[Product, ...]
    near_misses: tuple[Product, ...]
    """Each fails exactly one constraint; every constraint is failed by one of them."""


def draw_wish(rng: random.Random) -> Wish:
    """One or two of name, brand, color and size, sometimes with a season or an audience."""
    keys = [*shuffled(("name", "brand", "color", "size"), rng)[: between(1, 2, rng)]]
    kind = pick(words.KINDS, rng)
    line = f"{pick(words.LINE_STARTS, rng)} {pick(words.LINE_ENDS, rng)}"
    values = {
        "name": line,
        "brand": pick(words.BRANDS, rng),
        "color": pick(words.COLORS, rng),
        "size": pick(kind.sizes, rng),
        "suitable_season": pick(words.SEASONS, rng),
        "target_demographic": pick(words.AUDIENCES, rng),
    }
    keys += ["suitable_season"] if rng.random() < 0.35 else []
    keys += ["target_demographic"] if rng.random() < 0.3 else []
    fixed: dict[str, Any] = {key: values[key] for key in keys if key != "name"}
    if "name" in keys:
        fixed["line"] = line
        if rng.random() < 0.35:
            fixed["kind"] = kind
            values["name"] = f"{line} {kind.name}"
    constraints = [
        Constraint(key, "contains" if key == "name" else "is", values[key]) for key in sorted(keys)
    ]
    return Wish(tuple(constraints), fixed)


def draw_group(
    rng: random.Random,
    wish: Wish,
    province: str,
    *,
    has_price: bool,
    num_fitting: int,
    num_near_misses: int,
) -> Group:
    """A slot with thresholds that one product passes, and the products around it."""
    while True:
        group = _try_group(rng, wish, province, has_price, num_fitting, num_near_misses)
        if group is not None:
            return group


def _try_group(
    rng: random.Random,
    wish: Wish,
    province: str,
    has_price: bool,
    num_fitting: int,
    num_near_misses: int,
) -> Group | None:
    model = draw_product(rng, wish.fixed)
    numbers = _draw_thresholds(rng, model, province, has_price, max(1, 3 - len(wish.constraints)))
    if numbers is None:
        return None
    slot = (*wish.constraints, *numbers)
    fitting = [model] if fits(slot, model, province) else []
    while len(fitting) < num_fitting:
        product = _fitting(rng, slot, model, wish.fixed, province)
        fitting += [product] if fits(slot, product, province) else []
    # Further ones fail what a filter tests: the details of products are long.
    filtered = [c for c in slot if c.key in (*FILTER_KEYS, *RANGE_KEYS)]
    failed = [*slot, *(pick(filtered, rng) for _ in range(num_near_misses - len(slot)))]
    near_misses = []
    for constraint in failed:
        near_miss = _near_miss(rng, slot, model, wish.fixed, province, constraint)
        if near_miss is None:
            return None
        near_misses.append(near_miss)
    return Group(slot, tuple(fitting), tuple(near_misses))


# Thresholds


def _draw_thresholds(
    rng: random.Random, model: Product, province: str, has_price: bool, fewest: int
) -> list[Constraint] | None:
    """Constraints on numbers, all of which the model passes; None if its numbers do not allow."""
    keys = ["stock_quantity", "sales_volume.monthly", "sales_volume.total"]
    keys += ["rating.average_score", "rating.total_reviews", *(f"rating.{s}" for s in STARS)]
    keys += ["price"] if has_price else []
    chosen = shuffled(keys, rng)[: between(fewest, 3, rng)]
    found = [_draw_threshold(rng, key, field_of(model, key)) for key in chosen]
    if rng.random() < 0.45:
        days = transport_days(model, province)
        found.append(Constraint(TRANSPORT, "<", days + 1) if days < 4 else None)
    return None if None in found else [constraint for constraint in found if constraint]


def _draw_threshold(rng: random.Random, key: str, value: float) -> Constraint | None:
    """A round number that the value passes."""
    if key == "rating.average_score":
        return Constraint(key, ">", round(value - 0.1, 1)) if value > 4.2 else None
    is_upper = key in _UPPER
    step = next(s for limit, s in ((100, 5), (1000, 10), (5000, 50), (10**9, 100)) if value < limit)
    if is_upper:
        bound = (int(value * (1.05 + 0.2 * rng.random())) // step + 1) * step
        return Constraint(key, "<", bound)
    bound = int(value * (0.75 + 0.2 * rng.random())) // step * step
    return Constraint(key, ">", bound) if 0 < bound < value else None


# Products


def _fitting(
    rng: random.Random, slot: Slot, model: Product, fixed: Mapping[str, Any], province: str
) -> Product:
    """A product with the words and, where they are asked for, numbers at least as good as the
    model's; almost always it satisfies the slot."""
    product = draw_product(rng, fixed)
    keys = {constraint.key for constraint in slot}
    if "price" in keys:
        product["price"] = model["price"] - below(model["price"] // 8, rng)
    if "stock_quantity" in keys:
        product["stock_quantity"] = model["stock_quantity"] + below(60, rng)
    if any(key.startswith("sales_volume.") for key in keys):
        product["sales_volume"] = {
            key: value + below(value // 4 + 1, rng) for key, value in model["sales_volume"].items()
        }
    if any(key.startswith("rating.") for key in keys):
        best, good, *bad = (model["rating"][star] for star in STARS)
        best, good = best + below(best // 4 + 1, rng), good + below(good // 8 + 1, rng)
        product["rating"] = rating_of([best, good, *(n - below(n // 2 + 1, rng) for n in bad)])
    if TRANSPORT in keys:
        constraint = next(c for c in slot if c.key == TRANSPORT)
        _draw_shipping_until(rng, product, constraint, province, holds=True)
    return product


def _near_miss(
    rng: random.Random,
    slot: Slot,
    model: Product,
    fixed: Mapping[str, Any],
    province: str,
    failed: Constraint,
) -> Product | None:
    """A product that fails this constraint and no other one; None if none was found."""
    for _ in range(_TRIES):
        is_word = failed.operator in ("is", "contains")
        altered = _altered(rng, fixed, failed.key) if is_word else fixed
        product = _fitting(rng, slot, model, altered, province)
        if not is_word:
            _worsen(rng, product, failed, province)
        if [c for c in slot if not c.holds(product, province)] == [failed]:
            return product
    return None


def _altered(rng: random.Random, fixed: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The fixed fields with another value for one of them, which is not the one for all seasons."""
    if key == "name":
        start, _, end = fixed["line"].partition(" ")
        return {**fixed, "line": f"{start} {_other(words.LINE_ENDS, end, rng)}"}
    values: dict[str, tuple[str, ...]] = {
        "size": next(k.sizes for k in words.KINDS if fixed.get("size", "S") in k.sizes),
        "brand": words.BRANDS,
        "color": words.COLORS,
        "suitable_season": tuple(s for s in words.SEASONS if s != words.ALL_SEASONS),
        "target_demographic": words.AUDIENCES,
    }
    return {**fixed, key: _other(values[key], fixed[key], rng)}


def _other(values: Sequence[str], value: str, rng: random.Random) -> str:
    """One of the values that is not the given one."""
    return pick([v for v in values if v != value], rng)


def _worsen(rng: random.Random, product: Product, failed: Constraint, province: str) -> None:
    """Move one number to the wrong side of its threshold."""
    group, _, star = failed.key.partition(".")
    if failed.key == TRANSPORT:
        _draw_shipping_until(rng, product, failed, province, holds=False)
    elif group == "rating":
        _worsen_rating(rng, product, star, failed)
    elif group == "sales_volume":
        product[group] = {**product[group], star: _wrong(rng, failed)}
    else:
        product[group] = _wrong(rng, failed)


def _wrong(rng: random.Random, failed: Constraint) -> int:
    bound = int(failed.value)
    if failed.operator == "<":
        return bound + below(max(2, bound // 4), rng)
    return bound - below(bound // 4 + 1, rng)


def _worsen_rating(rng: random.Random, product: Product, field: str, failed: Constraint) -> None:
    counts = [product["rating"][star] for star in STARS]
    if field == "average_score":
        while rating_of(counts)["average_score"] > float(failed.value) and counts[0] > 1:
            moved = counts[0] // 20 + 1
            counts[0], counts[3] = counts[0] - moved, counts[3] + moved
    elif field == "total_reviews":
        wanted, total = _wrong(rng, failed), sum(counts)
        counts = [count * wanted // total for count in counts]
    else:
        counts[STARS.index(field)] = _wrong(rng, failed)
    product["rating"] = rating_of(counts)


def _draw_shipping_until(
    rng: random.Random, product: Product, constraint: Constraint, province: str, holds: bool
) -> None:
    """Draw where the product comes from until the constraint on days holds, or fails."""
    while constraint.holds(product, province) != holds:
        product["shipping_info"] = draw_shipping(rng)
