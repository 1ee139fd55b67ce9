"""Generated queries: one solution each by a search of the test's own, and a plan by the tools."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from travel_worlds import world_with

from tutelage.data.types import Prompt, Turn
from tutelage.envs.tools import call_tool
from tutelage.envs.travel import TravelTask
from tutelage.envs.travel.agent import scripted_agent
from tutelage.envs.travel.constraints import KINDS
from tutelage.envs.travel.generate import World, make_world
from tutelage.envs.travel.query import Constraint, Stay, Trip
from tutelage.envs.travel.task import world_of
from tutelage.envs.travel.tools import make_tools
from tutelage.envs.travel.wording import write_query
from tutelage.errors import ConfigError, DataError

LEVELS = (1, 2, 3)
HASHES = {
    1: "074ff83e922786bd",
    2: "5fca7a46eb6c83e0",
    3: "c2a60e80d60bffaa",
}
"""Of the first ten worlds of each level; a change makes prompts of old run folders others."""

# --- a search of our own --------------------------------------------------------------------------

Better = Callable[[Any, Any], bool]
CHEAPER: Better = lambda a, b: a.price < b.price  # noqa: E731
SOONER: Better = lambda a, b: a.dep_datetime < b.dep_datetime  # noqa: E731
SHORTER: Better = lambda a, b: a.duration < b.duration  # noqa: E731


def only(rows: list[Any], better: Better | None = None) -> list[Any]:
    """The rows that no other row is better than; all without an order."""
    if better is None:
        return rows
    return [row for row in rows if not any(better(other, row) for other in rows)]


def hour(moment: str) -> str:
    return moment.split(" ")[1]


TRANSPORT: dict[str, tuple[Callable[[Any, Any], bool], Better | None]] = {
    "cheapest_direct": (lambda r, p: True, CHEAPER),
    "cheapest_train_type": (lambda r, p: r.train_type == p["train_type"], CHEAPER),
    "cheapest_airline_direct": (lambda r, p: r.airline == p["airline"], CHEAPER),
    "cheapest_manufacturer_direct": (lambda r, p: r.manufacturer == p["manufacturer"], CHEAPER),
    "earliest_airline_direct": (lambda r, p: r.airline == p["airline"], SOONER),
    "earliest_departure_direct": (lambda r, p: True, SOONER),
    "latest_arrival_direct": (lambda r, p: True, lambda a, b: a.arr_datetime > b.arr_datetime),
    "shortest_duration_direct": (lambda r, p: True, SHORTER),
    "departure_time_range": (lambda r, p: p["from"] <= hour(r.dep_datetime) <= p["to"], None),
    "arrival_time_range": (lambda r, p: p["from"] <= hour(r.arr_datetime) <= p["to"], None),
    "seat_class": (lambda r, p: r.seat_class == p["seat_class"], None),
    "seat_status": (
        lambda r, p: r.seat_status is None or r.seat_status >= p["people_number"],
        None,
    ),
}
BEST: Better = lambda a, b: a.score > b.score  # noqa: E731
HOTELS: dict[str, tuple[Callable[[Any, Any], bool], Better | None]] = {
    "cheapest_brand": (lambda r, p: r.brand == p["brand"], CHEAPER),
    "cheapest_star": (lambda r, p: r.hotel_star == p["hotel_star"], CHEAPER),
    "highest_rated": (lambda r, p: True, BEST),
    "star_highest_rated": (lambda r, p: r.hotel_star == p["hotel_star"], BEST),
    "brand_highest_rated": (lambda r, p: r.brand == p["brand"], BEST),
    "newest_decoration": (lambda r, p: r.decoration_time >= p["year_threshold"], None),
    "price_range": (lambda r, p: p["min_price"] <= r.price <= p["max_price"], None),
    "star_service_required": (
        lambda r, p: r.hotel_star == p["hotel_star"] and p["required_service"] in r.services,
        None,
    ),
}


def direct(world: World, trip: Trip, mode: str, direction: str) -> list[Any]:
    """Rows of the only segment of a route, of the first or last day."""
    rows = world.tables.trains if mode == "train" else world.tables.flights
    day = 0 if direction == "outbound" else trip.num_days - 1
    city = (trip.stays[0] if direction == "outbound" else trip.stays[-1]).city
    ends = (trip.origin, city) if direction == "outbound" else (city, trip.origin)
    wanted = (*ends, trip.date(day))
    found = [r for r in rows if (r.origin_city, r.destination_city, r.dep_date) == wanted]
    changed = {r.route_index for r in found if r.segment_index > 1}
    return [r for r in found if r.route_index not in changed]


def meters(a: Any, b: Any) -> int:
    middle = math.radians((a.latitude + b.latitude) / 2)
    north, east = a.latitude - b.latitude, (a.longitude - b.longitude) * math.cos(middle)
    return round(111_195 * math.hypot(north, east))


def solutions(world: World, trip: Trip, constraint: Constraint) -> list[dict[str, Any]]:
    """What meets a constraint: every combination of names and numbers, by trying all."""
    family, _, rest = constraint.kind.partition("_")
    asked, tables = constraint.parameters, world.tables
    if family in ("train", "flight"):
        holds, better = TRANSPORT[rest]
        found: list[dict[str, Any]] = [{}]
        for direction in asked["directions"]:
            rows = [r for r in direct(world, trip, family, direction) if holds(r, asked)]
            numbers = [getattr(r, f"{family}_no") for r in only(rows, better)]
            found = [{**f, f"{direction}_{family}_no": n} for f in found for n in numbers]
        return found
    if family == "hotel":
        holds, better = HOTELS[rest]
        hotels = [r for r in tables.hotels if r.city == asked["city"] and holds(r, asked)]
        return [{"hotel_name": r.name} for r in only(hotels, better)]
    if family == "restaurant":
        return [{"restaurant_name": name} for name in restaurants(world, rest, asked)]
    if family == "attraction":
        return [{"attraction_names": names} for names in sights(world, rest, asked)]
    return [{}]


def restaurants(world: World, rest: str, asked: Any) -> list[str]:
    if rest == "must_eat_named":
        named = [r for r in world.tables.restaurants if r.name == asked["restaurant_name"]]
        return [r.name for r in named]
    sight = next(s for s in world.tables.attractions if s.name == asked["attraction_name"])
    near = [r for r in world.tables.restaurants if meters(sight, r) <= 1000]
    match rest:
        case "cheapest_nearby_attraction":
            near = only(near, lambda a, b: a.price_per_person < b.price_per_person)
        case "closest_to_attraction":
            near = only(near, lambda a, b: meters(sight, a) < meters(sight, b))
        case "highest_rated":
            near = only(near, lambda a, b: a.rating > b.rating)
        case "specific_cuisine_nearby":
            near = [r for r in near if r.cuisine == asked["cuisine"]]
        case "specific_tag_nearby":
            near = [r for r in near if asked["required_tag"] in r.tags]
        case _:
            raise AssertionError(rest)
    return [r.name for r in near]


def sights(world: World, rest: str, asked: Any) -> list[list[str]]:
    rows = [s for s in world.tables.attractions if s.city == asked["city"]]
    match rest:
        case "must_visit_named":
            assert {s.name for s in rows}.issuperset(asked["attraction_names"])
            return [asked["attraction_names"]]
        case "all_of_type":
            return [[s.name for s in rows if s.attraction_type == asked["attraction_type"]]]
        case "all_free_attractions":
            return [[s.name for s in rows if s.ticket_price == 0]]
        case "type_highest_rated":
            rows = [s for s in rows if s.attraction_type == asked["attraction_type"]]
            return [[s.name] for s in only(rows, lambda a, b: a.rating > b.rating)]
        case "top_rated_must_visit":
            ratings = sorted((s.rating for s in rows), reverse=True)
            above = [s.name for s in rows if s.rating >= ratings[2]]
            return [above] if len(above) == 3 else [above, above]
        case _:
            raise AssertionError(rest)


def is_answer(found: dict[str, Any], answer: dict[str, Any]) -> bool:
    return all(
        sorted(answer[key]) == sorted(value) if isinstance(value, list) else answer[key] == value
        for key, value in found.items()
    )


# --- the scripted agent ---------------------------------------------------------------------------


def solve_by_tools(task: TravelTask, prompt: Prompt) -> Any:
    """The outcome of the scripted agent's conversation; no call of its may be an error."""
    environment = task.environment()
    environment.start(prompt, 0)
    query = world_of(prompt).query
    agent = scripted_agent(query.trip, [(c.kind, c.parameters) for c in query.constraints])
    step = next(agent)
    while isinstance(step, list):
        reply = environment.act(Turn("", tuple(step)))
        assert (reply.num_errors, reply.is_done) == (0, False), reply
        step = agent.send([message["content"] for message in reply.messages])
    assert environment.act(Turn(step)).is_done
    return environment.score()


