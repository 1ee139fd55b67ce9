"""From what a query asks for to the choices that a plan is composed around."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tutelage.envs.travel.constraints import BACK, KINDS, OUT, solve
from tutelage.envs.travel.planner import Choices
from tutelage.envs.travel.query import Trip
from tutelage.envs.travel.rows import Hotel, Mode, Route
from tutelage.envs.travel.tables import Tables

_MODES: tuple[Mode, ...] = ("train", "flight")


def choose(
    tables: Tables, trip: Trip, asked: Iterable[tuple[str, Mapping[str, Any]]]
) -> Choices | None:
    """The only choices that meet what is asked for, and the cheapest for what is left free.

    None where something that is asked for, or a train for a free leg, or a hotel, is missing.
    """
    answers: list[tuple[str, dict[str, Any]]] = []
    for kind, parameters in asked:
        found = solve(tables, trip, kind, parameters)
        if len(found) != 1:
            return None
        answers.append((kind, found[0]))
    routes = {day: _route(tables, trip, day, answers) for day in trip.legs}
    hotels = {stay.city: _hotel(tables, stay.city, answers) for stay in trip.stays}
    sights = dict.fromkeys(name for _, a in answers for name in a.get("attraction_names", ()))
    meals = dict.fromkeys(a["restaurant_name"] for _, a in answers if "restaurant_name" in a)
    if None in routes.values() or None in hotels.values():
        return None
    return Choices(
        {day: route for day, route in routes.items() if route},
        {city: hotel for city, hotel in hotels.items() if hotel},
        tuple(tables.attraction_by_name[name] for name in sights),
        tuple(tables.restaurant_by_name[name] for name in meals),
    )


def _route(
    tables: Tables, trip: Trip, day: int, answers: list[tuple[str, dict[str, Any]]]
) -> Route | None:
    """The train or flight of a leg that is asked for, or the cheapest train at a good time."""
    where = {0: OUT, trip.num_days - 1: BACK}.get(day)
    for mode in _MODES:
        routes = tables.routes(mode, *trip.legs[day], trip.date(day))
        for kind, answer in answers:
            number = answer.get(f"{where}_{mode}_no")
            if number is not None and KINDS[kind].family == mode:
                return next(r for r in routes if len(r) == 1 and r[0].number == number)
    routes = tables.routes("train", *trip.legs[day], trip.date(day))
    return min(
        (route for route in routes if len(route) == 1 and _has_seats(route, trip.people)),
        key=lambda route: (_is_badly_timed(route, day, trip), route[0].price, route[0].number),
        default=None,
    )


def _has_seats(route: Route, people: int) -> bool:
    return route[0].seat_status is None or route[0].seat_status >= people


def _is_badly_timed(route: Route, day: int, trip: Trip) -> bool:
    """A return before the evening, or a journey there that takes more than the morning."""
    if day == trip.num_days - 1:
        return route[0].departs < 15 * 60
    return route[0].arrives > 14 * 60 or (day > 0 and route[0].departs < 7 * 60)


def _hotel(tables: Tables, city: str, answers: list[tuple[str, dict[str, Any]]]) -> Hotel | None:
    """The hotel that is asked for, or the cheapest one."""
    for _, answer in answers:
        hotel = tables.hotel_by_name.get(answer.get("hotel_name", ""))
        if hotel is not None and hotel.city == city:
            return hotel
    hotels = [hotel for hotel in tables.hotels if hotel.city == city]
    return min(hotels, key=lambda hotel: (hotel.price, hotel.name), default=None)
