"""Plans with nothing in them, and the rules that the system message has to have."""

from __future__ import annotations

import json

from travel_worlds import right_plan, world_with

from tutelage.envs.travel.commonsense import violations
from tutelage.envs.travel.environment import INSTRUCTIONS, score_text
from tutelage.envs.travel.plan import Plan

WORLD = world_with("nothing", 1, ("hotel_highest_rated", "budget_constraint"))
RIGHT = right_plan(WORLD)


def num_violated(plan: Plan) -> int:
    return sum(map(bool, violations(plan, WORLD.query.trip, WORLD.tables).values()))


def empty_days(number: int) -> str:
    """A plan with dates and nothing else."""
    days: list[object] = [
        {"date": WORLD.query.trip.date(n), "city": "", "hotel": None, "activities": []}
        for n in range(number)
    ]
    return json.dumps({"days": days, "total_cost": 0})


def test_a_plan_with_nothing_in_it_scores_nothing() -> None:
    """Whatever is asked for: a budget, too, is not kept by staying at home."""
    for number in (0, 1, WORLD.query.trip.num_days):
        outcome = score_text(empty_days(number), WORLD.query, WORLD.tables)
        assert (outcome.score, outcome.is_success) == (0.0, False)
        details = outcome.details
        assert details.pop("reason")
        assert details.pop("unmet")
        assert set(details.values()) == {0}, details


def test_a_day_with_nothing_in_it_violates_every_dimension() -> None:
    for place, day in enumerate(RIGHT.days):
        empty = day.model_copy(update={"activities": ()})
        days = (*RIGHT.days[:place], empty, *RIGHT.days[place + 1 :])
        assert num_violated(RIGHT.model_copy(update={"days": days})) == 8
    assert num_violated(RIGHT.model_copy(update={"days": RIGHT.days[:-1]})) == 8
    assert num_violated(RIGHT) == 0


def test_a_budget_is_kept_on_the_route_only() -> None:
    assert score_text(RIGHT.json_text, WORLD.query, WORLD.tables).details["composite"] == 1.0
    found = json.loads(RIGHT.json_text)
    found["days"][0]["city"] = "nowhere"
    details = score_text(json.dumps(found), WORLD.query, WORLD.tables).details
    assert "budget_constraint" in str(details["unmet"])
    assert "hotel_highest_rated" not in str(details["unmet"])


RULES = {
    "sandbox_compliance": (
        "exactly as they return them",
        "never in the city where the trip begins",
        'no "travel" leads to another city',
        "A route is taken whole",
    ),
    "route_consistency": (
        "every day of the trip, with its date",
        "and on no other day",
        'with a train or flight "from A to B"',
    ),
    "itinerary_structure": (
        "begins from 11:00 to 14:00 and dinner from 17:00 to 20:00",
        "at most one lunch and one dinner a day",
        "two attractions or four hours of visits",
        "five hours on end",
        "the last one has null",
        'ends with an activity "hotel" there',
    ),
    "time_feasibility": (
        "from 00:00 to 24:00",
        "every activity ends after it begins",
        "in order and do not overlap",
        "where the one before it ended",
        "at least as long as the road takes",
        "20 minutes before a train departs and at an airport 60 minutes",
        "10 minutes after a train arrives and 30",
    ),
    "business_hours": ("Visits and meals are within the opening hours", "not on closed weekdays"),
    "duration_rationality": ("as long as recommended", "takes 45 to 120 minutes"),
    "cost_calculation_accuracy": ("the sum for all people, vehicles and rooms",),
    "activity_diversity": ("No attraction and no restaurant comes twice",),
}
"""What the system message says of each dimension."""


def test_the_prompt_has_every_rule_that_a_plan_can_break() -> None:
    assert RULES.keys() == violations(RIGHT, WORLD.query.trip, WORLD.tables).keys()
    for sentences in RULES.values():
        for sentence in sentences:
            assert sentence in INSTRUCTIONS
