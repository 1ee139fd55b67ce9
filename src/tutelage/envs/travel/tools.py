"""The nine tools of DeepPlanning's travel domain, over the tables of a country.

Names and arguments are the benchmark's. A call that names something that is not in the tables, or
not in the form that is asked for, is an error; one that finds nothing says so.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from typing import Any

from pydantic import Field

from tutelage.envs.tools import Arguments, Tool, ToolError
from tutelage.envs.travel.country import SEAT_CLASSES
from tutelage.envs.travel.names import SIGHTS
from tutelage.envs.travel.rows import (
    Attraction,
    Flight,
    Hotel,
    Mode,
    Point,
    Restaurant,
    Route,
    Segment,
    coordinates,
)
from tutelage.envs.travel.tables import Tables

_POINT = re.compile(r"(-?\d{1,2}\.\d{6}),(-?\d{1,3}\.\d{6})")
_EXACT = "Give the name exactly as the tools return it."


class TrainArguments(Arguments):
    origin: str = Field(description="City of departure")
    destination: str = Field(description="City of arrival")
    depDate: str = Field(description="Day of departure, YYYY-MM-DD")
    seatClassName: str | None = Field(
        None, description="First Class Seat, Second Class Seat or Business Seat"
    )


class FlightArguments(Arguments):
    origin: str = Field(description="City of departure")
    destination: str = Field(description="City of arrival")
    depDate: str = Field(description="Day of departure, YYYY-MM-DD")
    seatClassName: str | None = Field(
        None, description="Economy Class, Business Class or First Class"
    )


class HotelArguments(Arguments):
    destination: str = Field(description="City")
    checkinDate: str = Field(description="First night, YYYY-MM-DD")
    checkoutDate: str = Field(description="Day of leaving, YYYY-MM-DD")
    hotelStar: str | None = Field(None, description="Stars, one of 1 to 5")
    hotelBrands: str | None = Field(None, description="One brand")


class AttractionArguments(Arguments):
    attraction_name: str = Field(description="Name of the attraction")


class RecommendAttractionsArguments(Arguments):
    city: str = Field(description="City, or a word in name or description")
    attraction_type: str | None = Field(None, description="One of: " + ", ".join(SIGHTS))


class LocationArguments(Arguments):
    place_name: str = Field(description="Name of the place")


class RoadArguments(Arguments):
    origin: str = Field(description="latitude,longitude with six decimals")
    destination: str = Field(description="latitude,longitude with six decimals")


class RecommendRestaurantsArguments(Arguments):
    latitude: str = Field(description="Latitude with six decimals")
    longitude: str = Field(description="Longitude with six decimals")


class RestaurantArguments(Arguments):
    restaurant_name: str = Field(description="Name of the restaurant")


_DESCRIPTIONS = {
    "query_train_info": "Trains between two cities on a day, direct and with transfers: numbers, "
    "stations, times, seat classes, seats left, price for a person.",
    "query_flight_info": "Flights between two cities on a day, direct and with transfers: numbers, "
    "airports, times, aircraft, seat classes, seats left, price for a person.",
    "query_hotel_info": "Hotels of a city: star, brand, score, services, year of renovation, price "
    "of a room for a night.",
    "query_attraction_details": "All about an attraction: coordinates, rating, opening hours, "
    "closed weekdays, recommended hours of a visit, ticket price.",
    "recommend_attractions": "The attractions of a city, all or of one type.",
    "search_location": "Coordinates of a place: a station, an airport, a hotel, an attraction, a "
    "restaurant.",
    "query_road_route_info": "Way by road between two places: meters, minutes and cost. Up to 2 km "
    "are walked and cost nothing; else it is the cost of one taxi, which takes four people.",
    "recommend_restaurants": "Restaurants near a place, which is within a kilometer of its "
    "coordinates, nearest first.",
    "query_restaurant_details": "All about a restaurant: coordinates, cuisine, price for a person, "
    "opening hours, rating, tags.",
}


def make_tools(tables: Tables) -> tuple[Tool, ...]:
    """The tools over these tables, which they never change."""
    lookup = _Lookup(tables)
    runs: dict[str, tuple[type[Arguments], Callable[[Any], Any]]] = {
        "query_train_info": (TrainArguments, lambda given: lookup.transport("train", given)),
        "query_flight_info": (FlightArguments, lambda given: lookup.transport("flight", given)),
        "query_hotel_info": (HotelArguments, lookup.hotels),
        "query_attraction_details": (AttractionArguments, lookup.attraction),
        "recommend_attractions": (RecommendAttractionsArguments, lookup.attractions),
        "search_location": (LocationArguments, lookup.location),
        "query_road_route_info": (RoadArguments, lookup.road),
        "recommend_restaurants": (RecommendRestaurantsArguments, lookup.restaurants),
        "query_restaurant_details": (RestaurantArguments, lookup.restaurant),
    }
    return tuple(Tool(name, _DESCRIPTIONS[name], *run) for name, run in runs.items())


class _Lookup:
    """Answers from tables."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables

    def transport(self, mode: Mode, given: TrainArguments | FlightArguments) -> Any:
        """Routes of a day, their segments by number."""
        self._refuse_unknown_city(given.origin)
        self._refuse_unknown_city(given.destination)
        _date(given.depDate, "depDate")
        classes = SEAT_CLASSES[mode]
        if given.seatClassName and given.seatClassName not in classes:
            listed = ", ".join(classes)
            raise ToolError(f"seatClassName is {given.seatClassName!r}, not one of {listed}")
        routes = self.tables.routes(mode, given.origin, given.destination, given.depDate)
        wanted = given.seatClassName
        found = [
            _route(route)
            for route in routes
            if not wanted or all(leg.seat_class == wanted for leg in route)
        ]
        where = f"from {given.origin} to {given.destination} on {given.depDate}"
        return found or f"No {mode}s {where} were found."

    def hotels(self, given: HotelArguments) -> Any:
        """Hotels of a city."""
        self._refuse_unknown_city(given.destination)
        if _date(given.checkinDate, "checkinDate") >= _date(given.checkoutDate, "checkoutDate"):
            raise ToolError("checkoutDate must be after checkinDate")
        if given.hotelStar and given.hotelStar not in ("1", "2", "3", "4", "5"):
            raise ToolError(f"hotelStar is {given.hotelStar!r}, not one of 1, 2, 3, 4, 5")
        brands = sorted({hotel.brand for hotel in self.tables.hotels})
        if given.hotelBrands and given.hotelBrands not in brands:
            raise ToolError(f"hotelBrands is {given.hotelBrands!r}, not one of {', '.join(brands)}")
        found = [
            _hotel(hotel)
            for hotel in self.tables.hotels
            if hotel.city == given.destination
            and given.hotelStar in (None, "", str(hotel.hotel_star))
            and given.hotelBrands in (None, "", hotel.brand)
        ]
        return found or f"No such hotels were found in {given.destination}."

    def attraction(self, given: AttractionArguments) -> Any:
        """One attraction by its name."""
        found = self.tables.attraction_by_name.get(given.attraction_name)
        if found is None:
            raise ToolError(f"there is no attraction {given.attraction_name!r}. {_EXACT}")
        return _attraction(found)

    def attractions(self, given: RecommendAttractionsArguments) -> Any:
        """Attractions of a city, or with a word in name or description."""
        kinds = sorted({sight.attraction_type for sight in self.tables.attractions} | set(SIGHTS))
        if given.attraction_type and given.attraction_type not in kinds:
            listed = ", ".join(kinds)
            raise ToolError(f"attraction_type is {given.attraction_type!r}, not one of {listed}")
        found = [s for s in self.tables.attractions if s.city == given.city]
        word = given.city.strip().lower()
        if not found and word:
            found = [
                sight
                for sight in self.tables.attractions
                if word in f"{sight.name} {sight.description}".lower()
            ]
        if not found and given.city not in self.tables.cities:
            raise ToolError(f"there is no city and no attraction {given.city!r}")
        names = ("attraction_name", "attraction_type", "description", "rating", "ticket_price")
        chosen = [
            {name: getattr(sight, name) for name in names}
            for sight in found
            if given.attraction_type in (None, "", sight.attraction_type)
        ]
        return chosen or f"No attractions of that type were found in {given.city}."

    def location(self, given: LocationArguments) -> Any:
        """Coordinates of a place by its name."""
        point = self.tables.places.get(given.place_name)
        if point is None:
            raise ToolError(f"there is no place {given.place_name!r}. {_EXACT}")
        return {"place_name": given.place_name, **_point(*point)}

    def road(self, given: RoadArguments) -> Any:
        """The way between two places by their coordinates."""
        origin, destination = self._known(given.origin), self._known(given.destination)
        road = self.tables.road_at(origin, destination)
        return {
            "origin": given.origin,
            "destination": given.destination,
            "distance_in_meters": road.distance_meters,
            "duration_in_minutes": road.duration_minutes,
            "cost": road.cost,
        }

    def restaurants(self, given: RecommendRestaurantsArguments) -> Any:
        """Restaurants near a place by its coordinates."""
        point = self._known(f"{given.latitude},{given.longitude}")
        found = [_restaurant(row, distance) for distance, row in self.tables.near(point)]
        return found or "No restaurants were found near there."

    def restaurant(self, given: RestaurantArguments) -> Any:
        """One restaurant by its name."""
        found = self.tables.restaurant_by_name.get(given.restaurant_name)
        if found is None:
            raise ToolError(f"there is no restaurant {given.restaurant_name!r}. {_EXACT}")
        return _restaurant(found)

    def _refuse_unknown_city(self, name: str) -> None:
        if name not in self.tables.cities:
            raise ToolError(f"there is no city {name!r}. {_EXACT}")

    def _known(self, text: str) -> Point:
        """A point that is a place of the tables."""
        match = _POINT.fullmatch(text)
        if match is None or text not in self.tables.points:
            raise ToolError(
                f"{text[:80]!r} are no coordinates of a place. Give latitude and longitude with "
                "six decimals, exactly as the tools return them."
            )
        return float(match[1]), float(match[2])


