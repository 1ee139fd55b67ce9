"""Reading plans, and the eight dimensions of common sense, each violated alone."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from travel_worlds import choices_of, right_plan, world_with

from tutelage.data.types import Turn
from tutelage.envs.travel import TravelTask
from tutelage.envs.travel.commonsense import violations
from tutelage.envs.travel.environment import score_text
from tutelage.envs.travel.plan import (
    SCHEMA,
    Meal,
    Plan,
    Travel,
    Visit,
    cost_of,
    last_object,
)
from tutelage.envs.travel.planner import compose
from tutelage.envs.travel.query import Trip
from tutelage.envs.travel.rows import Attraction
from tutelage.envs.travel.tables import Tables

KINDS = ("train_earliest_departure_direct", "hotel_highest_rated", "restaurant_must_eat_named")


WORLD = world_with("plan", 2, KINDS)
RIGHT = right_plan(WORLD)
FULL_DAYS = [n for n, day in enumerate(RIGHT.days) if " to " not in day.city]


def as_json(plan: Plan) -> Any:
    return json.loads(plan.json_text)


def with_total(found: Any, trip: Trip) -> Plan:
    """A changed plan with its right total."""
    plan = Plan.model_validate(found)
    return plan.model_copy(update={"total_cost": cost_of(plan, trip)})


def wrong(plan: Plan, tables: Tables = WORLD.tables) -> set[str]:
    found = violations(plan, WORLD.query.trip, tables)
    assert len(found) == 8
    return {name for name, reason in found.items() if reason}


def changed(change: Callable[[Any], None]) -> Plan:
    """The right plan after a change of its JSON, with its right total."""
    found = as_json(RIGHT)
    change(found)
    return with_total(found, WORLD.query.trip)


def first(found: Any, kind: str, day: int = FULL_DAYS[0]) -> Any:
    return next(a for a in found["days"][day]["activities"] if a["type"] == kind)


def tables_with(name: str, **values: Any) -> Tables:
    """The tables with other values for one attraction."""
    rows: list[Attraction] = [
        replace(row, **values) if row.name == name else row for row in WORLD.tables.attractions
    ]
    return replace(WORLD.tables, attractions=tuple(rows))


def test_the_right_plan_violates_nothing() -> None:
    outcome = score_text(RIGHT.json_text, WORLD.query, WORLD.tables)
    assert wrong(RIGHT) == set()
    assert (outcome.score, outcome.is_success, outcome.details["reason"]) == (1.0, True, "")
    assert outcome.details["composite"] == 1.0


# --- one dimension at a time ----------------------------------------------------------------------


def set_city(found: Any) -> None:
    found["days"][0]["city"] = WORLD.query.trip.stays[0].city


def set_date(found: Any) -> None:
    found["days"][1]["date"] = "2020-01-01"


@pytest.mark.parametrize("change", [set_city, set_date])
def test_route_consistency(change: Callable[[Any], None]) -> None:
    assert "route_consistency" in wrong(changed(change))


def test_only_route_consistency() -> None:
    assert wrong(changed(set_city)) == {"route_consistency"}


def test_a_missing_leg_is_no_route() -> None:
    def drop(found: Any) -> None:
        activities = found["days"][-1]["activities"]
        found["days"][-1]["activities"] = [a for a in activities if a["type"] != "intercity"]

    assert "route_consistency" in wrong(changed(drop))


def set_price(found: Any) -> None:
    first(found, "meal")["cost"] += 1


def set_ticket(found: Any) -> None:
    first(found, "attraction")["cost"] += 1


def set_hotel_price(found: Any) -> None:
    found["days"][0]["hotel"]["price"] -= 1


def set_travel_cost(found: Any) -> None:
    first(found, "travel")["cost"] += 1


def set_train_price(found: Any) -> None:
    first(found, "intercity", 0)["cost"] = 1


def set_train_number(found: Any) -> None:
    first(found, "intercity", 0)["number"] = "G1"


@pytest.mark.parametrize(
    "change",
    [set_price, set_ticket, set_hotel_price, set_travel_cost, set_train_price, set_train_number],
)
def test_only_sandbox_compliance(change: Callable[[Any], None]) -> None:
    assert wrong(changed(change)) == {"sandbox_compliance"}


def test_a_segment_without_the_rest_of_its_route_is_in_no_table() -> None:
    """Later segments have the price 0, and cannot be taken alone."""
    trip, tables = WORLD.query.trip, WORLD.tables
    routes = tables.routes("train", *trip.legs[0], trip.date(0))
    changing = next(route for route in routes if len(route) == 2)
    choices = choices_of(WORLD)
    whole = compose(tables, trip, replace(choices, routes={**choices.routes, 0: changing}))
    assert whole is not None
    assert wrong(whole) == set()
    found = as_json(whole)
    del found["days"][0]["activities"][0]
    half = wrong(with_total(found, trip))
    assert half == {"route_consistency", "sandbox_compliance"}


def drop_hotel(found: Any) -> None:
    found["days"][0]["hotel"] = None


def move_dinner(found: Any) -> None:
    meals = [a for a in found["days"][FULL_DAYS[0]]["activities"] if a["type"] == "meal"]
    meals[-1]["meal"] = "lunch"


def drop_rest(found: Any) -> None:
    found["days"][FULL_DAYS[0]]["activities"].pop()


def skip(found: Any, kind: str) -> None:
    """Go past the first stop of a kind, straight to the next one."""
    activities = found["days"][FULL_DAYS[0]]["activities"]
    place = activities.index(first(found, kind))
    before, after = activities[place - 1], activities[place + 1]
    road = WORLD.tables.road(before["origin"], after["destination"])
    way = {"destination": after["destination"], "end": after["end"], "cost": road.cost}
    activities[place - 1 : place + 2] = [{**before, **way}]


def skip_lunch(found: Any) -> None:
    skip(found, "meal")


def skip_sight(found: Any) -> None:
    skip(found, "attraction")


@pytest.mark.parametrize("change", [drop_hotel, move_dinner, drop_rest, skip_lunch, skip_sight])
def test_only_itinerary_structure(change: Callable[[Any], None]) -> None:
    assert wrong(changed(change)) == {"itinerary_structure"}


def test_a_second_lunch_is_one_too_many() -> None:
    def add(found: Any) -> None:
        found["days"][FULL_DAYS[0]]["activities"].insert(0, first(found, "meal"))

    assert "itinerary_structure" in wrong(changed(add))


def start_early(found: Any) -> None:
    """A way that begins before the visit ahead of it ends."""
    travel = [a for a in found["days"][FULL_DAYS[0]]["activities"] if a["type"] == "travel"][1]
    hour = int(travel["start"][:2])
    travel["start"] = f"{hour - 1:02d}{travel['start'][2:]}"


def hurry(found: Any) -> None:
    travel = first(found, "travel")
    travel["start"] = f"{travel['end'][:3]}{int(travel['end'][3:]) - 1:02d}"


def jump(found: Any) -> None:
    activities = found["days"][FULL_DAYS[0]]["activities"]
    activities.remove(first(found, "travel"))


def overlap(found: Any) -> None:
    first(found, "hotel")["start"] = "20:00"
    first(found, "hotel")["end"] = "19:00"


def board_late(found: Any) -> None:
    *_, travel, ride = found["days"][-1]["activities"]
    travel["end"] = ride["start"]


@pytest.mark.parametrize("change", [hurry, jump, overlap, board_late, start_early])
def test_only_time_feasibility(change: Callable[[Any], None]) -> None:
    assert wrong(changed(change)) == {"time_feasibility"}


def test_only_business_hours() -> None:
    visit = RIGHT.days[FULL_DAYS[0]].of(Visit)[0]
    weekday = WORLD.query.trip.weekday(FULL_DAYS[0])
    closed = tables_with(visit.name, closing_dates=(weekday,))
    late = tables_with(visit.name, opening_time=visit.end, closing_time="24:00")
    early = tables_with(visit.name, opening_time="00:00", closing_time=visit.start)
    assert wrong(RIGHT, closed) == wrong(RIGHT, late) == wrong(RIGHT, early) == {"business_hours"}


def test_hours_may_go_past_midnight() -> None:
    visit = RIGHT.days[FULL_DAYS[0]].of(Visit)[0]
    late = tables_with(visit.name, opening_time=visit.start, closing_time="02:00")
    assert wrong(RIGHT, late) == set()


def test_only_duration_rationality() -> None:
    visit = RIGHT.days[FULL_DAYS[0]].of(Visit)[0]
    longer = tables_with(visit.name, min_visit_hours=9.0, max_visit_hours=10.0)
    shorter = tables_with(visit.name, min_visit_hours=0.1, max_visit_hours=0.2)
    assert wrong(RIGHT, longer) == wrong(RIGHT, shorter) == {"duration_rationality"}


def test_a_short_meal_is_no_meal() -> None:
    def gulp(found: Any) -> None:
        meal = first(found, "meal")
        meal["end"] = f"{meal['start'][:3]}{min(59, int(meal['start'][3:]) + 20):02d}"

    assert wrong(changed(gulp)) == {"duration_rationality"}


def test_only_cost_calculation_accuracy() -> None:
    dearer = RIGHT.model_copy(update={"total_cost": RIGHT.total_cost + 1})
    assert wrong(dearer) == {"cost_calculation_accuracy"}


def test_only_activity_diversity() -> None:
    """A day once more, on another day without a train."""

    def repeat(found: Any) -> None:
        one, other = FULL_DAYS[:2]
        found["days"][other]["activities"] = found["days"][one]["activities"]

    opened = replace(
        WORLD.tables,
        attractions=tuple(replace(row, closing_dates=()) for row in WORLD.tables.attractions),
    )
    assert wrong(changed(repeat), opened) == {"activity_diversity"}


def test_a_taxi_to_another_city_is_in_no_table() -> None:
    trip, tables = WORLD.query.trip, WORLD.tables
    ends = [f"{city} Central Station" for city in trip.legs[0]]
    road = tables.road(*ends)
    ride = {"type": "travel", "start": "00:00", "end": "23:00", "cost": road.cost}
    found = as_json(RIGHT)
    found["days"][0]["activities"] = [{**ride, "origin": ends[0], "destination": ends[1]}]
    assert "sandbox_compliance" in wrong(with_total(found, trip))


def test_the_score_is_the_product_of_the_two_shares() -> None:
    found = as_json(RIGHT)
    found["total_cost"] += 5
    found["days"][0]["city"] = "nowhere"
    for day in found["days"][:-1]:
        day["hotel"]["name"] = "no hotel"
    outcome = score_text(json.dumps(found), WORLD.query, WORLD.tables)
    details = outcome.details
    assert details["hard_share"] == pytest.approx(2 / 3)
    assert details["unmet"] == "hotel_highest_rated"
    assert details["commonsense_share"] == pytest.approx(4 / 8)
    assert outcome.score == pytest.approx(2 / 3 * 4 / 8)
    assert details["composite"] == pytest.approx(1 / 4)
    assert not outcome.is_success


def test_costs_are_for_people_vehicles_and_rooms() -> None:
    time = {"start": "09:00", "end": "10:00", "cost": 10.0}
    trip = replace(WORLD.query.trip, people=5, rooms=3)
    day = RIGHT.days[0].model_copy(
        update={
            "activities": (
                Travel.model_validate({**time, "origin": "a", "destination": "b"}),
                Meal.model_validate({**time, "meal": "lunch", "name": "c"}),
            )
        }
    )
    assert day.hotel is not None
    plan = RIGHT.model_copy(update={"days": (day,)})
    assert cost_of(plan, trip) == 2 * 10 + 5 * 10 + 3 * day.hotel.price


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1} and {"b": {"c": 2}} done', {"b": {"c": 2}}),
        ('see {this}: {"a": "}{"}', {"a": "}{"}),
        ('```json\n{"a": [1, 2]}\n```', {"a": [1, 2]}),
        ('{"a": 1} {"b": ', {"a": 1}),
        ('{"a": {"b": 1}', None),
        ('{"a": NaN}', None),
        ("[1, 2]", None),
        ("", None),
        ('{"a":' * 5000, None),
    ],
)
def test_the_last_object_is_taken(text: str, expected: Any) -> None:
    assert last_object(text) == expected


def test_hostile_texts_are_read_in_time() -> None:
    """Texts with as many beginnings of objects as there can be."""
    for text in ("{" * 100_000, '{"' * 20_000, '{"a": 1' * 8_000, "{}" * 20_000):
        assert last_object(text) in (None, {})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no plan", "the final text has no JSON object"),
        ("{}", "days: Field required"),
        ('{"days": [], "total_cost": "12"}', "total_cost: Input should be a valid number"),
        ('{"days": [{"date": 1}], "total_cost": 0}', "days.0.date: Input should be"),
        ('{"days": [], "total_cost": -1}', "total_cost: Input should be greater than"),
    ],
)
def test_a_malformed_plan_scores_nothing_and_says_why(text: str, reason: str) -> None:
    outcome = score_text(text, WORLD.query, WORLD.tables)
    assert (outcome.score, outcome.is_success) == (0.0, False)
    assert str(outcome.details["reason"]).startswith(reason)


def test_a_conversation_without_an_answer_scores_nothing() -> None:
    task = TravelTask()
    environment = task.environment()
    environment.start(task.prompts(0, 1, 0)[0], 0)
    assert environment.score().details["reason"] == (
        "the conversation ended without a final answer"
    )
    assert environment.act(Turn('{"days": [], "total_cost": 0}')).is_done
    assert environment.score().details["reason"] != (
        "the conversation ended without a final answer"
    )
    environment.start(task.prompts(0, 1, 0)[0], 0)
    assert environment.score().details["reason"] == (
        "the conversation ended without a final answer"
    )


def test_the_prompt_shows_the_form_of_a_plan() -> None:
    system = TravelTask().prompts(0, 1, 0)[0].content[0]
    assert SCHEMA in system["content"]  # type: ignore[index]
    keys = {key for day in as_json(RIGHT)["days"] for a in day["activities"] for key in a}
    assert all(f'"{key}"' in SCHEMA for key in (*keys, *as_json(RIGHT), *as_json(RIGHT)["days"][0]))


JUNK = (None, -1, 10**400, 1e308, "", "24:00", "99:99", "x", [], {}, [[]], True, "\ud800")


def spoiled(found: Any, rng: random.Random) -> Any:
    """The JSON of a plan with one value of it replaced or removed."""
    found = copy.deepcopy(found)
    place = found
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return found
        key = keys[int(rng.random() * len(keys))]
        child = place[key]
        if isinstance(child, dict | list) and rng.random() < 0.9:
            place = child
        elif rng.random() < 0.3:
            del place[key]
            return found
        else:
            place[key] = JUNK[int(rng.random() * len(JUNK))]
            return found


def test_spoiled_plans_are_scored_and_never_raise() -> None:
    rng, right, scores = random.Random("spoiled"), as_json(RIGHT), []
    for _ in range(400):
        found = spoiled(right, rng)
        outcome = score_text(json.dumps(found), WORLD.query, WORLD.tables)
        assert 0 <= outcome.score <= 1
        assert outcome.is_success == (outcome.score == 1)
        assert all(isinstance(value, float | int | str) for value in outcome.details.values())
        scores.append(outcome.score)
    assert {0.0, 1.0} & set(scores)
    assert sum(score == 1 for score in scores) < 40
