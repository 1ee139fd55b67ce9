"""The 38 kinds of hard constraints of DeepPlanning's public queries: search and check.

What a constraint asks for is found in the tables by search (`solve`), which gives every choice that
meets it; a query uses it only where there is exactly one. A plan is checked by the names and
numbers of that choice, in the fields that the benchmark has for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, TypeAlias

from tutelage.envs.travel.plan import Intercity, Meal, Plan, Visit, cost_of
from tutelage.envs.travel.query import Constraint, Trip
from tutelage.envs.travel.rows import Attraction, Mode, Route, minutes
from tutelage.envs.travel.tables import Tables

Parameters: TypeAlias = Mapping[str, Any]
OUT, BACK = "outbound", "inbound"


@dataclass(frozen=True)
class Kind:
    """How one kind of constraint chooses among rows."""

    family: str
    """train, flight, hotel, restaurant, attraction or budget."""
    holds: Callable[[Any, Parameters], bool] = lambda row, asked: True
    """Whether a row is one of those that are compared."""
    order: Callable[[Any], float] | None = None
    """Of these, the one with the smallest value is meant; None: there is only one."""
    directions: tuple[tuple[str, ...], ...] = ()
    """Of trains and flights: the ways that it may be about, one of them in a query."""
    is_set: bool = False
    """Of attractions: all that hold are meant."""
    asks: tuple[str, ...] = field(default=())
    """Names of the parameters beside city, direction and attraction."""


def _departs_between(row: Any, asked: Parameters) -> bool:
    return bool(minutes(asked["from"]) <= row.departs <= minutes(asked["to"]))


def _arrives_between(row: Any, asked: Parameters) -> bool:
    return bool(minutes(asked["from"]) <= row.arrives <= minutes(asked["to"]))


def _has_seats(row: Any, asked: Parameters) -> bool:
    return row.seat_status is None or bool(row.seat_status >= asked["people_number"])


def _same(*names: str) -> Callable[[Any, Parameters], bool]:
    """Whether columns of a row have the values that are asked for."""
    return lambda row, asked: all(getattr(row, name) == asked[name] for name in names)


_ONE_WAY, _EITHER = ((OUT,),), ((OUT,), (BACK,))
_BACK, _BOTH = ((BACK,),), ((OUT, BACK),)
_SAME_TYPE = _same("attraction_type")


def _price(row: Any) -> float:
    return float(row.price)


def _departure(row: Any) -> float:
    return float(row.departs)


def _duration(row: Any) -> float:
    return float(row.duration)


def _worst_score(row: Any) -> float:
    return -float(row.score)


def _worst_rating(row: Any) -> float:
    return -float(row.rating)


def _meal_price(pair: Any) -> float:
    return float(pair[1].price_per_person)


def _on_mode(mode: Mode, name: str, **values: Any) -> dict[str, Kind]:
    return {f"{mode}_{name}": Kind(mode, **values)}


_TRANSPORT = {
    **_on_mode("train", "cheapest_direct", order=_price, directions=_EITHER),
    **_on_mode(
        "train",
        "cheapest_train_type",
        holds=_same("train_type"),
        order=_price,
        directions=_ONE_WAY,
        asks=("train_type",),
    ),
    **_on_mode(
        "train",
        "departure_time_range",
        holds=_departs_between,
        directions=_ONE_WAY,
        asks=("from", "to"),
    ),
    **_on_mode("train", "earliest_departure_direct", order=_departure, directions=_ONE_WAY),
    **_on_mode("train", "latest_arrival_direct", order=lambda row: -row.arrives, directions=_BACK),
    **_on_mode("train", "shortest_duration_direct", order=_duration, directions=_EITHER),
    **_on_mode("flight", "cheapest_direct", order=_price, directions=_ONE_WAY),
    **_on_mode(
        "flight",
        "cheapest_airline_direct",
        holds=_same("airline"),
        order=_price,
        directions=_ONE_WAY,
        asks=("airline",),
    ),
    **_on_mode(
        "flight",
        "cheapest_manufacturer_direct",
        holds=_same("manufacturer"),
        order=_price,
        directions=_ONE_WAY,
        asks=("manufacturer",),
    ),
    **_on_mode(
        "flight",
        "departure_time_range",
        holds=_departs_between,
        directions=_ONE_WAY,
        asks=("from", "to"),
    ),
    **_on_mode(
        "flight",
        "arrival_time_range",
        holds=_arrives_between,
        directions=_BACK,
        asks=("from", "to"),
    ),
    **_on_mode("flight", "earliest_departure_direct", order=_departure, directions=_ONE_WAY),
    **_on_mode(
        "flight",
        "earliest_airline_direct",
        holds=_same("airline"),
        order=_departure,
        directions=_ONE_WAY,
        asks=("airline",),
    ),
    **_on_mode("flight", "shortest_duration_direct", order=_duration, directions=_EITHER),
    **{
        f"{mode}_seat_class": Kind(
            mode, _same("seat_class"), directions=_BOTH, asks=("seat_class",)
        )
        for mode in ("train", "flight")
    },
    **{
        f"{mode}_seat_status": Kind(mode, _has_seats, directions=_BOTH, asks=("people_number",))
        for mode in ("train", "flight")
    },
}
_HOTELS = {
    "hotel_cheapest_brand": Kind("hotel", _same("brand"), _price, asks=("brand",)),
    "hotel_cheapest_star": Kind("hotel", _same("hotel_star"), _price, asks=("hotel_star",)),
    "hotel_highest_rated": Kind("hotel", order=_worst_score),
    "hotel_star_highest_rated": Kind(
        "hotel", _same("hotel_star"), _worst_score, asks=("hotel_star",)
    ),
    "hotel_brand_highest_rated": Kind("hotel", _same("brand"), _worst_score, asks=("brand",)),
    "hotel_newest_decoration": Kind(
        "hotel",
        lambda row, asked: row.decoration_time >= asked["year_threshold"],
        asks=("year_threshold",),
    ),
    "hotel_price_range": Kind(
        "hotel",
        lambda row, asked: asked["min_price"] <= row.price <= asked["max_price"],
        asks=("min_price", "max_price"),
    ),
    "hotel_star_service_required": Kind(
        "hotel",
        lambda row, asked: (
            row.hotel_star == asked["hotel_star"] and asked["required_service"] in row.services
        ),
        asks=("hotel_star", "required_service"),
    ),
}
_RESTAURANTS = {
    "restaurant_cheapest_nearby_attraction": Kind("restaurant", order=_meal_price),
    "restaurant_closest_to_attraction": Kind("restaurant", order=lambda pair: pair[0]),
    "restaurant_highest_rated": Kind("restaurant", order=lambda pair: -pair[1].rating),
    "restaurant_must_eat_named": Kind(
        "restaurant",
        lambda pair, asked: pair[1].restaurant_name == asked["restaurant_name"],
        asks=("restaurant_name",),
    ),
    "restaurant_specific_cuisine_nearby": Kind(
        "restaurant", lambda pair, asked: pair[1].cuisine == asked["cuisine"], asks=("cuisine",)
    ),
    "restaurant_specific_tag_nearby": Kind(
        "restaurant",
        lambda pair, asked: asked["required_tag"] in pair[1].tags,
        asks=("required_tag",),
    ),
}
_ATTRACTIONS = {
    "attraction_must_visit_named": Kind(
        "attraction",
        lambda row, asked: row.attraction_name in asked["attraction_names"],
        is_set=True,
        asks=("attraction_names",),
    ),
    "attraction_all_of_type": Kind(
        "attraction", _SAME_TYPE, is_set=True, asks=("attraction_type",)
    ),
    "attraction_all_free_attractions": Kind(
        "attraction", lambda row, asked: row.ticket_price == 0, is_set=True
    ),
    "attraction_type_highest_rated": Kind(
        "attraction", _SAME_TYPE, _worst_rating, asks=("attraction_type",)
    ),
    "attraction_top_rated_must_visit": Kind("attraction", order=_worst_rating, is_set=True),
}
KINDS = {
    **_TRANSPORT,
    **_HOTELS,
    **_RESTAURANTS,
    **_ATTRACTIONS,
    "budget_constraint": Kind("budget", asks=("max_budget",)),
}
"""Every kind by the name that the public queries have for it."""
NUM_TOP_RATED = 3


# --- search ---------------------------------------------------------------------------------------


def direct_routes(tables: Tables, trip: Trip, mode: Mode, direction: str) -> list[Route]:
    """The direct routes of the first or last leg of a trip."""
    day = 0 if direction == OUT else trip.num_days - 1
    found = tables.routes(mode, *trip.legs[day], trip.date(day))
    return [route for route in found if len(route) == 1]


def compared(tables: Tables, trip: Trip, kind: str, asked: Parameters) -> list[Any]:
    """The rows that a hotel, restaurant or attraction constraint is about.

    Restaurants come as pairs of the distance in meters and the row.
    """
    match KINDS[kind].family:
        case "hotel":
            rows: Sequence[Any] = [row for row in tables.hotels if row.city == asked["city"]]
        case "attraction":
            rows = [row for row in tables.attractions if row.city == asked["city"]]
        case _ if kind == "restaurant_must_eat_named":
            rows = [(0, row) for row in tables.restaurants]
        case _:
            rows = tables.near(tables.places[asked["attraction_name"]])
    return [row for row in rows if KINDS[kind].holds(row, asked)]


def solve(tables: Tables, trip: Trip, kind: str, asked: Parameters) -> list[dict[str, Any]]:
    """Every choice that meets a constraint, in the benchmark's fields; one, where it is unique."""
    spec = KINDS[kind]
    match spec.family:
        case "budget":
            return [{}]
        case "train" | "flight":
            return _solve_transport(tables, trip, spec, asked)
        case "hotel":
            best = _best(compared(tables, trip, kind, asked), spec)
            return [{"hotel_name": row.name, "hotel_price": row.price} for row in best]
        case "restaurant":
            best = _best(compared(tables, trip, kind, asked), spec)
            return [
                {"restaurant_name": row.name, "price_per_person": row.price_per_person}
                for _, row in best
            ]
    rows = compared(tables, trip, kind, asked)
    if kind == "attraction_top_rated_must_visit":
        return [_names(rows) for rows in _top_rated(rows)]
    if spec.is_set:
        return [_names(rows)] if rows else []
    return [_names([row]) for row in _best(rows, spec)]