def _date(text: str, name: str) -> str:
    """The date, if it is one."""
    try:
        if len(text) == 10 and text.isascii():
            return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        pass
    raise ToolError(f"{name} is {text[:40]!r}, and must be a date YYYY-MM-DD")


def _point(latitude: float, longitude: float) -> dict[str, str]:
    """Coordinates as every tool returns them."""
    parts = coordinates((latitude, longitude)).split(",")
    return {"latitude": parts[0], "longitude": parts[1]}


def _route(route: Route) -> dict[str, Any]:
    found: dict[str, Any] = {
        f"Segment {number}": _segment(leg) for number, leg in enumerate(route, start=1)
    }
    return {**found, "price": route[0].price}


def _segment(leg: Segment) -> dict[str, Any]:
    aircraft = {}
    if isinstance(leg, Flight):
        aircraft = {"equipType": leg.equip_type, "manufacturer": leg.manufacturer}
    return {
        "depStationName": leg.dep_station_name,
        "arrStationName": leg.arr_station_name,
        "depDateTime": leg.dep_datetime,
        "arrDateTime": leg.arr_datetime,
        "duration": leg.duration,
        "marketingTransportName": leg.airline if isinstance(leg, Flight) else leg.train_type,
        "marketingTransportNo": leg.number,
        "seatClassName": leg.seat_class,
        "Remaining Seats": "Available" if leg.seat_status is None else leg.seat_status,
        **aircraft,
    }