def check(level: int, num_queries: int, seed: int) -> set[str]:
    """Uniqueness and solution of queries; gives their kinds."""
    task, kinds = TravelTask(level), set()
    for prompt in task.prompts(step=0, num_prompts=num_queries, seed=seed):
        world = world_of(prompt)
        trip = world.query.trip
        for constraint in world.query.constraints:
            found = solutions(world, trip, constraint)
            assert len(found) == 1, (prompt.id, constraint)
            assert is_answer(found[0], constraint.answer), (prompt.id, constraint)
            kinds.add(constraint.kind)
        assert 3 <= len(world.query.constraints) <= 6
        outcome = solve_by_tools(task, prompt)
        assert (outcome.score, outcome.is_success) == (1.0, True), (prompt.id, outcome.details)
    return kinds


@pytest.mark.parametrize("level", LEVELS)
def test_queries_have_one_solution_and_tools_reach_it(level: int) -> None:
    assert len(check(level, num_queries=6, seed=1)) > 8


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_a_thousand_queries_have_one_solution_and_tools_reach_it(level: int) -> None:
    assert check(level, num_queries=1000, seed=0) == KINDS.keys()


def test_the_search_sees_a_second_solution() -> None:
    """Negative control: with a twin of the answer there are two solutions."""
    world = world_with("twin", 1, ("hotel_highest_rated",))
    (constraint,) = world.query.constraints
    best = next(h for h in world.tables.hotels if h.name == constraint.answer["hotel_name"])
    twin = type(best)(**{**vars(best), "name": "Twin"})
    tables = type(world.tables)(**{**fields_of(world), "hotels": (*world.tables.hotels, twin)})
    assert len(solutions(World(tables, world.query), world.query.trip, constraint)) == 2


