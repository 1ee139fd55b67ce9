"""The rows of a country's tables, and how far apart two places are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import ConfigDict, Field

Mode: TypeAlias = Literal["train", "flight"]
Clock = Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$|^24:00$")]
"""A time of day, ``HH:MM``."""
Date = Annotated[str, Field(pattern=r"^\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])$")]
Moment = Annotated[
    str,
    Field(pattern=r"^\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01]) ([01]\d|2[0-3]):[0-5]\d$"),
]
"""A local time, ``YYYY-MM-DD HH:MM``."""
Name = Annotated[str, Field(min_length=1)]
Latitude = Annotated[float, Field(ge=-90, le=90)]
Longitude = Annotated[float, Field(ge=-180, le=180)]
Price = Annotated[float, Field(ge=0)]

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
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

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    mode: ClassVar[Mode]
    origin_city: Name
    """Where the whole route begins."""
    destination_city: Name
    """Where the whole route ends."""
    dep_date: Date
    """Day on which the whole route begins."""
    route_index: int
    """Number of the route among those of the same cities and day."""
    segment_index: int
    """Place of the segment in its route, from 1; a direct route has one."""
    dep_station_name: Name
    arr_station_name: Name
    dep_datetime: Moment
    arr_datetime: Moment
    duration: int
    """Minutes from departure to arrival."""
    seat_class: Name
    seat_status: int | None
    """Seats left; None where there are plenty."""
    price: Price
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
    train_type: Name
    train_no: Name

    @property
    def number(self) -> str:
        """What a plan calls it by."""
        return self.train_no


@dataclass(frozen=True)
class Flight(Leg):
    """A segment of a flight route."""

    mode: ClassVar[Mode] = "flight"
    airline: Name
    flight_no: Name
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

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    name: Name
    city: Name
    address: str
    latitude: Latitude
    longitude: Longitude
    brand: str
    hotel_star: Annotated[int, Field(ge=1, le=5)]
    decoration_time: int
    """Year of the last renovation."""
    price: Price
    """Of a room for a night."""
    score: Annotated[float, Field(ge=0, le=5)]
    services: tuple[str, ...]


@dataclass(frozen=True)
class Attraction:
    """A sight."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    attraction_id: Name
    attraction_name: Name
    city: Name
    latitude: Latitude
    longitude: Longitude
    description: str
    attraction_type: str
    rating: Annotated[float, Field(ge=0, le=5)]
    opening_time: Clock
    closing_time: Clock
    closing_dates: tuple[str, ...]
    """Weekdays on which it is closed, such as "Monday"."""
    min_visit_hours: Annotated[float, Field(gt=0)]
    max_visit_hours: Annotated[float, Field(gt=0)]
    ticket_price: Price
    """For a person."""

    @property
    def name(self) -> str:
        """The same as `attraction_name`."""
        return self.attraction_name


@dataclass(frozen=True)
class Restaurant:
    """A restaurant."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    restaurant_id: Name
    restaurant_name: Name
    city: Name
    latitude: Latitude
    longitude: Longitude
    price_per_person: Price
    cuisine: str
    opening_time: Clock
    closing_time: Clock
    rating: Annotated[float, Field(ge=0, le=5)]
    tags: tuple[str, ...]

    @property
    def name(self) -> str:
        """The same as `restaurant_name`."""
        return self.restaurant_name


@dataclass(frozen=True)
class Location:
    """A place that is no hotel, sight or restaurant, such as a station."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    place_name: Name
    city: Name
    latitude: Latitude
    longitude: Longitude


@dataclass(frozen=True)
class Road:
    """The way by road from one place to another, by their coordinates."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    origin: Name
    """``latitude,longitude`` with six decimals, as `coordinates` writes them."""
    destination: Name
    distance_meters: Annotated[int, Field(ge=0)]
    duration_minutes: Annotated[int, Field(ge=0)]
    cost: Price
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