def _solve_transport(
    tables: Tables, trip: Trip, spec: Kind, asked: Parameters
) -> list[dict[str, Any]]:
    """The combinations of trains or flights of every direction that is asked about."""
    mode: Mode = "train" if spec.family == "train" else "flight"
    found: list[dict[str, Any]] = [{}]
    for direction in asked["directions"]:
        legs = [route[0] for route in direct_routes(tables, trip, mode, direction)]
        best = _best([leg for leg in legs if spec.holds(leg, asked)], spec)
        found = [{**f, f"{direction}_{mode}_no": leg.number} for f in found for leg in best]
    return found


def _best(rows: list[Any], spec: Kind) -> list[Any]:
    if spec.order is None or not rows:
        return rows
    least = min(map(spec.order, rows))
    return [row for row in rows if spec.order(row) == least]


def _top_rated(rows: list[Attraction]) -> list[list[Attraction]]:
    """Every way to choose the three best; more than one where ratings are equal."""
    ranked = sorted(rows, key=_worst_rating)
    if len(ranked) < NUM_TOP_RATED:
        return []
    last = ranked[NUM_TOP_RATED - 1].rating
    sure = [row for row in ranked if row.rating > last]
    equal = [row for row in ranked if row.rating == last]
    return [[*sure, *more] for more in combinations(equal, NUM_TOP_RATED - len(sure))]