def fields_of(world: World) -> dict[str, Any]:
    names = ("trains", "flights", "hotels", "attractions", "restaurants", "locations", "roads")
    return {name: getattr(world.tables, name) for name in names}


def test_an_agent_that_finds_no_restaurants_ends() -> None:
    """A tool that says that there are none has answered; the agent does not ask again."""
    world = world_with("empty", 1, ())
    tools = make_tools(replace(world.tables, restaurants=()))
    agent = scripted_agent(world.query.trip, [])
    step = next(agent)
    for _ in range(20):
        if isinstance(step, str):
            break
        step = agent.send([call_tool(tools, call).content for call in step])
    assert step == "There is no such trip."


# --- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_the_same_seed_gives_the_same_world(level: int) -> None:
    digest = hashlib.blake2b(digest_size=8)
    for prompt in TravelTask(level).prompts(step=3, num_prompts=10, seed=7):
        world = world_of(prompt)
        digest.update(repr((fields_of(world), world.query)).encode())
    assert digest.hexdigest() == HASHES[level]


def test_prompts_are_pure_functions_of_their_counters() -> None:
    task = TravelTask(2)
    prompts = task.prompts(step=4, num_prompts=3, seed=9)
    assert task.prompts(step=4, num_prompts=5, seed=9)[:3] == prompts
    assert [p.id for p in prompts] == [f"travel2-train-9-4-{index}" for index in range(3)]
    assert task.held_out(2, seed=9)[1].id == "travel2-held_out-9-1"
    texts = {str(p.content) for p in (*prompts, *task.prompts(5, 3, 9), *task.prompts(4, 3, 8))}
    assert len(texts) == 9


