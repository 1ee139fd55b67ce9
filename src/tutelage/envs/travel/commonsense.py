"""Eight rules of common sense for a plan, each all or nothing.

They follow the idea of the benchmark's eight dimensions and have their names, but what each of them
demands is ours:

==========================  ========================================================================
route_consistency           as many days as the trip has, with their dates; every leg on its day,
                            from its city to its city; `city` says where the day is spent
sandbox_compliance          every train, flight, hotel, attraction and restaurant is in the tables,
                            with its stations, times and price, and is in the city of the day;
                            a route is taken whole; travel is within a city and costs what the
                            road costs
itinerary_structure         every night but the last has a hotel and ends the day there; lunch and
                            dinner where the travelers are in a destination all through the time
                            for it; attractions on days with time for them
time_feasibility            activities in their order, none overlapping; a change of place needs a
                            travel as long as the road takes at least; time to board and to get out
business_hours              attractions and restaurants are open all through the visit
duration_rationality        visits as long as the tables recommend; meals of 45 to 120 minutes
cost_calculation_accuracy   the total is the sum of the plan's prices
activity_diversity          no restaurant and no attraction twice
==========================  ========================================================================

All eight are violated by a plan in which a day of the trip is missing or has no activities.
"""

from __future__ import annotations

from collections.abc import Iterator

from tutelage.envs.travel.plan import (
    Activity,
    AtHotel,
    Day,
    Intercity,
    Meal,
    Plan,
    Travel,
    Visit,
    cost_of,
)
from tutelage.envs.travel.query import Trip
from tutelage.envs.travel.rows import Attraction, Mode, Restaurant, Route, minutes
from tutelage.envs.travel.tables import Tables

BOARDING: dict[Mode, int] = {"train": 20, "flight": 60}
"""Minutes that the travelers have to be there before a departure (not on the way from home)."""
LEAVING: dict[Mode, int] = {"train": 10, "flight": 30}
"""Minutes from an arrival to the next travel; not needed where they change or are home."""
LUNCH, DINNER = (11 * 60, 14 * 60), (17 * 60, 20 * 60)
"""When a meal begins; and a meal is due where they are in a destination all that time."""
SIGHTS = (9 * 60, 17 * 60)
"""The time for attractions; one is due on a day with five hours of it in a destination."""
ENOUGH_SIGHTS = 300
LONG_VISITS = 240
"""Two attractions are due on a day without a train or flight, or visits of so many minutes."""
MEAL_MINUTES = (45, 120)


DIMENSIONS = (
    "route_consistency",
    "sandbox_compliance",
    "itinerary_structure",
    "time_feasibility",
    "business_hours",
    "duration_rationality",
    "cost_calculation_accuracy",
    "activity_diversity",
)
"""The eight dimensions, in the order in which they are checked."""


def violations(plan: Plan, trip: Trip, tables: Tables) -> dict[str, str]:
    """For every dimension the first thing that violates it; "" where it holds."""
    missing = _missing_day(plan, trip)
    found = (
        _route(plan, trip, tables),
        _sandbox(plan, trip, tables),
        _structure(plan, trip),
        _times(plan, tables),
        _hours(plan, trip, tables),
        _durations(plan, tables),
        _cost(plan, trip),
        _diversity(plan),
    )
    pairs = zip(DIMENSIONS, found, strict=True)
    return {name: missing or next(reasons, "") for name, reasons in pairs}


def _missing_day(plan: Plan, trip: Trip) -> str:
    """The first day of the trip for which nothing is planned; "" where there is none."""
    if len(plan.days) < trip.num_days:
        return f"{len(plan.days)} days, and the trip has {trip.num_days}"
    empty = (n for n, day in enumerate(plan.days[: trip.num_days]) if not day.activities)
    return next((f"day {number + 1} has no activities" for number in empty), "")


def windows(day: Day) -> list[tuple[int, int]]:
    """When the travelers are in a destination, in minutes since midnight."""
    legs = day.of(Intercity)
    if not legs:
        return [(0, 1440)]
    before, after = (0, legs[0].begins), (legs[-1].ends, 1440)
    return [before, after]


def away_windows(day: Day, number: int, trip: Trip) -> list[tuple[int, int]]:
    """The same without the time at home, before the first leg and after the last one."""
    found = windows(day)
    if len(found) == 1:
        return found
    first = [] if number == 0 else found[:1]
    last = [] if number == trip.num_days - 1 else found[1:]
    return first + last


def is_due(time: tuple[int, int], open_windows: list[tuple[int, int]]) -> bool:
    """Whether the travelers are in a destination all through a time."""
    return any(start <= time[0] and time[1] <= end for start, end in open_windows)


