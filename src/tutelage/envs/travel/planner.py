"""Composes a plan around given choices: which day for what, in which order, and when.

The scripted agent uses it on the rows that tools returned, and the generator to prove that a query
can be solved at all. It is no part of the score.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Any

from tutelage.envs.travel.commonsense import (
    BOARDING,
    DINNER,
    LEAVING,
    LUNCH,
    is_due,
    num_sights_due,
    open_minutes,
)
from tutelage.envs.travel.day import Frame, Meals, compose_day, serves, travel
from tutelage.envs.travel.plan import (
    Activity,
    AtHotel,
    Day,
    Intercity,
    Meal,
    Plan,
    Room,
    Travel,
    cost_of,
)
from tutelage.envs.travel.query import Trip
from tutelage.envs.travel.rows import Attraction, Hotel, Restaurant, Route, clock
from tutelage.envs.travel.tables import Tables

_MORNING, _NIGHT = 8 * 60 + 30, 23 * 60
_MOST_ATTRACTIONS = 3
_MEAL = 60
_WAYS = 12
"""How many distributions of attractions over the days, and of meals, are tried."""


@dataclass(frozen=True)
class Choices:
    """What a plan has to have."""

    routes: dict[int, Route]
    """By the day (from 0) of the leg."""
    hotels: dict[str, Hotel]
    """By city."""
    attractions: tuple[Attraction, ...] = ()
    restaurants: tuple[Restaurant, ...] = ()


@dataclass
class _Composer:
    tables: Tables
    trip: Trip
    choices: Choices
    days: dict[tuple[Any, ...], tuple[Activity, ...] | None] = field(default_factory=dict)
    """Days that were composed, by what they had to have."""


def compose(tables: Tables, trip: Trip, choices: Choices) -> Plan | None:
    """A plan with these choices that follows common sense; None where none was found."""
    frames = [_frame(tables, trip, choices, number) for number in range(trip.num_days)]
    if None in frames:
        return None
    composer = _Composer(tables, trip, choices)
    kept = [frame for frame in frames if frame is not None]
    for sights in islice(_sight_ways(composer, kept), _WAYS):
        for meals in islice(_meal_ways(composer, kept), _WAYS):
            days = _compose_days(composer, kept, sights, meals)
            if days is not None:
                return _as_plan(composer, days)
    return None


def first_sights(tables: Tables, trip: Trip, choices: Choices) -> list[Attraction]:
    """The attractions that a plan will most likely have, whatever the meals."""
    frames = [_frame(tables, trip, choices, number) for number in range(trip.num_days)]
    kept = [frame for frame in frames if frame is not None]
    ways = _sight_ways(_Composer(tables, trip, choices), kept)
    return [sight for sights in next(ways, []) for sight in sights]


def _frame(tables: Tables, trip: Trip, choices: Choices, number: int) -> Frame | None:
    """When and where a day begins and ends in a destination."""
    leg, city = trip.legs.get(number), trip.night_city(number)
    last = choices.hotels[trip.night_city(number - 1)].name if number else ""
    if leg is None:
        return Frame(number, city, last, _MORNING, last, _NIGHT, True, True, 2)
    route = choices.routes[number]
    arrival = route[-1].arrives
    if number == trip.num_days - 1:
        leaves = route[0].departs
        end = leaves - BOARDING[route[0].mode]
        time = [(0, leaves)]
        return Frame(
            *(number, leg[0], last, min(_MORNING, end - 60), route[0].dep_station_name, end),
            *(is_due(LUNCH, time), is_due(DINNER, time), num_sights_due(time, True)),
        )
    time = [(arrival, 1440)] if number == 0 else [(0, route[0].departs), (arrival, 1440)]
    before: tuple[Activity, ...] = tuple(_ride(route))
    if number:
        way = _travel_until(tables, last, route)
        if way is None or is_due(LUNCH, time[:1]):
            return None
        before = (way, *before)
    hotel = choices.hotels[city].name
    start = arrival + LEAVING[route[-1].mode]
    return Frame(
        *(number, city, route[-1].arr_station_name, start, hotel, _NIGHT),
        *(is_due(LUNCH, time), is_due(DINNER, time), num_sights_due(time, True), before),
    )


def _ride(route: Route) -> Iterator[Intercity]:
    for leg in route:
        yield Intercity(
            start=clock(leg.departs),
            end=clock(leg.arrives),
            mode=leg.mode,
            number=leg.number,
            origin=leg.dep_station_name,
            destination=leg.arr_station_name,
            cost=leg.price,
        )


def _travel_until(tables: Tables, origin: str, route: Route) -> Travel | None:
    """The way to a station, in time for a departure."""
    end = route[0].departs - BOARDING[route[0].mode]
    road = tables.road(origin, route[0].dep_station_name)
    if end - road.duration_minutes < 300:
        return None
    return travel(tables, origin, route[0].dep_station_name, end - road.duration_minutes)


# --- which day for what ---------------------------------------------------------------------------


def _sight_ways(composer: _Composer, frames: list[Frame]) -> Iterator[list[list[Attraction]]]:
    """Attractions for every day: the asked ones in different ways, the rest filled up."""
    asked = composer.choices.attractions
    days = [
        [
            number
            for number, frame in enumerate(frames)
            if frame.city == sight.city and _is_open(composer, frame, sight)
        ]
        for sight in asked
    ]
    offsets = range(max((len(options) for options in days), default=0) or 1)
    for offset in offsets:
        taken: list[list[Attraction]] = [[] for _ in frames]
        order = sorted(range(len(asked)), key=lambda index: len(days[index]))
        for place, index in enumerate(order):
            options = days[index]
            turned = [options[(k + offset + place) % len(options)] for k in range(len(options))]
            number = min(turned, key=lambda n: _fullness(frames[n], taken[n]), default=None)
            if number is None:
                return
            taken[number].append(asked[index])
        if all(len(sights) <= _MOST_ATTRACTIONS for sights in taken):
            yield _filled(composer, frames, taken)


def _fullness(frame: Frame, sights: list[Attraction]) -> float:
    return len(sights) / (max(0, min(frame.end, 1080) - frame.start) + 1)


def _filled(
    composer: _Composer, frames: list[Frame], taken: list[list[Attraction]]
) -> list[list[Attraction]]:
    """Days with too few attractions get more, the cheapest first."""
    used = {sight.name for sights in taken for sight in sights}
    ranked = sorted(
        composer.tables.attractions,
        key=lambda sight: (sight.ticket_price, sight.min_visit_hours, sight.name),
    )
    found = []
    for frame, sights in zip(frames, taken, strict=True):
        more = [
            sight
            for sight in ranked
            if sight.city == frame.city
            and sight.name not in used
            and _is_open(composer, frame, sight)
        ][: max(0, frame.num_sights - len(sights))]
        used.update(sight.name for sight in more)
        found.append([*sights, *more])
    return found


def _is_open(composer: _Composer, frame: Frame, sight: Attraction) -> bool:
    opens, closes = open_minutes(sight)
    need = round(60 * sight.min_visit_hours)
    is_early = max(opens, frame.start + 10) + need <= min(closes, frame.end)
    return is_early and composer.trip.weekday(frame.number) not in sight.closing_dates


def _meal_ways(
    composer: _Composer, frames: list[Frame]
) -> Iterator[dict[tuple[int, str], Restaurant]]:
    """The asked restaurants at lunches and dinners, by day and meal."""
    asked = composer.choices.restaurants
    slots = [
        [
            (number, meal)
            for number, frame in enumerate(frames)
            for meal, has, due in (
                ("lunch", frame.has_lunch, LUNCH),
                ("dinner", frame.has_dinner, DINNER),
            )
            if has and frame.city == place.city and serves(place, due)
        ]
        for place in asked
    ]
    for way in product(*slots):
        if len(set(way)) == len(way):
            yield dict(zip(way, asked, strict=True))


# --- all days -------------------------------------------------------------------------------------


def _compose_days(
    composer: _Composer,
    frames: list[Frame],
    sights: list[list[Attraction]],
    meals: dict[tuple[int, str], Restaurant],
) -> list[tuple[Activity, ...]] | None:
    used = {place.name for place in meals.values()}
    days = []
    for frame in frames:
        key = (frame.number, *(sight.name for sight in sights[frame.number]))
        key = (
            *key,
            *(meals.get((frame.number, meal)) for meal in ("lunch", "dinner")),
            *sorted(used),
        )
        if key not in composer.days:
            composer.days[key] = compose_day(
                composer.tables,
                frame,
                sights[frame.number],
                Meals(
                    {meal: place for (day, meal), place in meals.items() if day == frame.number},
                    frozenset(used),
                ),
            )
        composed = composer.days[key]
        if composed is None:
            return None
        days.append(composed)
        used |= {activity.name for activity in composed if isinstance(activity, Meal)}
    return days


def _as_plan(composer: _Composer, activities: list[tuple[Activity, ...]]) -> Plan:
    """Days with their hotels and last ways, and the total."""
    trip, choices = composer.trip, composer.choices
    days = []
    for number, found in enumerate(activities):
        leg = trip.legs.get(number)
        city = f"from {leg[0]} to {leg[1]}" if leg else trip.night_city(number)
        if number == trip.num_days - 1:
            ride = tuple(_ride(choices.routes[number]))
            days.append(Day(date=trip.date(number), city=city, activities=(*found, *ride)))
            continue
        hotel = choices.hotels[trip.night_city(number)]
        rest = AtHotel(start=clock(found[-1].ends), end="24:00", name=hotel.name)
        room = Room(name=hotel.name, price=hotel.price)
        day = Day(date=trip.date(number), city=city, hotel=room, activities=(*found, rest))
        days.append(day)
    plan = Plan(days=tuple(days), total_cost=0)
    return plan.model_copy(update={"total_cost": cost_of(plan, trip)})
