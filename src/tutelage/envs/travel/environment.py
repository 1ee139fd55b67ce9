"""A conversation about one trip, and its score."""

from __future__ import annotations

from collections.abc import Callable

from tutelage.data.types import Message, Outcome, Prompt, Turn
from tutelage.envs.environment import Opening, Reply
from tutelage.envs.tools import Tool, reply_to
from tutelage.envs.travel.commonsense import DIMENSIONS, violations
from tutelage.envs.travel.constraints import KINDS, is_met
from tutelage.envs.travel.generate import World
from tutelage.envs.travel.plan import SCHEMA, parse_plan
from tutelage.envs.travel.query import Query
from tutelage.envs.travel.tables import Tables
from tutelage.envs.travel.tools import make_tools

INSTRUCTIONS = f"""You plan trips with tools. Everything in a plan has to come from the tools, \
with names, numbers, times and prices exactly as they return them. Do not ask the user anything.

When you know enough, answer without a tool call. The last thing in that answer is the plan, one \
JSON object of this form:
{SCHEMA}

Rules:
- One entry in "days" for every day of the trip, with its date and its activities; a plan in which \
a day is missing or has no activities follows no rule at all. "city" is where the day is spent; on \
a day with a train or flight "from A to B".
- Trains and flights are on the first day, on the last one and on the day of a change of city, on \
each of them one route, and on no other day.
- Times of a day are from 00:00 to 24:00, and every activity ends after it begins. Activities are \
in order and do not overlap. An activity begins at the place where the one before it ended, also \
the first of a day. Every change of place within a city is a "travel" between the two places by \
name, at least as long as the road takes; no "travel" leads to another city.
- Be at a station 20 minutes before a train departs and at an airport 60 minutes before a flight \
does; allow 10 minutes after a train arrives and 30 after a flight does. Only the first departure \
needs nothing before it.
- A route is taken whole. One with transfers is one "intercity" for every segment; its price \
stands at the first, 0 at the others.
- Lunch begins from 11:00 to 14:00 and dinner from 17:00 to 20:00; each is needed where you are in \
a destination all through that time, and there is at most one lunch and one dinner a day. A meal \
takes 45 to 120 minutes.
- A day without a train or flight needs two attractions or four hours of visits; another day needs \
one if you are in a destination for five hours on end between 09:00 and 17:00.
- Attractions and restaurants are in a destination where you are on that day, never in the city \
where the trip begins.
- Visits and meals are within the opening hours; visits are not on closed weekdays, and as long as \
recommended. No attraction and no restaurant comes twice in the trip.
- Every day but the last has in "hotel" a hotel of the city of that night and ends with an \
activity "hotel" there; the last one has null.
- "cost" is for one person, of travel for one vehicle (four people in each); "price" is for one \
room and night. "total_cost" is the sum for all people, vehicles and rooms."""
"""The system message of every prompt."""


def messages_of(query: Query) -> tuple[Message, ...]:
    """The prompt of a query."""
    return (
        {"role": "system", "content": INSTRUCTIONS},
        {"role": "user", "content": query.text},
    )


class TravelEnvironment:
    """One conversation over the tables of one country.

    The score of a conversation is the share of hard constraints that its plan meets times the
    share of the eight commonsense dimensions that it follows; 0 without a plan, and for one in
    which a day is missing or has no activities. It is a success where both shares are 1.
    """

    def __init__(self, find_world: Callable[[Prompt], World]) -> None:
        self._find_world = find_world
        self._world: World | None = None
        self._tools: tuple[Tool, ...] = ()
        self._answer: str | None = None

    def start(self, prompt: Prompt, seed: int) -> Opening:
        """The prompt's query; nothing in a country depends on `seed`."""
        self._world = self._find_world(prompt)
        self._tools = make_tools(self._world.tables)
        self._answer = None
        tools = tuple(tool.schema for tool in self._tools)
        return Opening(messages_of(self._world.query), tools)

    def act(self, turn: Turn) -> Reply:
        """Answers the calls of a turn; one without calls is the final answer."""
        if not turn.calls:
            self._answer = turn.text
        return reply_to(self._tools, turn)

    def score(self) -> Outcome:
        """The score of the plan in the final answer."""
        if self._world is None or self._answer is None:
            return _failed("the conversation ended without a final answer")
        return score_text(self._answer, self._world.query, self._world.tables)


def score_text(text: str, query: Query, tables: Tables) -> Outcome:
    """The score of a final answer.

    A budget is kept only by a plan that goes where the trip goes: one without `route_consistency`
    does not meet it, however little it costs.

    Details: `hard_share` and `commonsense_share` in [0, 1]; `composite`, the mean of the latter
    with whether all hard constraints hold, as the benchmark has it; for every constraint and
    dimension 1 or 0; `reason`, the first thing that is wrong, "" for a success.
    """
    plan = parse_plan(text)
    if isinstance(plan, str):
        return _failed(plan)
    wrong = violations(plan, query.trip, tables)
    is_on_route = not wrong["route_consistency"]
    hard = {
        c.kind: is_met(c, plan, query.trip) and (is_on_route or KINDS[c.kind].family != "budget")
        for c in query.constraints
    }
    hard_share = sum(hard.values()) / len(hard) if hard else 1.0
    sense_share = sum(not reason for reason in wrong.values()) / len(wrong)
    is_success = all(hard.values()) and not any(wrong.values())
    unmet = ", ".join(kind for kind, is_true in hard.items() if not is_true)
    details: dict[str, float | int | str] = {
        "hard_share": hard_share,
        "commonsense_share": sense_share,
        "composite": (sense_share + all(hard.values())) / 2,
        **{f"commonsense/{name}": float(not reason) for name, reason in wrong.items()},
        "unmet": unmet,
        "reason": next(filter(None, wrong.values()), "") or unmet,
    }
    return Outcome(hard_share * sense_share, is_success, details)


def _failed(reason: str) -> Outcome:
    shares = ("hard_share", "commonsense_share", "composite")
    zeros = dict.fromkeys((*shares, *(f"commonsense/{name}" for name in DIMENSIONS)), 0.0)
    return Outcome(0.0, False, {**zeros, "unmet": "all", "reason": reason})