def num_sights_due(open_windows: list[tuple[int, int]], has_legs: bool) -> int:
    """How many attractions a day needs."""
    if not has_legs:
        return 2
    longest = max(
        (min(end, SIGHTS[1]) - max(start, SIGHTS[0]) for start, end in open_windows), default=0
    )
    return 1 if longest >= ENOUGH_SIGHTS else 0


def _route(plan: Plan, trip: Trip, tables: Tables) -> Iterator[str]:
    if len(plan.days) != trip.num_days:
        yield f"{len(plan.days)} days, and the trip has {trip.num_days}"
    for number, day in enumerate(plan.days[: trip.num_days]):
        if day.date != trip.date(number):
            yield f"day {number + 1} has the date {day.date}, not {trip.date(number)}"
        leg = trip.legs.get(number)
        city = f"from {leg[0]} to {leg[1]}" if leg else trip.night_city(number)
        if day.city != city:
            yield f"the city of day {number + 1} is {day.city!r}, not {city!r}"
        taken = day.of(Intercity)
        if taken and not leg:
            yield f"day {number + 1} has a train or flight that the trip has not"
        if leg and (not taken or not _connects(taken, leg, day.date, tables)):
            yield f"no train or flight from {leg[0]} to {leg[1]} on day {number + 1}"


def _connects(taken: list[Intercity], leg: tuple[str, str], date: str, tables: Tables) -> bool:
    """Whether some route between these cities has these stations at its ends."""
    ends = taken[0].origin, taken[-1].destination
    return any(
        (route[0].dep_station_name, route[-1].arr_station_name) == ends
        for route in tables.routes(taken[0].mode, *leg, date)
    )


def _sandbox(plan: Plan, trip: Trip, tables: Tables) -> Iterator[str]:
    for number, day in enumerate(plan.days):
        leg = trip.legs.get(number)
        cities = {*(leg or ()), trip.night_city(number)} - {trip.origin}
        if day.of(Intercity) and not _is_route(day, leg or ("", ""), tables):
            yield f"the trains or flights of day {number + 1} are no route of the tables"
        for activity in day.activities:
            if not _is_known(activity, cities, tables):
                yield f"day {number + 1}: {_label(activity)} is not in the tables like this"
        if day.hotel:
            hotel = tables.hotel_by_name.get(day.hotel.name)
            city = trip.night_city(number)
            if hotel is None or (hotel.price, hotel.city) != (day.hotel.price, city):
                yield f"day {number + 1}: the hotel {day.hotel.name} is not in the tables like this"


def _is_route(day: Day, leg: tuple[str, str], tables: Tables) -> bool:
    taken = day.of(Intercity)
    routes = tables.routes(taken[0].mode, *leg, day.date)
    return any(_is_same(route, taken) for route in routes)


def _is_same(route: Route, taken: list[Intercity]) -> bool:
    """Whether the activities are the segments of a route, one by one."""
    facts = [
        (leg.mode, leg.number, leg.dep_station_name, leg.arr_station_name, leg.departs, leg.price)
        for leg in route
    ]
    given = [(t.mode, t.number, t.origin, t.destination, t.begins, t.cost) for t in taken]
    return facts == given and all(
        leg.arrives == t.ends for leg, t in zip(route, taken, strict=True)
    )


def _is_known(activity: Activity, cities: set[str], tables: Tables) -> bool:
    """Whether name, city and price of an activity are those of the tables."""
    match activity:
        case Visit():
            sight = tables.attraction_by_name.get(activity.name)
            return sight is not None and (
                sight.city in cities and sight.ticket_price == activity.cost
            )
        case Meal():
            place = tables.restaurant_by_name.get(activity.name)
            return place is not None and (
                place.city in cities and place.price_per_person == activity.cost
            )
        case AtHotel():
            return activity.name in tables.hotel_by_name
        case Travel():
            ends = (activity.origin, activity.destination)
            within = {tables.city_of.get(end) for end in ends}
            return (
                len(within) == 1
                and None not in within
                and (tables.road(*ends).cost == activity.cost)
            )
        case _:
            return True


def _structure(plan: Plan, trip: Trip) -> Iterator[str]:
    for number, day in enumerate(plan.days):
        is_last = number == trip.num_days - 1
        if not is_last:
            end = day.activities[-1] if day.activities else None
            if day.hotel is None:
                yield f"day {number + 1} has no hotel"
            elif not (isinstance(end, AtHotel) and end.name == day.hotel.name):
                yield f"day {number + 1} does not end at its hotel"
        elif day.hotel is not None:
            yield "the last day has a hotel"
        time = away_windows(day, number, trip)
        for meal, due in (("lunch", LUNCH), ("dinner", DINNER)):
            taken = [m for m in day.of(Meal) if m.meal == meal]
            if any(not due[0] <= m.begins <= due[1] for m in taken) or len(taken) > 1:
                yield f"{meal} of day {number + 1} is at the wrong time or there twice"
            if is_due(due, time) and not taken:
                yield f"day {number + 1} has no {meal}"
        visits = day.of(Visit)
        due_sights = num_sights_due(time, bool(day.of(Intercity)))
        is_long = sum(visit.ends - visit.begins for visit in visits) >= LONG_VISITS
        if len(visits) < due_sights and not (due_sights == 2 and is_long):
            yield f"day {number + 1} has {len(visits)} attractions, and there is time for more"


