"""Draws countries and queries whose constraints, but the budget, are met by one choice each."""

from __future__ import annotations

import datetime
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.data.tasks.draws import below, between, is_held_out, pick, shuffled
from tutelage.envs.travel.choices import choose
from tutelage.envs.travel.commonsense import violations
from tutelage.envs.travel.constraints import KINDS, compared, direct_routes, is_met, solve
from tutelage.envs.travel.country import FIRST_CLASS, Wishes, make_tables
from tutelage.envs.travel.names import (
    AIRLINES,
    BRANDS,
    CUISINES,
    MAKERS,
    SERVICES,
    SIGHTS,
    TAGS,
    TRAIN_TYPES,
    Names,
)
from tutelage.envs.travel.plan import Plan
from tutelage.envs.travel.planner import compose
from tutelage.envs.travel.query import Constraint, Query, Stay, Trip
from tutelage.envs.travel.rows import Mode, clock
from tutelage.envs.travel.tables import Tables
from tutelage.envs.travel.wording import write_query

_DAYS = {1: (2, 3), 2: (4, 5), 3: (6, 7)}
_NUM_CONSTRAINTS = {1: (3, 4), 2: (3, 5), 3: (4, 6)}
_MOST = {"hotel": 1, "restaurant": 2, "attraction": 2, "budget": 1}
"""How many constraints of a family a query has at most; of trains and flights one a direction."""
_LARGEST_SET = 3
LEVELS = tuple(_DAYS)


@dataclass(frozen=True)
class World:
    """A country and what is asked for in it."""

    tables: Tables
    query: Query


def make_world(identity: str, level: int, is_held_out: bool) -> World:
    """The world of a prompt: a pure function of the arguments.

    Args:
        identity: seeds all draws.
        level: 1 for 2 to 3 days, 2 for 4 to 5, 3 for 6 to 7 and one or two cities.
        is_held_out: the side of the pair of cities that the trip begins with; see `_is_held_out`.
    """
    for attempt in itertools.count():
        rng = random.Random(f"travel{level}/{identity}/{attempt}")  # the same on every machine
        world = draw_world(level, is_held_out, _draw_kinds(level, rng), rng)
        if world is not None:
            return world
    raise AssertionError("itertools.count() has no end")


def draw_world(
    level: int, is_held_out: bool, kinds: Sequence[str], rng: random.Random
) -> World | None:
    """A country with constraints of these kinds; None where it has none that one choice meets."""
    names = Names(rng)
    trip = _draw_trip(level, names, rng, is_held_out)
    tables = make_tables(trip, rng, names, _wishes(kinds))
    constraints = _draw_constraints(tables, trip, kinds, rng)
    if constraints is None:
        return None
    return World(tables, Query(trip, constraints, write_query(trip, constraints, rng)))


def _draw_kinds(level: int, rng: random.Random) -> tuple[str, ...]:
    """Kinds that can stand beside one another, in the order in which a text has them."""
    number = between(*_NUM_CONSTRAINTS[level], rng)
    found: list[str] = []
    for kind in shuffled(tuple(KINDS), rng):
        if len(found) < number and _fits(kind, found):
            found.append(kind)
    return tuple(kind for kind in KINDS if kind in found)


def _fits(kind: str, others: list[str]) -> bool:
    family = KINDS[kind].family
    if family in _MOST:
        return sum(KINDS[other].family == family for other in others) < _MOST[family]
    # A direction that every way of the one kind has must not be in any way of the other.
    transport = [KINDS[k].directions for k in (*others, kind) if KINDS[k].directions]
    return any(
        len(set(itertools.chain(*ways))) == sum(map(len, ways))
        for ways in itertools.product(*transport)
    )


