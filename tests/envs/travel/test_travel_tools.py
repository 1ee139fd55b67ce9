"""The nine tools: their schemas, their answers, and what they say to malformed calls."""

from __future__ import annotations

import copy
import itertools
import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tutelage.data.types import ToolCall, Turn
from tutelage.envs.environment import Environment, Reply
from tutelage.envs.tools import call_tool
from tutelage.envs.travel import TravelTask
from tutelage.envs.travel.country import SEAT_CLASSES
from tutelage.envs.travel.generate import World, make_world
from tutelage.envs.travel.rows import WALK_METERS, Mode
from tutelage.envs.travel.tools import make_tools

SCHEMA = Path(os.environ.get("TUTELAGE_DATA", "")) / "deepplanning_tool_schema_en.json"
WORLD = make_world("tools", 3, False)
FUNCTIONS = [tool.schema["function"] for tool in make_tools(WORLD.tables)]


def ask(name: str, world: World = WORLD, /, **arguments: Any) -> Any:
    """What a tool returns to a call that is no error."""
    answer = call_tool(make_tools(world.tables), ToolCall(name, arguments))
    assert not answer.is_error, answer.content
    try:
        return json.loads(answer.content)
    except ValueError:
        return answer.content


def error_of(name: str, /, **arguments: Any) -> str:
    answer = call_tool(make_tools(WORLD.tables), ToolCall(name, arguments))
    assert answer.is_error, answer.content
    return str(json.loads(answer.content)["error"])


@pytest.mark.skipif(
    not SCHEMA.is_file(), reason=f"TUTELAGE_DATA does not name a folder with {SCHEMA.name}"
)
def test_names_and_arguments_are_those_of_the_benchmark() -> None:
    def shape(schema: dict[str, Any]) -> Any:
        function = schema["function"]
        parameters = function["parameters"]
        types = {name: spec["type"] for name, spec in parameters["properties"].items()}
        return schema["type"], function["name"], parameters["type"], types, parameters["required"]

    theirs = json.loads(SCHEMA.read_text(encoding="utf-8"))
    ours = [tool.schema for tool in make_tools(WORLD.tables)]
    assert [shape(schema) for schema in ours] == [shape(schema) for schema in theirs]
    assert not {s["function"]["description"] for s in ours} & {
        s["function"]["description"] for s in theirs
    }


def test_every_argument_is_described() -> None:
    assert len(FUNCTIONS) == 9
    for schema in FUNCTIONS:
        assert all(
            spec.keys() == {"description", "type"}
            for spec in schema["parameters"]["properties"].values()
        )


# --- answers --------------------------------------------------------------------------------------


def leg() -> dict[str, str]:
    trip = WORLD.query.trip
    origin, destination = trip.legs[0]
    return {"origin": origin, "destination": destination, "depDate": trip.date(0)}


@pytest.mark.parametrize("mode", ["train", "flight"])
def test_routes_are_direct_or_show_every_segment(mode: str) -> None:
    routes = ask(f"query_{mode}_info", **leg())
    kinds = [sorted(key for key in route if key != "price") for route in routes]
    assert kinds[-1] == ["Segment 1", "Segment 2"]
    assert all(kind == ["Segment 1"] for kind in kinds[:-1])
    first, second = routes[-1]["Segment 1"], routes[-1]["Segment 2"]
    assert first["arrStationName"] == second["depStationName"]
    assert first["arrDateTime"] < second["depDateTime"]
    assert {str(route["Segment 1"]["Remaining Seats"]).isdigit() for route in routes} <= {
        True,
        False,
    }


def test_seat_classes_filter() -> None:
    every = ask("query_flight_info", **leg())
    for name in ("Economy Class", "Business Class", "First Class"):
        found = ask("query_flight_info", **leg(), seatClassName=name)
        expected = [route for route in every if route["Segment 1"]["seatClassName"] == name]
        assert (found == expected) if expected else found.startswith("No flights from")