def _names(rows: Sequence[Attraction]) -> dict[str, Any]:
    return {
        "attraction_names": [row.name for row in rows],
        "attraction_ratings": [row.rating for row in rows],
    }


# --- check ----------------------------------------------------------------------------------------


def is_met(constraint: Constraint, plan: Plan, trip: Trip) -> bool:
    """Whether a plan has the choice that a constraint asks for."""
    spec, answer = KINDS[constraint.kind], constraint.answer
    match spec.family:
        case "budget":
            return cost_of(plan, trip) <= float(constraint.parameters["max_budget"])
        case "train" | "flight":
            return all(
                answer.get(f"{direction}_{spec.family}_no") in (None, *_numbers(plan, direction))
                for direction in (OUT, BACK)
            )
        case "hotel":
            city = constraint.parameters.get("city")
            nights = plan.days[: trip.num_days - 1]
            hotels = {
                day.hotel.name if day.hotel else ""
                for number, day in enumerate(nights)
                if city in (None, trip.night_city(number))
            }
            return hotels == {answer["hotel_name"]}
        case "restaurant":
            return answer["restaurant_name"] in [meal.name for meal in plan.of(Meal)]
    visited = {visit.name for visit in plan.of(Visit)}
    return visited.issuperset(answer["attraction_names"])


def _numbers(plan: Plan, direction: str) -> list[str]:
    """Numbers of the trains and flights of the first or last day."""
    days = plan.days[:1] if direction == OUT else plan.days[-1:]
    return [leg.number for day in days for leg in day.of(Intercity)]
