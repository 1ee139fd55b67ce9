"""The rows of a country's tables, and how far apart two places are.

Other tables than generated ones are brought in by making these rows, and of them `tables.Tables`:

==================  ================================================================================
trains              origin_city, destination_city, dep_date (YYYY-MM-DD), route_index,
                    segment_index (from 1), dep_station_name, arr_station_name, dep_datetime and
                    arr_datetime (YYYY-MM-DD HH:MM), duration (minutes), seat_class, seat_status
                    (seats left; None: plenty), price (of the whole route for a person, on its
                    first segment), train_type, train_no
flights             the same without train_type and train_no; airline, flight_no, equip_type,
                    manufacturer
hotels              name, city, address, latitude, longitude, brand, hotel_star (1 to 5),
                    decoration_time (year), price (a room, a night), score (0 to 5), services
attractions         attraction_id, attraction_name, city, latitude, longitude, description,
                    attraction_type, rating (0 to 5), opening_time, closing_time (HH:MM),
                    closing_dates (weekdays), min_visit_hours, max_visit_hours, ticket_price
restaurants         restaurant_id, restaurant_name, city, latitude, longitude, price_per_person,
                    cuisine, opening_time, closing_time, rating (0 to 5), tags
locations           place_name, city, latitude, longitude: stations, airports and other places
roads (optional)    origin, destination ("latitude,longitude", six decimals), distance_meters,
                    duration_minutes, cost; for other pairs see `road_between`
==================  ================================================================================

services, closing_dates and tags are tuples. Rows of trains and flights with the same cities, day
and route_index are the segments of one route. A name belongs to one place, because a plan has
nothing but names, and every station has a row in locations; nothing here checks that. Most columns
have the names that the DeepPlanning benchmark has for them, but these tables are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

Mode: TypeAlias = Literal["train", "flight"]
_METERS_PER_DEGREE = 111_195.0
WALK_METERS = 2000
"""The longest way that is walked; longer ones are driven in a taxi."""
NEAR_METERS = 1000
"""How far from a place a restaurant may be and still be recommended near it."""
NEAR_DEGREES = (NEAR_METERS + 1) / _METERS_PER_DEGREE
"""A difference in latitude that is too large for that."""


def minutes(clock: str) -> int:
    """Minutes since midnight of ``HH:MM``."""
    return int(clock[:2]) * 60 + int(clock[3:5])


def clock(minute: int) -> str:
    """``HH:MM`` of minutes since midnight."""
    return f"{minute // 60:02d}:{minute % 60:02d}"


@dataclass(frozen=True)
class Leg:
    """One segment of a train or flight route, in one seat class."""

    mode: ClassVar[Mode]
    origin_city: str
    """Where the whole route begins."""
    destination_city: str
    """Where the whole route ends."""
    dep_date: str
    """Day on which the whole route begins."""
    route_index: int
    """Number of the route among those of the same cities and day."""
    segment_index: int
    """Place of the segment in its route, from 1; a direct route has one."""
    dep_station_name: str
    arr_station_name: str
    dep_datetime: str
    arr_datetime: str
    duration: int
    """Minutes from departure to arrival."""
    seat_class: str
    seat_status: int | None
    """Seats left; None where there are plenty."""
    price: float
    """Of the whole route, for a person, on its first segment; 0 on later ones."""

    @property
    def departs(self) -> int:
        """Minutes since midnight."""
        return minutes(self.dep_datetime[11:])

    @property
    def arrives(self) -> int:
        """Minutes since the midnight before its departure."""
        return self.departs + self.duration


@dataclass(frozen=True)
class Train(Leg):
    """A segment of a train route."""

    mode: ClassVar[Mode] = "train"
    train_type: str
    train_no: str

    @property
    def number(self) -> str:
        """What a plan calls it by."""
        return self.train_no


@dataclass(frozen=True)
class Flight(Leg):
    """A segment of a flight route."""

    mode: ClassVar[Mode] = "flight"
    airline: str
    flight_no: str
    equip_type: str
    manufacturer: str

    @property
    def number(self) -> str:
        """What a plan calls it by."""
        return self.flight_no


Segment: TypeAlias = Train | Flight
Route: TypeAlias = tuple[Segment, ...]
"""The segments of one way to travel; a direct one has a single segment."""


@dataclass(frozen=True)
class Hotel:
    """A hotel."""

    name: str
    city: str
    address: str
    latitude: float
    longitude: float
    brand: str
    hotel_star: int
    decoration_time: int
    """Year of the last renovation."""
    price: float
    """Of a room for a night."""
    score: float
    services: tuple[str, ...]


@dataclass(frozen=True)
class Attraction:
    """A sight."""

    attraction_id: str
    attraction_name: str
    city: str
    latitude: float
    longitude: float
    description: str
    attraction_type: str
    rating: float
    opening_time: str
    closing_time: str
    closing_dates: tuple[str, ...]
    """Weekdays on which it is closed, such as "Monday"."""
    min_visit_hours: float
    max_visit_hours: float
    ticket_price: float
    """For a person."""

    @property
    def name(self) -> str:
        """The same as `attraction_name`."""
        return self.attraction_name


@dataclass(frozen=True)
class Restaurant:
    """A restaurant."""

    restaurant_id: str
    restaurant_name: str
    city: str
    latitude: float
    longitude: float
    price_per_person: float
    cuisine: str
    opening_time: str
    closing_time: str
    rating: float
    tags: tuple[str, ...]

    @property
    def name(self) -> str:
        """The same as `restaurant_name`."""
        return self.restaurant_name


@dataclass(frozen=True)
class Location:
    """A place that is no hotel, sight or restaurant, such as a station."""

    place_name: str
    city: str
    latitude: float
    longitude: float


@dataclass(frozen=True)
class Road:
    """The way by road from one place to another, by their coordinates."""

    origin: str
    """``latitude,longitude`` with six decimals, as `coordinates` writes them."""
    destination: str
    distance_meters: int
    duration_minutes: int
    cost: float
    """Of one vehicle, which takes four people; 0 for a walk."""


Point: TypeAlias = tuple[float, float]
"""Latitude and longitude in degrees."""


def coordinates(point: Point) -> str:
    """``latitude,longitude`` with six decimals."""
    return f"{point[0]:.6f},{point[1]:.6f}"


def meters_between(a: Point, b: Point) -> float:
    """Straight-line distance; right for the few hundred kilometers of a country."""
    north = (a[0] - b[0]) * _METERS_PER_DEGREE
    east = (a[1] - b[1]) * _METERS_PER_DEGREE * math.cos(math.radians((a[0] + b[0]) / 2))
    return math.sqrt(north * north + east * east)


def road_between(a: Point, b: Point) -> Road:
    """The way by road where no table says otherwise: 1.25 times the straight line.

    Up to 2 km are walked at 75 m a minute and cost nothing; a taxi takes 3 minutes and 2 minutes a
    kilometer, and costs 8 and 2.4 a kilometer.
    """
    distance = round(1.25 * meters_between(a, b))
    ends = coordinates(a), coordinates(b)
    if distance <= WALK_METERS:
        return Road(*ends, distance, math.ceil(distance / 75), 0)
    return Road(*ends, distance, math.ceil(3 + distance / 500), round(8 + 2.4 * distance / 1000))