@pytest.mark.parametrize(("mode", "other"), [("train", "flight"), ("flight", "train")])
def test_a_mode_has_its_own_seat_classes_whatever_the_rows(mode: Mode, other: Mode) -> None:
    """Also one that no row has is no error, and one of the other mode is."""
    tables = replace(
        WORLD.tables,
        trains=tuple(r for r in WORLD.tables.trains if r.seat_class == SEAT_CLASSES["train"][0]),
        flights=tuple(r for r in WORLD.tables.flights if r.seat_class == SEAT_CLASSES["flight"][0]),
    )
    world = World(tables, WORLD.query)
    for name in SEAT_CLASSES[mode][1:]:
        found = ask(f"query_{mode}_info", world, **leg(), seatClassName=name)
        assert found.startswith(f"No {mode}s from")
    for name in SEAT_CLASSES[other]:
        message = error_of(f"query_{mode}_info", **leg(), seatClassName=name)
        assert f"{name!r}, not one of {', '.join(SEAT_CLASSES[mode])}" in message


def test_a_day_without_trains_says_so() -> None:
    assert ask("query_train_info", **{**leg(), "depDate": "2020-01-01"}).startswith("No trains")


def test_hotels_are_of_the_city_and_filtered() -> None:
    city = WORLD.query.trip.stays[0].city
    dates = {"checkinDate": "2026-05-01", "checkoutDate": "2026-05-02"}
    every = ask("query_hotel_info", destination=city, **dates)
    named = {hotel.name for hotel in WORLD.tables.hotels if hotel.city == city}
    assert {row["name"] for row in every} == named
    star = ask("query_hotel_info", destination=city, **dates, hotelStar="3")
    assert star == [row for row in every if row["hotelStar"] == 3]
    brand = every[0]["brand"]
    branded = ask("query_hotel_info", destination=city, **dates, hotelBrands=brand)
    assert branded == [row for row in every if row["brand"] == brand]
    assert ask("query_hotel_info", destination=city, **dates, hotelStar="1").startswith("No such")


def test_attractions_by_city_type_and_word() -> None:
    city = WORLD.query.trip.stays[0].city
    every = ask("recommend_attractions", city=city)
    assert {row["attraction_name"] for row in every} == {
        sight.name for sight in WORLD.tables.attractions if sight.city == city
    }
    kind = every[0]["attraction_type"]
    typed = ask("recommend_attractions", city=city, attraction_type=kind)
    assert typed == [row for row in every if row["attraction_type"] == kind]
    word = every[0]["attraction_name"].lower()
    assert [r["attraction_name"] for r in ask("recommend_attractions", city=word)] == [
        every[0]["attraction_name"]
    ]


def test_coordinates_have_six_decimals_and_agree() -> None:
    sight = WORLD.tables.attractions[0]
    place = ask("search_location", place_name=sight.name)
    details = ask("query_attraction_details", attraction_name=sight.name)
    for key in ("latitude", "longitude"):
        assert place[key] == details[key]
        assert len(place[key].partition(".")[2]) == 6


def test_short_ways_are_walked_and_long_ones_driven() -> None:
    places = WORLD.tables.places
    city = WORLD.query.trip.stays[0].city
    names = [name for name in places if WORLD.tables.city_of[name] == city]
    seen = set()
    for first, second in itertools.pairwise(names):
        ends = [ask("search_location", place_name=name) for name in (first, second)]
        texts = [f"{end['latitude']},{end['longitude']}" for end in ends]
        road = ask("query_road_route_info", origin=texts[0], destination=texts[1])
        is_walk = road["distance_in_meters"] <= WALK_METERS
        assert (road["cost"] == 0) == is_walk
        seen.add(is_walk)
    assert seen == {True, False}


def test_restaurants_are_near_and_sorted() -> None:
    sight = ask("search_location", place_name=WORLD.tables.attractions[0].name)
    point = {key: sight[key] for key in ("latitude", "longitude")}
    found = ask("recommend_restaurants", **point)
    distances = [row["distance_in_meters"] for row in found]
    assert distances == sorted(distances)
    assert max(distances) <= 1000
    details = ask("query_restaurant_details", restaurant_name=found[0]["name"])
    known = {**details, "distance_in_meters": distances[0]}
    assert found[0] == {key: value for key, value in known.items() if key != "id"}


