"""The tables of a country, with what is looked up in them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

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

_Named: TypeAlias = Hotel | Attraction | Restaurant


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
