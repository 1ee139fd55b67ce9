"""What a traveler asks for: the frame of a trip and the constraints on it."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Any

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True)
class Stay:
    """Nights in one city."""

    city: str
    nights: int


@dataclass(frozen=True)
class Trip:
    """From where to where, when, and with how many people."""

    origin: str
    stays: tuple[Stay, ...]
    """The cities in their order; the trip ends where it began."""
    departs: str
    """The first day, YYYY-MM-DD."""
    people: int
    rooms: int

    @property
    def num_days(self) -> int:
        """Days, the first and the last included."""
        return sum(stay.nights for stay in self.stays) + 1

    def date(self, day: int) -> str:
        """The date of a day, counted from 0."""
        first = datetime.date.fromisoformat(self.departs)
        return (first + datetime.timedelta(days=day)).isoformat()

    def weekday(self, day: int) -> str:
        """The weekday of a day, counted from 0."""
        return WEEKDAYS[datetime.date.fromisoformat(self.date(day)).weekday()]

    @property
    def legs(self) -> dict[int, tuple[str, str]]:
        """From which city to which the travelers go, by the day (from 0) on which they do."""
        cities = (self.origin, *(stay.city for stay in self.stays), self.origin)
        days = [0]
        for stay in self.stays:
            days.append(days[-1] + stay.nights)
        return {day: (cities[n], cities[n + 1]) for n, day in enumerate(days)}

    def night_city(self, day: int) -> str:
        """Where the night after a day is spent; the origin after the last one."""
        for stay in self.stays:
            if day < stay.nights:
                return stay.city
            day -= stay.nights
        return self.origin


@dataclass(frozen=True)
class Constraint:
    """One hard constraint; what the public queries of DeepPlanning have in `hard_constraints`."""

    kind: str
    """As there, such as "train_cheapest_direct"."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """What the query says: a star, a brand, a city, an attraction."""
    answer: dict[str, Any] = field(default_factory=dict)
    """The only choice in the tables that meets it, in the benchmark's fields, such as
    `outbound_train_no`; empty where the kind has a bound instead."""


@dataclass(frozen=True)
class Query:
    """A trip, its constraints, and the text that asks for it."""

    trip: Trip
    constraints: tuple[Constraint, ...]
    text: str
