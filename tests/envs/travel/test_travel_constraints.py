"""Every kind of constraint has a plan that violates it and nothing else."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from travel_worlds import choices_of, right_plan, world_with

from tutelage.envs.travel.constraints import KINDS, direct_routes, is_met, solve
from tutelage.envs.travel.environment import score_text
from tutelage.envs.travel.generate import World
from tutelage.envs.travel.plan import Day, Intercity, Meal, Plan, Room, Visit
from tutelage.envs.travel.planner import Choices, compose
from tutelage.envs.travel.query import Constraint, Stay, Trip
from tutelage.envs.travel.rows import Mode, clock, minutes
from tutelage.envs.travel.tables import Tables

OTHERS = {
    "train": ("hotel_cheapest_star", "restaurant_highest_rated"),
    "flight": ("hotel_cheapest_star", "restaurant_highest_rated"),
    "hotel": ("train_cheapest_direct", "attraction_type_highest_rated"),
    "restaurant": ("flight_cheapest_direct", "hotel_price_range"),
    "attraction": ("train_latest_arrival_direct", "restaurant_must_eat_named"),
    "budget": ("hotel_star_service_required", "restaurant_must_eat_named"),
}
"""Constraints that stand beside one of each family."""
QUERIES = Path(os.environ.get("TUTELAGE_DATA", "")) / "deepplanning_travel_en.jsonl"


def dearest_routes(world: World, choices: Choices) -> list[Choices]:
    """The same with other routes there and back, the dearest first."""
    tables, trip = world.tables, world.query.trip
    modes: tuple[Mode, ...] = ("train", "flight")
    ways = [
        [route for mode in modes for route in tables.routes(mode, *trip.legs[day], trip.date(day))]
        for day in (0, trip.num_days - 1)
    ]
    pairs = sorted(product(*ways), key=lambda pair: -sum(route[0].price for route in pair))
    return [
        replace(choices, routes={**choices.routes, 0: there, trip.num_days - 1: back})
        for there, back in pairs[:20]
    ]


def alternatives(world: World, constraint: Constraint, choices: Choices) -> list[Choices]:
    """Choices that differ from the right ones in what one constraint asks for."""
    tables, trip, answer = world.tables, world.query.trip, constraint.answer
    family = KINDS[constraint.kind].family
    if family == "budget":
        return dearest_routes(world, choices)
    if family == "hotel":
        city = constraint.parameters["city"]
        others = [h for h in tables.hotels if h.city == city and h.name != answer["hotel_name"]]
        return [replace(choices, hotels={**choices.hotels, city: hotel}) for hotel in others]
    if family in ("train", "flight"):
        days = [0] if "outbound" in constraint.parameters["directions"] else [trip.num_days - 1]
        return [
            replace(choices, routes={**choices.routes, day: route})
            for day in days
            for route in tables.routes(family, *trip.legs[day], trip.date(day))  # type: ignore[arg-type]
            if route != choices.routes[day]
        ]
    names = set(answer.get("attraction_names", (answer.get("restaurant_name"),)))
    kept = {
        name
        for other in world.query.constraints
        if other is not constraint
        for name in other.answer.get("attraction_names", ())
    }
    dropped = [name for name in sorted(names) if name not in kept][:1]
    return [
        replace(
            choices,
            attractions=tuple(a for a in choices.attractions if a.name not in dropped),
            restaurants=tuple(r for r in choices.restaurants if r.name not in dropped),
        )
    ]


def tables_without(world: World, constraint: Constraint, choices: Choices) -> Tables:
    """The tables without what the answer names and the choices have not."""
    chosen = {a.name for a in choices.attractions} | {r.name for r in choices.restaurants}
    names = (
        *constraint.answer.get("attraction_names", ()),
        constraint.answer.get("restaurant_name"),
    )
    dropped = set(names) - chosen
    tables = world.tables
    return replace(
        tables,
        attractions=tuple(a for a in tables.attractions if a.name not in dropped),
        restaurants=tuple(r for r in tables.restaurants if r.name not in dropped),
    )


def failures(plan: Plan, world: World) -> set[str]:
    """Constraints and dimensions that a plan violates."""
    details = score_text(plan.json_text, world.query, world.tables).details
    unmet = {f"hard/{kind}" for kind in str(details["unmet"]).split(", ") if kind}
    return unmet | {name for name, value in details.items() if "/" in name and value == 0}


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_can_violate_one_constraint_and_nothing_else(kind: str) -> None:
    for number in range(12):
        kinds = (kind, *OTHERS[KINDS[kind].family])
        world = world_with(f"control-{kind}-{number}", 1 + number % 3, kinds)
        constraint = next(c for c in world.query.constraints if c.kind == kind)
        choices = choices_of(world)
        assert failures(right_plan(world), world) == set()
        for changed in alternatives(world, constraint, choices):
            wrong = compose(tables_without(world, constraint, changed), world.query.trip, changed)
            if wrong is not None and failures(wrong, world) == {f"hard/{kind}"}:
                return
    raise AssertionError(f"no plan violates {kind} and nothing else")


def test_the_kinds_are_those_of_the_benchmark() -> None:
    families = [kind.partition("_")[0] for kind in KINDS]
    counts = {family: families.count(family) for family in families}
    expected = {"train": 8, "flight": 10, "hotel": 8, "restaurant": 6, "attraction": 5, "budget": 1}
    assert counts == expected


@pytest.mark.parametrize("kind", ["train_departure_time_range", "flight_arrival_time_range"])
def test_both_ends_of_a_time_range_are_in_it(kind: str) -> None:
    world = world_with(f"range-{kind}", 1, (kind,))
    (constraint,) = world.query.constraints
    (way,) = constraint.parameters["directions"]
    mode: Mode = "train" if kind.startswith("train") else "flight"
    routes = direct_routes(world.tables, world.query.trip, mode, way)
    number = constraint.answer[f"{way}_{mode}_no"]
    leg = next(route[0] for route in routes if route[0].number == number)
    moment = leg.dep_datetime if "departure" in kind else leg.arr_datetime
    for shift, is_in in ((0, True), (1, False)):
        end, start = clock(minutes(moment[11:]) - shift), clock(minutes(moment[11:]) + shift)
        for asked in ({"from": "00:00", "to": end}, {"from": start, "to": "23:59"}):
            full = {**constraint.parameters, **asked}
            assert (constraint.answer in solve(world.tables, world.query.trip, kind, full)) == is_in


def test_a_budget_is_about_the_prices_and_not_the_total() -> None:
    world = world_with("budget", 1, ("budget_constraint",))
    (constraint,) = world.query.constraints
    trip = world.query.trip
    plan = right_plan(world)
    assert is_met(constraint, plan, trip)
    assert is_met(constraint, plan.model_copy(update={"total_cost": 1e9}), trip)
    below = Constraint(constraint.kind, {"max_budget": plan.total_cost - 1})
    assert not is_met(below, plan.model_copy(update={"total_cost": 0.0}), trip)


def test_no_constraint_follows_from_the_others() -> None:
    """Each has a meal or an attraction of its own, so that it can be violated alone."""
    kinds = ("attraction_top_rated_must_visit", "attraction_type_highest_rated")
    for number in range(6):
        world = world_with(f"implied-{number}", 2, kinds)
        top, one = (set(c.answer["attraction_names"]) for c in world.query.constraints)
        assert not one <= top
    kinds = ("restaurant_cheapest_nearby_attraction", "restaurant_closest_to_attraction")
    for number in range(20):
        world = world_with(f"implied-{number}", 1, kinds)
        names = [c.answer["restaurant_name"] for c in world.query.constraints]
        assert names[0] != names[1]


def test_one_night_at_the_hotel_is_not_enough() -> None:
    trip = Trip("A", (Stay("B", 2), Stay("C", 1)), "2026-03-02", 2, 1)
    constraint = Constraint("hotel_highest_rated", {"city": "B"}, {"hotel_name": "H"})

    def plan(*names: str) -> Plan:
        rooms = [Room(name=name, price=1) for name in names]
        days = [Day(date="", city="", hotel=room, activities=()) for room in rooms]
        return Plan(days=(*days, Day(date="", city="", activities=())), total_cost=0)

    assert is_met(constraint, plan("H", "H", "X"), trip)
    assert not is_met(constraint, plan("H", "X", "H"), trip)


# --- the public queries ---------------------------------------------------------------------------


def plan_with(fields: dict[str, Any], kind: str, num_days: int) -> Plan:
    """A plan with the names of a public constraint and nothing else."""
    time = {"start": "09:00", "end": "10:00", "cost": 1}
    activities: list[list[Any]] = [[] for _ in range(num_days)]
    for direction, day in (("outbound", 0), ("inbound", -1)):
        mode = kind.partition("_")[0]
        number = fields.get(f"{direction}_{mode}_no")
        if number:
            ride = {**time, "mode": mode, "number": number, "origin": "a", "destination": "b"}
            activities[day].append(Intercity.model_validate(ride))
    for name in fields.get("attraction_names", ()):
        activities[0].append(Visit.model_validate({**time, "name": name}))
    if "restaurant_name" in fields:
        meal = {**time, "name": fields["restaurant_name"], "meal": "lunch"}
        activities[0].append(Meal.model_validate(meal))
    room = Room(name=fields.get("hotel_name", "-"), price=1)
    days = [Day(date="", city="", hotel=room, activities=tuple(found)) for found in activities]
    return Plan(days=tuple(days), total_cost=0)


@pytest.mark.skipif(
    not QUERIES.is_file(), reason=f"TUTELAGE_DATA does not name a folder with {QUERIES.name}"
)
def test_every_constraint_of_the_public_queries_is_known() -> None:
    """The fields of `hard_constraints` are taken as they are; the names in them meet them."""
    seen = set()
    for line in QUERIES.read_text(encoding="utf-8").splitlines():
        meta = json.loads(line)["meta_info"]
        stay = Stay(meta["dest"][0], meta["days"] - 1)
        people, rooms = meta["people_number"], meta["room_number"]
        trip = Trip(meta["org"], (stay,), meta["depart_date"], people, rooms)
        for kind, fields in meta["hard_constraints"].items():
            constraint = Constraint(kind, fields, fields)
            seen.add(kind)
            assert is_met(constraint, plan_with(fields, kind, trip.num_days), trip), constraint
            empty = plan_with({}, "", trip.num_days)
            assert is_met(constraint, empty, trip) == (kind == "budget_constraint"), constraint
    assert seen == KINDS.keys()
