"""Draws the tables of an invented country around a trip."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from tutelage.data.tasks.draws import below, between, pick, shuffled
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
from tutelage.envs.travel.query import WEEKDAYS, Trip
from tutelage.envs.travel.rows import (
    Attraction,
    Flight,
    Hotel,
    Location,
    Mode,
    Point,
    Restaurant,
    Train,
    clock,
    meters_between,
)
from tutelage.envs.travel.tables import Tables

SEAT_CLASSES: dict[Mode, tuple[str, ...]] = {
    "train": ("Second Class Seat", "First Class Seat", "Business Seat"),
    "flight": ("Economy Class", "Business Class", "First Class"),
}
FIRST_CLASS: dict[Mode, str] = {"train": "First Class Seat", "flight": "First Class"}
_SPEED = {"High-Speed Rail": 250, "Bullet Train": 190, "Regular Train": 130}
_FARE = {"High-Speed Rail": 0.46, "Bullet Train": 0.34, "Regular Train": 0.22}
_FACTOR = {"First Class Seat": 1.6, "Business Seat": 2.8, "Business Class": 2.4, "First Class": 3.2}


_ALL_DAY, _LUNCH_ONLY, _DINNER_ONLY = ("11:00", "21:30"), ("10:00", "15:00"), ("16:30", "23:00")


@dataclass(frozen=True)
class Wishes:
    """What a query will ask for, so that one choice and no other can meet it."""

    first_class: frozenset[Mode] = frozenset()
    """Modes of which one direct route has the first class."""
    few_seats: frozenset[Mode] = frozenset()
    """Modes of which one direct route has seats for all travelers."""


@dataclass
class _Draft:
    """Rows that were drawn so far."""

    rng: random.Random
    names: Names
    trip: Trip
    wishes: Wishes
    trains: list[Train] = field(default_factory=list)
    flights: list[Flight] = field(default_factory=list)
    hotels: list[Hotel] = field(default_factory=list)
    attractions: list[Attraction] = field(default_factory=list)
    restaurants: list[Restaurant] = field(default_factory=list)
    locations: list[Location] = field(default_factory=list)
    centers: dict[str, Point] = field(default_factory=dict)

    def between(self, low: int, high: int) -> int:
        """An integer from low to high."""
        return between(low, high, self.rng)

    def chance(self, probability: float) -> bool:
        """True with a probability."""
        return self.rng.random() < probability

    def some(self, values: tuple[str, ...], probability: float) -> tuple[str, ...]:
        """Each value with a probability, in their order."""
        return tuple(value for value in values if self.chance(probability))

    def around(self, point: Point, low: float, high: float) -> Point:
        """A point between two distances in meters from another one."""
        while True:
            north = (2 * self.rng.random() - 1) * high
            east = (2 * self.rng.random() - 1) * high
            if low <= math.sqrt(north * north + east * east) <= high:
                return round(point[0] + north / 111_195, 6), round(point[1] + east / 95_000, 6)


def make_tables(trip: Trip, rng: random.Random, names: Names, wishes: Wishes) -> Tables:
    """The tables of a country in which a trip takes place.

    Beside the cities of the trip there is a city to change in, and another one with hotels, sights
    and restaurants that is no part of it.
    """
    draft = _Draft(rng, names, trip, wishes)
    hub, other = names.city(), names.city()
    for city in (trip.origin, *(stay.city for stay in trip.stays), hub, other):
        _add_city(draft, city)
    for day, (origin, destination) in trip.legs.items():
        is_return = destination == trip.origin
        _add_routes(draft, origin, destination, trip.date(day), hub, is_return)
    _add_routes(draft, trip.origin, trip.stays[0].city, trip.date(1), hub, False)
    _add_routes(draft, trip.origin, other, trip.date(0), hub, False)
    for stay in trip.stays:
        _fill_city(draft, stay.city, 9 + stay.nights, 2 * stay.nights + 5)
    _fill_city(draft, other, 3, 2)
    return Tables(
        *(tuple(draft.trains), tuple(draft.flights), tuple(draft.hotels)),
        *(tuple(draft.attractions), tuple(draft.restaurants), tuple(draft.locations)),
    )


def _station(city: str, mode: Mode) -> str:
    return f"{city} Central Station" if mode == "train" else f"{city} International Airport"


def _add_city(draft: _Draft, city: str) -> None:
    """The center of a city, its station and its airport."""
    center = (32 + 3 * draft.rng.random(), 108 + 4 * draft.rng.random())
    while any(meters_between(center, other) < 60_000 for other in draft.centers.values()):
        center = (32 + 3 * draft.rng.random(), 108 + 4 * draft.rng.random())
    draft.centers[city] = center
    station, airport = draft.around(center, 2500, 5000), draft.around(center, 11_000, 17_000)
    draft.locations.append(Location(_station(city, "train"), city, *station))
    draft.locations.append(Location(_station(city, "flight"), city, *airport))


# --- trains and flights ---------------------------------------------------------------------------


def _add_routes(
    draft: _Draft, origin: str, destination: str, date: str, hub: str, is_return: bool
) -> None:
    """Direct and transfer routes of a day, by train and by plane."""
    modes: tuple[Mode, ...] = ("train", "flight")
    for mode in modes:
        num_direct = draft.between(4, 6)
        chosen = below(num_direct, draft.rng)
        for index in range(num_direct):
            start = _departure(draft, is_return, index)
            seats = _seats(draft, mode, index == chosen)
            seat_class = _seat_class(draft, mode, index == chosen)
            _add_segment(
                draft,
                mode,
                (origin, destination),
                (origin, destination),
                date,
                (index + 1, 1),
                start,
                (seat_class, seats),
            )
        _add_transfer(draft, mode, origin, destination, date, hub, num_direct + 1)


def _departure(draft: _Draft, is_return: bool, index: int) -> int:
    """When a route departs: most in the morning, or in the afternoon on the way back."""
    if index % 3 == 2:
        return 5 * draft.between(72, 210)
    return 5 * (draft.between(180, 224) if is_return else draft.between(72, 118))


def _seat_class(draft: _Draft, mode: Mode, is_chosen: bool) -> str:
    classes = SEAT_CLASSES[mode]
    if mode not in draft.wishes.first_class:
        return classes[0] if draft.chance(0.7) else classes[1 + below(2, draft.rng)]
    others = tuple(name for name in classes if name != FIRST_CLASS[mode])
    return FIRST_CLASS[mode] if is_chosen else others[0 if draft.chance(0.8) else 1]


def _seats(draft: _Draft, mode: Mode, is_chosen: bool) -> int | None:
    people = draft.trip.people
    if mode not in draft.wishes.few_seats:
        return draft.between(people + 1, 20) if draft.chance(0.3) else None
    return people + below(3, draft.rng) if is_chosen else below(people, draft.rng)


def _add_transfer(
    draft: _Draft, mode: Mode, origin: str, destination: str, date: str, hub: str, index: int
) -> None:
    """A route with a change of trains or planes in a third city."""
    start = 5 * draft.between(72, 130)
    ends, seats = (origin, destination), (SEAT_CLASSES[mode][0], None)
    arrival = _add_segment(draft, mode, ends, (origin, hub), date, (index, 1), start, seats)
    later = 5 * (arrival // 5 + draft.between(10, 20))
    _add_segment(draft, mode, ends, (hub, destination), date, (index, 2), later, seats)


def _add_segment(
    draft: _Draft,
    mode: Mode,
    ends: tuple[str, str],
    way: tuple[str, str],
    date: str,
    place: tuple[int, int],
    start: int,
    seat: tuple[str, int | None],
) -> int:
    """A segment from way[0] to way[1]; gives the minute of its arrival."""
    away = meters_between(draft.centers[way[0]], draft.centers[way[1]]) / 1000
    kind = draft.names.pick(tuple(TRAIN_TYPES))
    if mode == "train":
        duration = round(60 * away / _SPEED[kind]) + draft.between(8, 40)
        price = away * _FARE[kind] * (0.9 + 0.3 * draft.rng.random()) + draft.between(5, 25)
    else:
        duration = 45 + round(away / 10) + draft.between(0, 35)
        price = 160 + 0.5 * away + draft.between(0, 260)
    price = round(price * _FACTOR.get(seat[0], 1)) if place[1] == 1 else 0
    end = start + duration
    common = (
        *(*ends, date, *place, _station(way[0], mode), _station(way[1], mode)),
        *(f"{date} {clock(start)}", f"{date} {clock(end)}", duration, *seat, price),
    )
    if mode == "train":
        number = draft.names.number(TRAIN_TYPES[kind])
        draft.trains.append(Train(*common, kind, number))
    else:
        airline, code = pick(AIRLINES, draft.rng)
        maker = draft.names.pick(tuple(MAKERS))
        rest = (airline, draft.names.number(code), draft.names.pick(MAKERS[maker]), maker)
        draft.flights.append(Flight(*common, *rest))
    return end


# --- cities ---------------------------------------------------------------------------------------


def _fill_city(draft: _Draft, city: str, num_hotels: int, num_sights: int) -> None:
    center = draft.centers[city]
    for _ in range(num_hotels):
        _add_hotel(draft, city, draft.around(center, 0, 3500))
    kinds = shuffled(tuple(SIGHTS), draft.rng)
    for index in range(num_sights):
        point = draft.around(center, 0, 4500)
        _add_sight(
            draft, city, kinds[index] if index < len(kinds) else draft.names.pick(kinds), point
        )
        for _ in range(draft.between(3, 4)):
            _add_restaurant(draft, city, draft.around(point, 80, 950))


def _add_hotel(draft: _Draft, city: str, point: Point) -> None:
    brand = draft.names.pick(BRANDS)
    name = draft.names.hotel(brand, city)
    star = draft.between(2, 5)
    row = Hotel(
        name=name,
        city=city,
        address=f"{draft.between(1, 299)} {name.removeprefix(brand).strip()}",
        latitude=point[0],
        longitude=point[1],
        brand=brand,
        hotel_star=star,
        decoration_time=draft.between(2014, 2026),
        price=60 + 95 * star + draft.between(-90, 160),
        score=draft.between(35, 50) / 10,
        services=draft.some(SERVICES, 0.35),
    )
    draft.hotels.append(row)


def _add_sight(draft: _Draft, city: str, kind: str, point: Point) -> None:
    is_open_air = kind in ("Natural Scenery", "City Landmark") and draft.chance(0.5)
    shortest = draft.between(2, 5) / 2
    row = Attraction(
        attraction_id=f"A{len(draft.attractions) + 1:03d}",
        attraction_name=draft.names.sight(kind),
        city=city,
        latitude=point[0],
        longitude=point[1],
        description=f"A place of the type {kind} in {city}",
        attraction_type=kind,
        rating=draft.between(38, 50) / 10,
        opening_time="00:00" if is_open_air else clock(30 * draft.between(16, 19)),
        closing_time="24:00" if is_open_air else clock(30 * draft.between(34, 38)),
        closing_dates=(pick(WEEKDAYS, draft.rng),) if draft.chance(0.25) else (),
        min_visit_hours=shortest,
        max_visit_hours=shortest + draft.between(1, 4) / 2,
        ticket_price=0 if draft.chance(0.18) else 5 * draft.between(2, 36),
    )
    draft.attractions.append(row)


def _add_restaurant(draft: _Draft, city: str, point: Point) -> None:
    cuisine = draft.names.pick(CUISINES)
    kind = draft.rng.random()
    hours = _ALL_DAY if kind < 0.8 else _LUNCH_ONLY if kind < 0.9 else _DINNER_ONLY
    row = Restaurant(
        restaurant_id=f"R{len(draft.restaurants) + 1:03d}",
        restaurant_name=draft.names.restaurant(cuisine),
        city=city,
        latitude=point[0],
        longitude=point[1],
        price_per_person=draft.between(18, 260),
        cuisine=cuisine,
        opening_time=hours[0],
        closing_time=hours[1],
        rating=draft.between(35, 50) / 10,
        tags=draft.some(TAGS, 0.25),
    )
    draft.restaurants.append(row)