# --- malformed calls ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("query_train_info", {}, "origin: Field required"),
        ("query_train_info", {"origin": 5}, "origin: Input should be a valid string"),
        ("query_train_info", {**leg(), "depDate": "12 May"}, "depDate is '12 May', and must be"),
        ("query_train_info", {**leg(), "depDate": "2026-02-30"}, "must be a date"),
        ("query_train_info", {**leg(), "origin": "Paris"}, "there is no city 'Paris'"),
        ("query_train_info", {**leg(), "seatClassName": "Sofa"}, "not one of Second Class Seat"),
        ("query_train_info", {**leg(), "speed": "1"}, "speed: Extra inputs are not permitted"),
        ("search_location", {"place_name": ""}, "there is no place ''"),
        (
            "query_road_route_info",
            {"origin": "33.000000,110.000000", "destination": "33.000000,110.000000"},
            "no coordinates of a place",
        ),
        ("query_road_route_info", {"origin": "1,2", "destination": "1,2"}, "no coordinates"),
        ("recommend_restaurants", {"latitude": "33", "longitude": "110"}, "six decimals"),
        ("query_attraction_details", {"attraction_name": "Tower"}, "no attraction 'Tower'"),
        ("recommend_attractions", {"city": "", "attraction_type": "Zoo"}, "not one of Art"),
        ("query_restaurant_details", {"restaurant_name": "x"}, "no restaurant 'x'"),
        ("book_hotel", {}, "there is no tool 'book_hotel'"),
    ],
)
def test_an_error_says_what_is_wrong(name: str, arguments: dict[str, Any], message: str) -> None:
    assert message in error_of(name, **arguments)


JUNK: tuple[Any, ...] = (
    *(None, True, 0, -1, 3.5, "", " ", "nowhere", "0,0", "2026-13-01", "９", "\ud800", "x" * 3000),
    *([], ["a"], {}, {"a": {"b": []}}, 10**400, float("nan"), "33.000000,110.000000", "\x00"),
)


def malformed(rng: random.Random) -> ToolCall:
    """A call with a wrong tool, a missing, unknown or wrong argument."""
    schema = FUNCTIONS[int(rng.random() * len(FUNCTIONS))]
    names, required = list(schema["parameters"]["properties"]), schema["parameters"]["required"]

    def junk() -> Any:
        return copy.deepcopy(JUNK[int(rng.random() * len(JUNK))])

    arguments: dict[str, Any] = {name: junk() for name in names if name in required}
    match int(rng.random() * 5):
        case 0:
            return ToolCall(schema["name"] + "_", arguments)
        case 1:
            del arguments[required[int(rng.random() * len(required))]]
        case 2:
            arguments[f"extra{rng.random()}"] = junk()
        case 3:
            return ToolCall(schema["name"], arguments, error="the call is no JSON object")
        case _:
            # Every tool has a required argument that is no junk value.
            arguments[required[0]] = junk()
    return ToolCall(schema["name"], arguments)


def probe(environment: Environment) -> Reply:
    """The answers to fixed calls."""
    trip = WORLD.query.trip
    stay = {"checkinDate": trip.date(0), "checkoutDate": trip.date(1)}
    calls = [
        ToolCall("query_train_info", leg()),
        ToolCall("query_hotel_info", {"destination": trip.stays[0].city, **stay}),
        ToolCall("recommend_attractions", {"city": trip.stays[0].city}),
    ]
    return environment.act(Turn("", tuple(calls)))


def start(seed: int) -> Environment:
    environment = TravelTask(1).environment()
    environment.start(TravelTask(1).prompts(0, 1, seed)[0], 0)
    return environment


def check_malformed(num_calls: int) -> None:
    rng = random.Random("malformed")
    first, second = start(0), start(0)
    other, before = probe(start(1)), probe(second)
    for _ in range(num_calls):
        reply = first.act(Turn("", (malformed(rng),)))
        assert reply.num_errors == 1, reply
        assert json.loads(reply.messages[0]["content"])["error"]
        assert not reply.is_done
    assert probe(first) == before == probe(second)
    assert probe(start(0)) == before
    assert probe(start(1)) == other


def test_malformed_calls_are_answered_and_change_nothing() -> None:
    check_malformed(300)


@pytest.mark.slow
def test_ten_thousand_malformed_calls_are_answered_and_change_nothing() -> None:
    check_malformed(10_000)


def test_a_right_call_is_no_error() -> None:
    """Negative control of the count above."""
    environment = TravelTask(1).environment()
    opening = environment.start(TravelTask(1).prompts(0, 1, 0)[0], 0)
    assert len(opening.tools) == 9
    text = opening.messages[1]["content"]
    city = text.partition(" to ")[2].partition(",")[0].partition(" for ")[0]
    reply = environment.act(Turn("", (ToolCall("recommend_attractions", {"city": city}),)))
    assert reply.num_errors == 0