def _draw_trip(level: int, names: Names, rng: random.Random, is_held_out: bool) -> Trip:
    origin, city = names.city(), names.city()
    while _is_held_out(origin, city) != is_held_out:
        origin, city = names.city(), names.city()
    nights = between(*_DAYS[level], rng) - 1
    stays: tuple[Stay, ...] = (Stay(city, nights),)
    if level == LEVELS[-1] and rng.random() < 0.5:
        stays = (Stay(city, nights // 2), Stay(names.city(), nights - nights // 2))
    first = datetime.date(2026, 3, 2) + datetime.timedelta(days=below(600, rng))
    people = between(1, 5, rng)
    return Trip(origin, stays, first.isoformat(), people, (people + 1) // 2)


def _is_held_out(origin: str, city: str) -> bool:
    """The side of a trip: every text has both names, so the sides have no text in common."""
    return is_held_out(f"{origin} {city}")


def _wishes(kinds: Sequence[str]) -> Wishes:
    modes: tuple[Mode, ...] = ("train", "flight")
    return Wishes(
        frozenset(mode for mode in modes if f"{mode}_seat_class" in kinds),
        frozenset(mode for mode in modes if f"{mode}_seat_status" in kinds),
    )


# --- constraints ----------------------------------------------------------------------------------


def _draw_constraints(
    tables: Tables, trip: Trip, kinds: Sequence[str], rng: random.Random
) -> tuple[Constraint, ...] | None:
    """Constraints of these kinds, met by one choice each and together by a plan; or None."""
    found: list[Constraint] = []
    free = {"outbound", "inbound"}
    for kind in sorted(kinds, key=lambda kind: len(KINDS[kind].directions) == 2):
        constraint = _draw_constraint(tables, trip, kind, free, rng)
        if constraint is None:
            return None
        free -= set(constraint.parameters.get("directions", ()))
        found.append(constraint)
    found.sort(key=lambda constraint: kinds.index(constraint.kind))
    if _is_any_implied(found):
        return None
    choices = choose(tables, trip, ((c.kind, c.parameters) for c in found))
    plan = compose(tables, trip, choices) if choices is not None else None
    if plan is None or any(violations(plan, trip, tables).values()):
        return None
    found = [_with_budget(c, plan, rng) for c in found]
    return tuple(found) if all(is_met(c, plan, trip) for c in found) else None


def _draw_constraint(
    tables: Tables, trip: Trip, kind: str, free: set[str], rng: random.Random
) -> Constraint | None:
    """The first constraint of a kind with exactly one solution."""
    for asked in shuffled(tuple(_options(tables, trip, kind, free, rng)), rng):
        answers = solve(tables, trip, kind, asked)
        if len(answers) == 1 and _is_a_choice(tables, trip, kind, asked):
            names = answers[0].get("attraction_names", ())
            if len(names) <= _LARGEST_SET:
                return Constraint(kind, asked, answers[0])
    return None


def _is_a_choice(tables: Tables, trip: Trip, kind: str, asked: Mapping[str, Any]) -> bool:
    """Whether "the cheapest" and the like are said of at least two."""
    spec = KINDS[kind]
    if spec.order is None:
        return True
    if not spec.directions:
        return len(compared(tables, trip, kind, asked)) > 1
    mode: Mode = "train" if spec.family == "train" else "flight"
    routes = direct_routes(tables, trip, mode, asked["directions"][0])
    return sum(spec.holds(route[0], asked) for route in routes) > 1


def _options(
    tables: Tables, trip: Trip, kind: str, free: set[str], rng: random.Random
) -> Iterator[dict[str, Any]]:
    """What a constraint of a kind might ask for."""
    spec = KINDS[kind]
    city = pick(trip.stays, rng).city
    frames: list[dict[str, Any]] = [{"city": city}]
    if spec.directions:
        frames = [{"directions": list(way)} for way in spec.directions if free.issuperset(way)]
    elif spec.family == "budget":
        frames = [{}]
    elif spec.family == "restaurant" and kind != "restaurant_must_eat_named":
        sights = [sight.name for sight in tables.attractions if sight.city == city]
        frames = [{"attraction_name": name} for name in sights]
    for frame in frames:
        for values in _values(spec.asks, tables, trip, city, rng):
            yield {**frame, **dict(zip(spec.asks, values, strict=True))}


def _values(
    asks: tuple[str, ...], tables: Tables, trip: Trip, city: str, rng: random.Random
) -> Iterator[tuple[Any, ...]]:
    """Values for the parameters of a kind."""
    match asks:
        case ("from", "to"):
            for start in range(6, 22):
                yield from ((clock(60 * start), clock(60 * (start + n))) for n in (1, 2, 3))
        case ("min_price", "max_price"):
            for low in range(100, 700, 10):
                yield from ((low, low + width) for width in (30, 40, 50))
        case ("restaurant_name",):
            yield from ((r.name,) for r in tables.restaurants if r.city == city)
        case ("attraction_names",):
            names = shuffled([s.name for s in tables.attractions if s.city == city], rng)
            yield from (([first, second],) for first, second in itertools.pairwise(names))
        case ("people_number",):
            yield (trip.people,)
        case ("seat_class",):
            yield from ((name,) for name in FIRST_CLASS.values())
        case ("max_budget",):
            yield (0,)
        case _:
            yield from itertools.product(*(_LISTED[name] for name in asks))


_LISTED: dict[str, Sequence[Any]] = {
    "train_type": tuple(TRAIN_TYPES),
    "airline": tuple(name for name, _ in AIRLINES),
    "manufacturer": tuple(MAKERS),
    "brand": BRANDS,
    "hotel_star": (2, 3, 4, 5),
    "required_service": SERVICES,
    "year_threshold": (2022, 2023, 2024, 2025, 2026),
    "cuisine": CUISINES,
    "required_tag": TAGS,
    "attraction_type": tuple(SIGHTS),
}
"""The values that a parameter can have, whatever the country."""


def _is_any_implied(constraints: Sequence[Constraint]) -> bool:
    """Whether a plan that meets all constraints but one meets that one too."""
    meals = [c.answer["restaurant_name"] for c in constraints if "restaurant_name" in c.answer]
    sights = [set(c.answer.get("attraction_names", ())) for c in constraints]
    sights = [names for names in sights if names]
    is_covered = any(
        names <= set().union(*sights[:place], *sights[place + 1 :])
        for place, names in enumerate(sights)
    )
    return is_covered or len(set(meals)) < len(meals)


def _with_budget(constraint: Constraint, plan: Plan, rng: random.Random) -> Constraint:
    """A budget that a known plan keeps, with up to a tenth to spare; others as they are."""
    if constraint.kind != "budget_constraint":
        return constraint
    limit = 50 * (int(plan.total_cost * (1.02 + 0.08 * rng.random())) // 50 + 1)
    return Constraint(constraint.kind, {"max_budget": limit})