def _times(plan: Plan, tables: Tables) -> Iterator[str]:
    place = ""
    for number, day in enumerate(plan.days):
        free = 0
        previous: Activity | None = None
        for activity in day.activities:
            where = f"day {number + 1}: {_label(activity)}"
            if activity.begins < free or activity.ends <= activity.begins:
                yield f"{where} overlaps with what was before, or ends before it begins"
            start, end = _ends(activity)
            if place and start != place:
                yield f"{where} is at {start}, and the travelers are at {place}"
            if isinstance(activity, Travel) and not _is_long_enough(activity, tables):
                yield f"{where} takes longer by road"
            if isinstance(activity, Intercity) != isinstance(previous, Intercity):
                margin = _margin(activity, previous)
                if previous is not None and activity.begins - previous.ends < margin:
                    yield f"{where} needs {margin} minutes to board or to get out before it"
            free, place, previous = activity.ends, end, activity


def _ends(activity: Activity) -> tuple[str, str]:
    """Where the travelers are before and after an activity."""
    if isinstance(activity, Intercity | Travel):
        return activity.origin, activity.destination
    return activity.name, activity.name


def _is_long_enough(travel: Travel, tables: Tables) -> bool:
    if travel.origin not in tables.places or travel.destination not in tables.places:
        return False
    road = tables.road(travel.origin, travel.destination)
    return travel.ends - travel.begins >= road.duration_minutes


def _margin(activity: Activity, previous: Activity | None) -> int:
    if isinstance(activity, Intercity):
        return BOARDING[activity.mode]
    return LEAVING[previous.mode] if isinstance(previous, Intercity) else 0


def _hours(plan: Plan, trip: Trip, tables: Tables) -> Iterator[str]:
    for number, day in enumerate(plan.days):
        stops: tuple[Visit | Meal, ...] = (*day.of(Visit), *day.of(Meal))
        for activity in stops:
            place = (
                tables.attraction_by_name.get(activity.name)
                if isinstance(activity, Visit)
                else tables.restaurant_by_name.get(activity.name)
            )
            if place is None:
                continue
            opens, closes = open_minutes(place)
            if activity.begins < opens or activity.ends > closes:
                hours = f"{place.opening_time} to {place.closing_time}"
                yield f"{activity.name} is open from {hours}, not all of the visit"
            closed = place.closing_dates if isinstance(place, Attraction) else ()
            if trip.weekday(number) in closed:
                yield f"{activity.name} is closed on {trip.weekday(number)}"


def open_minutes(place: Attraction | Restaurant) -> tuple[int, int]:
    """From when to when a place is open, past 1440 where that is after midnight."""
    opens, closes = minutes(place.opening_time), minutes(place.closing_time)
    return opens, closes if closes > opens else closes + 1440


def _durations(plan: Plan, tables: Tables) -> Iterator[str]:
    for visit in plan.of(Visit):
        sight = tables.attraction_by_name.get(visit.name)
        hours = (visit.ends - visit.begins) / 60
        if sight and not sight.min_visit_hours <= hours <= sight.max_visit_hours:
            yield f"{hours:g} hours at {visit.name} are not what is recommended"
    for meal in plan.of(Meal):
        if not MEAL_MINUTES[0] <= meal.ends - meal.begins <= MEAL_MINUTES[1]:
            yield f"{meal.ends - meal.begins} minutes for a meal at {meal.name}"


def _cost(plan: Plan, trip: Trip) -> Iterator[str]:
    cost = cost_of(plan, trip)
    if abs(plan.total_cost - cost) > 0.01:
        yield f"the total is {plan.total_cost:g}, and the prices of the plan add up to {cost:g}"


def _diversity(plan: Plan) -> Iterator[str]:
    seen = set()
    stops: tuple[Visit | Meal, ...] = (*plan.of(Visit), *plan.of(Meal))
    for activity in stops:
        if activity.name in seen:
            yield f"{activity.name} twice"
        seen.add(activity.name)


def _label(activity: Activity) -> str:
    match activity:
        case Intercity():
            return f"{activity.mode} {activity.number}"
        case Travel():
            return f"travel from {activity.origin} to {activity.destination}"
        case _:
            return f"{activity.type} {activity.name}"