def _hotel(hotel: Hotel) -> dict[str, Any]:
    return {
        "name": hotel.name,
        "address": hotel.address,
        **_point(hotel.latitude, hotel.longitude),
        "decorationTime": hotel.decoration_time,
        "hotelStar": hotel.hotel_star,
        "price": hotel.price,
        "score": hotel.score,
        "brand": hotel.brand,
        "services": list(hotel.services),
    }


def _attraction(sight: Attraction) -> dict[str, Any]:
    names = (
        *("attraction_id", "attraction_name", "city", "description", "attraction_type", "rating"),
        *("opening_time", "closing_time", "min_visit_hours", "max_visit_hours", "ticket_price"),
    )
    return {
        **{name: getattr(sight, name) for name in names},
        "closing_dates": list(sight.closing_dates),
        **_point(sight.latitude, sight.longitude),
    }


def _restaurant(row: Restaurant, distance: int | None = None) -> dict[str, Any]:
    found = {
        "name": row.name,
        "city": row.city,
        **_point(row.latitude, row.longitude),
        "price_per_person": row.price_per_person,
        "cuisine": row.cuisine,
        "opening_time": row.opening_time,
        "closing_time": row.closing_time,
        "rating": row.rating,
        "tags": list(row.tags),
    }
    if distance is None:
        return {"id": row.restaurant_id, **found}
    return {**found, "distance_in_meters": distance}