def test_training_and_held_out_prompts_never_meet() -> None:
    """Each pair of cities is on one side, whatever the seeds."""
    sides: dict[bool, set[tuple[str, str]]] = {True: set(), False: set()}
    for is_held_out in sides:
        for index in range(30):
            trip = world_with(f"side-{index}", 1, (), is_held_out).query.trip
            sides[is_held_out].add((trip.origin, trip.stays[0].city))
    assert not sides[True] & sides[False]
    train, held_out = TravelTask(1).prompts(0, 5, -1), TravelTask(1).held_out(5, -1)
    for prompt in (*train, *held_out):
        trip = world_of(prompt).query.trip
        text = prompt.content[1]["content"]  # type: ignore[index]
        assert f"from {trip.origin} to {trip.stays[0].city}" in text  # type: ignore[operator]


@pytest.mark.parametrize(("level", "days"), [(1, {2, 3}), (2, {4, 5}), (3, {6, 7})])
def test_levels_differ_in_days_and_cities(level: int, days: set[int]) -> None:
    trips = [world_with(f"level-{n}", level, ()).query.trip for n in range(20)]
    assert {trip.num_days for trip in trips} == days
    assert {len(trip.stays) for trip in trips} == ({1, 2} if level == 3 else {1})


def test_the_environment_grades_and_the_task_does_not() -> None:
    task = TravelTask()
    assert (task.name, task.grade(task.prompts(0, 1, 0)[0], "{}")) == ("travel", None)


@pytest.mark.parametrize(
    "identity", ["ledger5-train-0-0-0", "travel4-train-0-0-0", "travel1-x", ""]
)
def test_a_foreign_prompt_is_refused_in_one_line(identity: str) -> None:
    with pytest.raises(DataError, match="is not a travel prompt") as caught:
        TravelTask().environment().start(Prompt(identity, ""), 0)
    assert "\n" not in str(caught.value)


def test_an_unknown_level_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"data\.level must be 1, 2 or 3, got 4"):
        TravelTask(4)


def test_text_names_every_parameter() -> None:
    """What a constraint asks for stands in the text, so that the text alone is enough."""
    for index in range(30):
        world = make_world(f"text-{index}", 1 + index % 3, False)
        for constraint in world.query.constraints:
            hidden = {"directions", "people_number"}
            if KINDS[constraint.kind].family == "restaurant":
                hidden.add("city")
            for name, value in constraint.parameters.items():
                for part in value if isinstance(value, list) else [value]:
                    assert name in hidden or str(part) in world.query.text, constraint


def test_one_traveler_writes_i_and_several_write_we() -> None:
    """In every sentence there is."""
    plural = re.compile(r"\b(we|us|our)\b", re.IGNORECASE)
    singular = re.compile(r"\b(I|me)\b")
    asked: dict[str, Any] = {name: "7" for kind in KINDS.values() for name in kind.asks}
    asked |= {"city": "B", "attraction_name": "T", "attraction_names": ["T", "U"]}
    constraints = [Constraint(kind, asked) for kind in KINDS]
    for people in range(1, 6):
        trip = Trip("A", (Stay("B", 1), Stay("C", 1)), "2026-03-02", people, (people + 1) // 2)
        for seed in range(6):
            text = write_query(trip, constraints, random.Random(seed))
            text = text.replace("I'm planning", "Planning")
            assert bool(plural.search(text)) == (people > 1)
            assert bool(singular.search(text)) == (people == 1)


def test_draws_use_nothing_but_random() -> None:
    """Only random() is promised to stay the same in every Python version."""

    class Only(random.Random):
        def getrandbits(self, k: int) -> int:
            raise AssertionError("getrandbits")

    original = random.Random
    random.Random = Only  # type: ignore[misc]
    try:
        make_world("streams", 3, False)
    finally:
        random.Random = original  # type: ignore[misc]
