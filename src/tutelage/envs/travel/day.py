"""Composes one day of a plan: its order, its meals, and the times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Literal

from tutelage.envs.travel.commonsense import DINNER, LUNCH, open_minutes
from tutelage.envs.travel.plan import Activity, Meal, Travel, Visit
from tutelage.envs.travel.rows import Attraction, Restaurant, clock
from tutelage.envs.travel.tables import Tables

_MEAL = 60


@dataclass(frozen=True)
class Stop:
    """A visit or meal in a day that is being composed."""

    kind: Literal["attraction", "lunch", "dinner"]
    place: Attraction | Restaurant


@dataclass(frozen=True)
class Frame:
    """One day: from where and when to where and when."""

    number: int
    city: str
    start_place: str
    start: int
    end_place: str
    end: int
    """Until when the travelers have to be at the end place."""
    has_lunch: bool
    has_dinner: bool
    num_sights: int
    before: tuple[Activity, ...] = ()
    """From the morning until the arrival in the city."""


@dataclass(frozen=True)
class Meals:
    """Where the meals of a day may be."""

    asked: Mapping[str, Restaurant]
    """For "lunch" and "dinner", where that is given."""
    used: frozenset[str]
    """Names that cannot be taken again."""


def travel(tables: Tables, origin: str, destination: str, start: int) -> Travel:
    road = tables.road(origin, destination)
    return Travel(
        start=clock(start),
        end=clock(start + max(1, road.duration_minutes)),
        origin=origin,
        destination=destination,
        cost=road.cost,
    )


def serves(place: Restaurant, due: tuple[int, int]) -> bool:
    opens, closes = open_minutes(place)
    return max(opens, due[0]) + _MEAL <= closes and opens <= due[1]


def compose_day(
    tables: Tables, frame: Frame, sights: Sequence[Attraction], meals: Meals
) -> tuple[Activity, ...] | None:
    """The activities of a day, in the first order that the hours allow."""
    for order in permutations(sights):
        for split in range(len(order) + 1) if frame.has_lunch else (len(order),):
            before, after = order[:split], order[split:]
            lunches = _options(tables, frame, "lunch", before or order, meals)
            dinners = _options(tables, frame, "dinner", after[::-1] or order, meals)
            for lunch, dinner in product(lunches, dinners):
                if lunch is not None and lunch == dinner:
                    continue
                stops = [Stop("attraction", sight) for sight in order]
                stops[split:split] = [Stop("lunch", lunch)] if lunch else []
                stops += [Stop("dinner", dinner)] if dinner else []
                day = _lay_out(tables, frame, stops)
                if day is not None:
                    return day
    return None


def _options(
    tables: Tables,
    frame: Frame,
    meal: Literal["lunch", "dinner"],
    sights: Sequence[Attraction],
    meals: Meals,
) -> list[Restaurant] | list[None]:
    """Where a meal can be: where it was asked for, or near a sight of the day, cheapest first."""
    if not (frame.has_lunch if meal == "lunch" else frame.has_dinner):
        return [None]
    asked = meals.asked.get(meal)
    if asked is not None:
        return [asked]
    due = LUNCH if meal == "lunch" else DINNER
    points = [tables.places[sight.name] for sight in sights] or [tables.places[frame.end_place]]
    found = {
        place.name: place
        for point in points
        for _, place in tables.near(point)
        if place.name not in meals.used and serves(place, due)
    }
    return sorted(found.values(), key=lambda p: (p.price_per_person, p.name))[:3]


def _lay_out(tables: Tables, frame: Frame, stops: list[Stop]) -> tuple[Activity, ...] | None:
    """The stops one after another, each as early as possible; None where hours do not allow it."""
    place, time = frame.start_place, frame.start
    found: list[Activity] = list(frame.before)
    for stop in stops:
        if time + tables.road(place, stop.place.name).duration_minutes > frame.end:
            return None
        way = travel(tables, place, stop.place.name, time)
        opens, closes = open_minutes(stop.place)
        start = max(way.ends, opens)
        if isinstance(stop.place, Attraction):
            end = start + round(60 * stop.place.min_visit_hours)
        else:
            due = LUNCH if stop.kind == "lunch" else DINNER
            start = max(start, due[0])
            end = start + _MEAL
            if start > due[1]:
                return None
        if end > min(closes, frame.end):
            return None
        found += [way, _activity(stop, start, end)]
        place, time = stop.place.name, end
    if place == frame.end_place:
        return tuple(found)
    if time + tables.road(place, frame.end_place).duration_minutes > frame.end:
        return None
    return (*found, travel(tables, place, frame.end_place, time))


def _activity(stop: Stop, start: int, end: int) -> Activity:
    begin, close, name = clock(start), clock(end), stop.place.name
    if isinstance(stop.place, Attraction):
        return Visit(start=begin, end=close, name=name, cost=stop.place.ticket_price)
    meal: Literal["lunch", "dinner"] = "lunch" if stop.kind == "lunch" else "dinner"
    return Meal(start=begin, end=close, meal=meal, name=name, cost=stop.place.price_per_person)
