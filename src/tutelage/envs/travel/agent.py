"""An agent that solves travel queries by rule, through the tools alone.

Its input is what a query asks for in structured form; it calls the tools for the rows that are
needed, and composes its plan from their replies.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tutelage.data.types import ToolCall
from tutelage.envs.travel.choices import choose
from tutelage.envs.travel.constraints import KINDS
from tutelage.envs.travel.plan import Plan, Travel
from tutelage.envs.travel.planner import Choices, compose, first_sights
from tutelage.envs.travel.query import Trip
from tutelage.envs.travel.rows import (
    Attraction,
    Flight,
    Hotel,
    Location,
    Point,
    Restaurant,
    Road,
    Train,
    coordinates,
)
from tutelage.envs.travel.tables import Tables

Asked: TypeAlias = Sequence[tuple[str, Mapping[str, Any]]]
"""Kinds and parameters of constraints, without their answers."""
Calls: TypeAlias = list[ToolCall]


class _Unasked(Exception):
    """The restaurants near a point are needed, and no tool was called for them."""

    def __init__(self, point: Point) -> None:
        super().__init__(coordinates(point))
        self.point = point


@dataclass(frozen=True)
class _KnownTables(Tables):
    """Tables of the rows that tools returned."""

    asked_points: frozenset[str] = frozenset()

    def near(self, point: Point) -> list[tuple[int, Restaurant]]:
        """As in `Tables`; raises _Unasked where no tool was called."""
        if coordinates(point) not in self.asked_points:
            raise _Unasked(point)
        return super().near(point)


@dataclass
class _KnownRows:
    """What tools returned so far; a row that came twice is kept once."""

    trains: dict[Any, Train] = field(default_factory=dict)
    flights: dict[Any, Flight] = field(default_factory=dict)
    hotels: dict[str, Hotel] = field(default_factory=dict)
    attractions: dict[str, Attraction] = field(default_factory=dict)
    restaurants: dict[str, Restaurant] = field(default_factory=dict)
    locations: dict[str, Location] = field(default_factory=dict)
    roads: dict[Any, Road] = field(default_factory=dict)
    recommended: list[str] = field(default_factory=list)
    asked_points: set[str] = field(default_factory=set)
    asked_roads: set[tuple[str, str]] = field(default_factory=set)

    @property
    def tables(self) -> _KnownTables:
        """The rows as tables."""
        return _KnownTables(
            tuple(self.trains.values()),
            tuple(self.flights.values()),
            tuple(self.hotels.values()),
            tuple(self.attractions.values()),
            tuple(self.restaurants.values()),
            tuple(self.locations.values()),
            tuple(self.roads.values()),
            frozenset(self.asked_points),
        )

    def add(self, call: ToolCall, reply: str) -> None:
        """Add the rows of a reply; one that is no JSON has none."""
        given = call.arguments
        if call.name == "recommend_restaurants":
            self.asked_points.add(f"{given['latitude']},{given['longitude']}")
        try:
            found = json.loads(reply)
        except ValueError:
            return
        match call.name:
            case "query_train_info" | "query_flight_info":
                for index, route in enumerate(found, start=1):
                    self._add_route(given, index, route)
            case "query_hotel_info":
                for row in found:
                    self.hotels[row["name"]] = _hotel(row, given["destination"])
            case "recommend_attractions":
                self.recommended += [row["attraction_name"] for row in found]
            case "query_attraction_details":
                self.attractions[found["attraction_name"]] = _attraction(found)
            case "recommend_restaurants":
                for row in found:
                    self.restaurants[row["name"]] = _restaurant(row)
            case "query_restaurant_details":
                self.restaurants[found["name"]] = _restaurant(found)
            case "search_location":
                point = float(found["latitude"]), float(found["longitude"])
                self.locations[found["place_name"]] = Location(found["place_name"], "", *point)
            case "query_road_route_info":
                facts = (found["distance_in_meters"], found["duration_in_minutes"], found["cost"])
                ends = (found["origin"], found["destination"])
                self.roads[ends] = Road(*ends, *facts)

    def _add_route(self, given: Mapping[str, Any], index: int, route: Mapping[str, Any]) -> None:
        for key, row in route.items():
            if key == "price":
                continue
            number = int(key.removeprefix("Segment "))
            seats = row["Remaining Seats"]
            common = (
                *(given["origin"], given["destination"], given["depDate"], index, number),
                *(row["depStationName"], row["arrStationName"]),
                *(row["depDateTime"], row["arrDateTime"], row["duration"], row["seatClassName"]),
                *(None if seats == "Available" else seats, route["price"] if number == 1 else 0),
            )
            names = row["marketingTransportName"], row["marketingTransportNo"]
            place = (given["origin"], given["destination"], given["depDate"], index, number)
            if "manufacturer" in row:
                self.flights[place] = Flight(*common, *names, row["equipType"], row["manufacturer"])
            else:
                self.trains[place] = Train(*common, *names)


def scripted_agent(trip: Trip, asked: Asked) -> Generator[Calls | str, list[str], None]:
    """Solve a query: gives the calls of one turn after another, and the final text at the end.

    Send it the replies to the calls, one text for each, in their order.
    """
    known = _KnownRows()

    def ask(calls: Calls) -> Generator[Calls | str, list[str], None]:
        if calls:
            replies = yield calls
            for call, reply in zip(calls, replies, strict=True):
                known.add(call, reply)

    yield from ask(list(_first_calls(trip, asked)))
    names = [p["restaurant_name"] for kind, p in asked if kind == "restaurant_must_eat_named"]
    details = [
        ToolCall("query_attraction_details", {"attraction_name": n}) for n in known.recommended
    ]
    yield from ask(
        [*details, *(ToolCall("query_restaurant_details", {"restaurant_name": n}) for n in names)]
    )
    transport = [(k, p) for k, p in asked if KINDS[k].family in ("train", "flight", "hotel")]
    routes = choose(known.tables, trip, transport)
    if routes is None:
        yield "There is no such trip."
        return
    near = dict.fromkeys(p["attraction_name"] for _, p in asked if "attraction_name" in p)
    points = [known.tables.places[name] for name in near]
    yield from ask([*_station_calls(routes), *map(_restaurants_near, points)])
    choices = choose(known.tables, trip, asked)
    if choices is None:
        yield "There is no such trip."
        return
    sights = [known.tables.places[s.name] for s in first_sights(known.tables, trip, choices)]
    yield from ask([_restaurants_near(p) for p in dict.fromkeys(sights) if _is_new(p, known)])
    plan = None
    while True:
        try:
            plan = compose(known.tables, trip, choices)
        except _Unasked as need:
            yield from ask([_restaurants_near(need.point)])
            continue
        roads = _road_calls(plan, known) if plan else []
        if not roads:
            break
        yield from ask(roads)
    yield "There is no such trip." if plan is None else f"Here is the plan.\n\n{plan.json_text}"


def _first_calls(trip: Trip, asked: Asked) -> Iterator[ToolCall]:
    """Trains, flights, hotels and attractions of the cities."""
    for day, (origin, destination) in trip.legs.items():
        way = {0: "outbound", trip.num_days - 1: "inbound"}.get(day)
        modes = [KINDS[k].family for k, p in asked if way in p.get("directions", ())]
        arguments = {"origin": origin, "destination": destination, "depDate": trip.date(day)}
        yield ToolCall(f"query_{modes[0] if modes else 'train'}_info", arguments)
    day = 0
    for stay in trip.stays:
        dates = {"checkinDate": trip.date(day), "checkoutDate": trip.date(day + stay.nights)}
        day += stay.nights
        filters: dict[str, str] = {}
        for kind, parameters in asked:
            if KINDS[kind].family == "hotel" and parameters["city"] == stay.city:
                names = {"hotel_star": "hotelStar", "brand": "hotelBrands"}
                filters |= {n: str(parameters[k]) for k, n in names.items() if k in parameters}
        yield ToolCall("query_hotel_info", {"destination": stay.city, **dates, **filters})
        yield ToolCall("recommend_attractions", {"city": stay.city})


def _station_calls(choices: Choices) -> Iterator[ToolCall]:
    """The places of all stations that the travelers come to or leave from."""
    stations = [
        name
        for route in choices.routes.values()
        for name in (route[0].dep_station_name, route[-1].arr_station_name)
    ]
    for name in dict.fromkeys(stations):
        yield ToolCall("search_location", {"place_name": name})


def _restaurants_near(point: Point) -> ToolCall:
    latitude, longitude = coordinates(point).split(",")
    return ToolCall("recommend_restaurants", {"latitude": latitude, "longitude": longitude})


def _is_new(point: Point, known: _KnownRows) -> bool:
    return coordinates(point) not in known.asked_points


def _road_calls(plan: Plan, known: _KnownRows) -> Calls:
    """The ways of a plan for which no tool was called; until then they are estimates."""
    places = known.tables.places
    ways = [
        (coordinates(places[t.origin]), coordinates(places[t.destination])) for t in plan.of(Travel)
    ]
    new = [way for way in dict.fromkeys(ways) if way not in known.asked_roads]
    known.asked_roads.update(new)
    return [
        ToolCall("query_road_route_info", {"origin": origin, "destination": destination})
        for origin, destination in new
    ]


def _hotel(row: Mapping[str, Any], city: str) -> Hotel:
    return Hotel(
        *(row["name"], city, row["address"], float(row["latitude"]), float(row["longitude"])),
        *(row["brand"], row["hotelStar"], row["decorationTime"], row["price"], row["score"]),
        tuple(row["services"]),
    )


def _attraction(row: Mapping[str, Any]) -> Attraction:
    return Attraction(
        *(row["attraction_id"], row["attraction_name"], row["city"]),
        *(float(row["latitude"]), float(row["longitude"])),
        *(row["description"], row["attraction_type"], row["rating"]),
        *(row["opening_time"], row["closing_time"]),
        tuple(row["closing_dates"]),
        *(row["min_visit_hours"], row["max_visit_hours"], row["ticket_price"]),
    )


def _restaurant(row: Mapping[str, Any]) -> Restaurant:
    return Restaurant(
        *("", row["name"], row["city"], float(row["latitude"]), float(row["longitude"])),
        *(row["price_per_person"], row["cuisine"], row["opening_time"], row["closing_time"]),
        *(row["rating"], tuple(row["tags"])),
    )
