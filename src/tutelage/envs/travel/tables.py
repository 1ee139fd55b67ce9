"""The tables of a country, and a reader of other tables in the same columns.

A folder has one file for each table, as CSV with a header line or as JSON lines:

==================  ================================================================================
trains              origin_city, destination_city, dep_date (YYYY-MM-DD), route_index,
                    segment_index (from 1), dep_station_name, arr_station_name, dep_datetime and
                    arr_datetime (YYYY-MM-DD HH:MM), duration (minutes), seat_class, seat_status
                    (seats left; empty: plenty), price (of the whole route for a person, on its
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
                    duration_minutes, cost; for other pairs see `rows.road_between`
==================  ================================================================================

services, closing_dates and tags are lists; a CSV file has ";" between their entries. Rows of trains
and flights with the same cities, day and route_index are the segments of one route. Most columns
have the names that the DeepPlanning benchmark has for them, but these tables are ours: nothing here
reads its database as it is.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from pydantic import TypeAdapter, ValidationError

from tutelage.envs.travel.rows import (
    NEAR_DEGREES,
    NEAR_METERS,
    Attraction,
    Flight,
    Hotel,
    Location,
    Mode,
    Point,
    Restaurant,
    Road,
    Route,
    Segment,
    Train,
    coordinates,
    meters_between,
    road_between,
)
from tutelage.errors import DataError

_Named: TypeAlias = Hotel | Attraction | Restaurant
R = TypeVar("R")
_LISTS = ("services", "closing_dates", "tags")


@dataclass(frozen=True)
class Tables:
    """What there is in a country; never changed."""

    trains: tuple[Train, ...]
    flights: tuple[Flight, ...]
    hotels: tuple[Hotel, ...]
    attractions: tuple[Attraction, ...]
    restaurants: tuple[Restaurant, ...]
    locations: tuple[Location, ...]
    roads: tuple[Road, ...] = ()

    @cached_property
    def _routes(self) -> dict[tuple[Mode, str, str, str], list[Route]]:
        """Routes by mode, cities and day, in the order of their index."""
        found: dict[tuple[Mode, str, str, str], dict[int, list[Segment]]] = {}
        segments: Iterable[Segment] = (*self.trains, *self.flights)
        for leg in segments:
            key = (leg.mode, leg.origin_city, leg.destination_city, leg.dep_date)
            found.setdefault(key, {}).setdefault(leg.route_index, []).append(leg)
        return {
            key: [
                tuple(sorted(routes[index], key=lambda leg: leg.segment_index))
                for index in sorted(routes)
            ]
            for key, routes in found.items()
        }

    @cached_property
    def places(self) -> dict[str, Point]:
        """Where everything is that has a name."""
        named: Iterable[_Named] = (*self.hotels, *self.attractions, *self.restaurants)
        return {
            **{place.place_name: (place.latitude, place.longitude) for place in self.locations},
            **{place.name: (place.latitude, place.longitude) for place in named},
        }

    @cached_property
    def city_of(self) -> dict[str, str]:
        """The city of everything that has a name."""
        named: Iterable[_Named] = (*self.hotels, *self.attractions, *self.restaurants)
        return {
            **{place.place_name: place.city for place in self.locations},
            **{place.name: place.city for place in named},
        }

    @cached_property
    def points(self) -> set[str]:
        """The coordinates of everything that has a name."""
        return {coordinates(point) for point in self.places.values()}

    @cached_property
    def cities(self) -> set[str]:
        """Every city that a row names."""
        legs: Iterable[Segment] = (*self.trains, *self.flights)
        ends = {city for leg in legs for city in (leg.origin_city, leg.destination_city)}
        return ends | set(self.city_of.values())

    @cached_property
    def hotel_by_name(self) -> dict[str, Hotel]:
        """Hotels by their names."""
        return {hotel.name: hotel for hotel in self.hotels}

    @cached_property
    def attraction_by_name(self) -> dict[str, Attraction]:
        """Attractions by their names."""
        return {attraction.name: attraction for attraction in self.attractions}

    @cached_property
    def restaurant_by_name(self) -> dict[str, Restaurant]:
        """Restaurants by their names."""
        return {restaurant.name: restaurant for restaurant in self.restaurants}

    @cached_property
    def _roads(self) -> dict[tuple[str, str], Road]:
        return {(road.origin, road.destination): road for road in self.roads}

    def routes(self, mode: Mode, origin: str, destination: str, date: str) -> list[Route]:
        """Direct and transfer routes of a day, in the order of their index."""
        return self._routes.get((mode, origin, destination, date), [])

    def road(self, origin: str, destination: str) -> Road:
        """The way by road between two places by name."""
        return self.road_at(self.places[origin], self.places[destination])

    def road_at(self, origin: Point, destination: Point) -> Road:
        """The way by road between two points."""
        known = self._roads.get((coordinates(origin), coordinates(destination)))
        return known or road_between(origin, destination)

    def near(self, point: Point) -> list[tuple[int, Restaurant]]:
        """The restaurants near a point with their distances in meters, nearest first."""
        found = [
            (round(meters_between(point, (row.latitude, row.longitude))), row)
            for row in self.restaurants
            if abs(row.latitude - point[0]) < NEAR_DEGREES
        ]
        return sorted((pair for pair in found if pair[0] <= NEAR_METERS), key=lambda pair: pair[0])


def read_tables(folder: str | Path) -> Tables:
    """The tables of a folder; see the module for files and columns.

    Raises:
        DataError: a file is missing or unreadable, a column missing or unknown, a value of the
            wrong kind, a name used twice, or a station without a location.
    """
    where = Path(folder)
    tables = Tables(
        _read(where, "trains", Train),
        _read(where, "flights", Flight),
        _read(where, "hotels", Hotel),
        _read(where, "attractions", Attraction),
        _read(where, "restaurants", Restaurant),
        _read(where, "locations", Location),
        _read(where, "roads", Road),
    )
    _refuse_repeated_names(tables, folder)
    legs: Iterable[Segment] = (*tables.trains, *tables.flights)
    for leg in legs:
        for station in (leg.dep_station_name, leg.arr_station_name):
            if station not in tables.places:
                raise DataError(
                    f"{folder}: the station {station!r} of {leg.number} has no row in locations. "
                    "Add one with its city and coordinates."
                )
    return tables


def _refuse_repeated_names(tables: Tables, folder: str | Path) -> None:
    named: Iterable[_Named] = (*tables.hotels, *tables.attractions, *tables.restaurants)
    seen: set[str] = set()
    for name in (*(row.name for row in named), *(row.place_name for row in tables.locations)):
        if name in seen:
            raise DataError(
                f"{folder}: two places have the name {name!r}, and a plan has only names. "
                "Rename or remove one of them."
            )
        seen.add(name)


def _read(folder: Path, name: str, kind: type[R]) -> tuple[R, ...]:
    """The rows of a table; none for `roads` without a file."""
    paths = [path for end in ("csv", "jsonl") if (path := folder / f"{name}.{end}").is_file()]
    if not paths and name == "roads":
        return ()
    if len(paths) != 1:
        raise DataError(
            f"{folder} has {len(paths) or 'no'} files {name}.csv or {name}.jsonl, and one is "
            "needed. Give a folder with one file for each table."
        )
    columns = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    adapter = TypeAdapter(kind)
    rows = []
    for number, record in enumerate(_records(paths[0]), start=1):
        _refuse_columns(record, columns, f"{paths[0]}, row {number}")
        try:
            rows.append(adapter.validate_python(_plain(record)))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise DataError(
                f"{paths[0]}, row {number}: {where}: {first['msg']}, got "
                f"{str(first['input'])[:80]!r}. Correct the row or remove it."
            ) from None
    return tuple(rows)


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    """The records of a file, one after another."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                yield from csv.DictReader(file, restkey="(more)", restval=None, strict=True)
                return
            for line in file:
                if line.strip():
                    yield _object(line)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        reason = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read: {reason}. Give UTF-8 CSV or JSON lines.") from None


def _object(line: str) -> dict[str, Any]:
    found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError(f"a line is {type(found).__name__} and no object")
    return found


def _refuse_columns(record: Mapping[str, Any], columns: Sequence[str], where: str) -> None:
    unknown = [str(name) for name in record if name not in columns]
    missing = [name for name in columns if name not in record]
    for what, names in (("unknown", unknown), ("missing", missing)):
        if names:
            raise DataError(
                f"{where}: {what} column{'s' * (len(names) > 1)} {', '.join(names)[:200]}. "
                f"The columns are {', '.join(columns)}."
            )


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of a CSV file are split, and an empty number of seats is None."""
    found = dict(record)
    for name in _LISTS:
        if isinstance(found.get(name), str):
            found[name] = [part.strip() for part in found[name].split(";") if part.strip()]
    if found.get("seat_status") == "":
        found["seat_status"] = None
    return found
