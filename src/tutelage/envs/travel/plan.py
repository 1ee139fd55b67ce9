"""The plan that an agent answers with: JSON, as the last object of its final text.

The original benchmark takes a plan in Markdown and lets a second model turn it into JSON; here the
agent gives the JSON itself, in a form of our own (`SCHEMA`). Keys beside those are ignored.
"""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tutelage.envs.travel.query import Trip
from tutelage.envs.travel.rows import minutes

SCHEMA = """{"days": [{"date": "YYYY-MM-DD", "city": "B" or "from A to B", \
"hotel": {"name": "...", "price": 0} or null, "activities": [
  {"type": "intercity", "start": "HH:MM", "end": "HH:MM", "mode": "train" or "flight", \
"number": "...", "origin": "station", "destination": "station", "cost": 0},
  {"type": "travel", "start": "HH:MM", "end": "HH:MM", "origin": "place", \
"destination": "place", "cost": 0},
  {"type": "attraction", "start": "HH:MM", "end": "HH:MM", "name": "...", "cost": 0},
  {"type": "meal", "start": "HH:MM", "end": "HH:MM", "meal": "lunch" or "dinner", "name": "...", \
"cost": 0},
  {"type": "hotel", "start": "HH:MM", "end": "HH:MM", "name": "..."}]}], "total_cost": 0}"""
"""The form of a plan, as the prompt shows it."""

A = TypeVar("A", bound="_Timed")
_OPENED = re.compile(r"""\{\s*["}]""")
Clock = Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$|^24:00$")]
"""A time of day, ``HH:MM``."""
Cost = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class _Timed(_Part):
    start: Clock
    end: Clock

    @property
    def begins(self) -> int:
        """Minutes since midnight."""
        return minutes(self.start)

    @property
    def ends(self) -> int:
        """Minutes since midnight."""
        return minutes(self.end)


class Intercity(_Timed):
    """A train or flight, one segment of a route."""

    type: Literal["intercity"] = "intercity"
    mode: Literal["train", "flight"]
    number: str
    origin: str
    destination: str
    cost: Cost
    """For a person, of the whole route on its first segment."""


class Travel(_Timed):
    """The way from one place of a city to another."""

    type: Literal["travel"] = "travel"
    origin: str
    destination: str
    cost: Cost
    """Of one vehicle, which takes four people."""


class Visit(_Timed):
    """A visit to an attraction."""

    type: Literal["attraction"] = "attraction"
    name: str
    cost: Cost
    """For a person."""


class Meal(_Timed):
    """A lunch or dinner."""

    type: Literal["meal"] = "meal"
    meal: Literal["lunch", "dinner"]
    name: str
    cost: Cost
    """For a person."""


class AtHotel(_Timed):
    """Time at a hotel."""

    type: Literal["hotel"] = "hotel"
    name: str


Activity = Annotated[Intercity | Travel | Visit | Meal | AtHotel, Field(discriminator="type")]


class Room(_Part):
    """Where a night is spent."""

    name: str
    price: Cost
    """Of a room."""


class Day(_Part):
    """One day of a plan."""

    date: str
    city: str
    hotel: Room | None = None
    activities: tuple[Activity, ...] = Field(strict=False)

    def of(self, kind: type[A]) -> list[A]:
        """The activities of a type, in their order."""
        return [activity for activity in self.activities if isinstance(activity, kind)]


class Plan(_Part):
    """The plan of a trip."""

    days: tuple[Day, ...] = Field(strict=False)
    total_cost: Cost

    def of(self, kind: type[A]) -> list[A]:
        """The activities of a type on all days."""
        return [activity for day in self.days for activity in day.of(kind)]

    @property
    def json_text(self) -> str:
        """The plan as an agent writes it."""
        return self.model_dump_json()


def cost_of(plan: Plan, trip: Trip) -> float:
    """What a plan costs in all, from its own prices."""
    paid: tuple[Intercity | Visit | Meal, ...]
    paid = (*plan.of(Intercity), *plan.of(Visit), *plan.of(Meal))
    per_person = sum(activity.cost for activity in paid)
    vehicles = math.ceil(trip.people / 4)
    rooms = sum(day.hotel.price for day in plan.days if day.hotel)
    travel = sum(activity.cost for activity in plan.of(Travel))
    return per_person * trip.people + travel * vehicles + rooms * trip.rooms


def parse_plan(text: str) -> Plan | str:
    """The plan in a final text, or in one line why there is none."""
    found = last_object(text)
    if found is None:
        return "the final text has no JSON object"
    try:
        return Plan.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'plan'}: {first['msg']}"[:300]


def last_object(text: str) -> dict[str, Any] | None:
    """The last JSON object of a text that is part of no other; None without one."""
    decoder = json.JSONDecoder(parse_constant=_refuse)
    found: dict[str, Any] | None = None
    match = _OPENED.search(text)
    while match is not None:
        start = match.start()
        try:
            # A slice: an error counts the lines before it, and there may be many errors.
            found, length = decoder.raw_decode(text[start:])
            end = start + length
        except json.JSONDecodeError as error:
            end = start + max(1, error.pos)
        except ValueError:
            end = start + 1
        except RecursionError:
            break
        match = _OPENED.search(text, end)
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
