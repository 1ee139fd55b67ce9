"""The text of a query, in plain English."""

from __future__ import annotations

import datetime
import random
from collections.abc import Sequence
from typing import Any

from tutelage.data.tasks.draws import pick
from tutelage.envs.travel.query import WEEKDAYS, Constraint, Trip

_PEOPLE = ("one", "two", "three", "four", "five")
_ONE = {"We": "I", "we": "I", "us": "me", "Our": "My", "seats_for_us": "a seat left for me"}
_SEVERAL = {name: name for name in _ONE} | {"seats_for_us": "seats left for all of us"}
"""What stands for these fields of a text where one travels, and where several do."""
_SENTENCES: dict[str, tuple[str, ...]] = {
    "train_cheapest_direct": (
        "For the {way} journey {we} want to take a train: the cheapest direct one.",
        "Please book the cheapest direct train for the {way} journey.",
    ),
    "train_cheapest_train_type": (
        'For the {way} journey please choose the cheapest direct train of the type "{train_type}".',
    ),
    "train_departure_time_range": (
        "{We} would like to leave on a direct train that departs between {from} and {to}.",
    ),
    "train_earliest_departure_direct": (
        "For the {way} journey please take the direct train that departs earliest, so that {we} "
        "have more time there.",
    ),
    "train_latest_arrival_direct": (
        "{We} would like to be back late: for the return journey please take the direct train that "
        "arrives last.",
    ),
    "train_shortest_duration_direct": (
        "For the {way} journey {we} want the direct train with the shortest travel time.",
    ),
    "train_seat_class": (
        "{We} travel by direct train, and there and back it has to be a {seat_class}.",
    ),
    "train_seat_status": (
        "{We} go there and back by direct train; on each train there must be {seats_for_us}.",
    ),
    "flight_cheapest_direct": (
        "For the {way} journey {we} want to fly, on the cheapest direct flight.",
    ),
    "flight_cheapest_airline_direct": (
        "For the {way} journey please choose the cheapest direct flight of {airline}.",
    ),
    "flight_cheapest_manufacturer_direct": (
        "For the {way} journey {we} want to fly on an aircraft made by {manufacturer}; please take "
        "the cheapest direct flight on one.",
    ),
    "flight_departure_time_range": (
        "The {way} flight has to be direct and to depart between {from} and {to}.",
    ),
    "flight_arrival_time_range": (
        "{We} fly back: that flight has to be direct and to arrive between {from} and {to}.",
    ),
    "flight_earliest_departure_direct": (
        "For the {way} journey please take the direct flight that departs earliest.",
    ),
    "flight_earliest_airline_direct": (
        "For the {way} journey please take the direct flight of {airline} that departs earliest.",
    ),
    "flight_shortest_duration_direct": (
        "For the {way} journey {we} want the direct flight with the shortest flight time.",
    ),
    "flight_seat_class": (
        "{We} fly there and back on direct flights, and both have to be {seat_class}.",
    ),
    "flight_seat_status": (
        "{We} fly there and back on direct flights; on each there must be {seats_for_us}.",
    ),
    "hotel_cheapest_brand": (
        'For accommodation in {city} please choose the cheapest hotel of the brand "{brand}".',
    ),
    "hotel_cheapest_star": ("In {city} {we} want the cheapest {hotel_star}-star hotel.",),
    "hotel_highest_rated": ("Please let {us} stay at the hotel with the best score in {city}.",),
    "hotel_star_highest_rated": (
        "In {city} please choose the {hotel_star}-star hotel with the best score.",
    ),
    "hotel_brand_highest_rated": (
        '{We} like "{brand}": please choose the one with the best score in {city}.',
    ),
    "hotel_newest_decoration": (
        "In {city} {we} want a hotel that was renovated in {year_threshold} or later.",
    ),
    "hotel_price_range": (
        "The hotel in {city} should cost between {min_price} and {max_price} yuan a night.",
    ),
    "hotel_star_service_required": (
        'In {city} {we} want a {hotel_star}-star hotel with the service "{required_service}".',
        'Please find a {hotel_star}-star hotel in {city}; it must have "{required_service}".',
    ),
    "restaurant_cheapest_nearby_attraction": (
        "{We} want one meal at the cheapest restaurant near '{attraction_name}'.",
    ),
    "restaurant_closest_to_attraction": (
        "One meal should be at the restaurant closest to '{attraction_name}'.",
    ),
    "restaurant_highest_rated": (
        "Please include a meal at the highest-rated restaurant near '{attraction_name}'.",
    ),
    "restaurant_must_eat_named": (
        "A friend told {us} about '{restaurant_name}'; {we} must have a meal there.",
    ),
    "restaurant_specific_cuisine_nearby": (
        "Near '{attraction_name}' {we} want a meal at a restaurant with the cuisine \"{cuisine}\".",
    ),
    "restaurant_specific_tag_nearby": (
        "Near '{attraction_name}' please arrange a meal at a restaurant with \"{required_tag}\".",
    ),
    "attraction_must_visit_named": (
        "In {city} {we} have to see '{attraction_names[0]}' and '{attraction_names[1]}'.",
    ),
    "attraction_all_of_type": (
        'Please include every attraction of the type "{attraction_type}" that is recommended in '
        "{city}.",
    ),
    "attraction_all_free_attractions": (
        "Please include every recommended attraction of {city} that is free.",
    ),
    "attraction_type_highest_rated": (
        'In {city} {we} want to see the highest-rated attraction of the type "{attraction_type}".',
    ),
    "attraction_top_rated_must_visit": (
        "The three highest-rated attractions of {city} must be in the plan.",
    ),
    "budget_constraint": (
        "All in all the trip may cost {max_budget} yuan at most.",
        "{Our} budget for everything is {max_budget} yuan.",
    ),
}
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_OPENINGS = (
    "I'm planning a {days}-day trip from {origin} to {cities}, from {first} to {last}.",
    "Please plan a trip from {origin} to {cities} for {us}: {days} days, from {first} to {last}.",
)
_CLOSINGS = (
    "That is everything you need to know. Please plan the whole trip without asking back.",
    "These are all of my wishes. The rest is up to you; please go ahead and plan it.",
)


def write_query(trip: Trip, constraints: Sequence[Constraint], rng: random.Random) -> str:
    """The request for a trip with these constraints."""
    voice = _ONE if trip.people == 1 else _SEVERAL
    last = trip.num_days - 1
    cities = " and ".join(stay.city for stay in trip.stays)
    opening = pick(_OPENINGS, rng).format(
        days=trip.num_days,
        origin=trip.origin,
        cities=cities,
        first=_day(trip.date(0)),
        last=_day(trip.date(last)),
        **voice,
    )
    party = "I travel alone, and need"
    if trip.people > 1:
        party = f"There are {_PEOPLE[trip.people - 1]} of us, and we need"
    rooms = f"{_PEOPLE[trip.rooms - 1]} room{'s' * (trip.rooms > 1)}."
    sentences = [_sentence(pick(_SENTENCES[c.kind], rng), c.parameters, voice) for c in constraints]
    return "\n\n".join(
        [
            f"{opening} {party} {rooms}{_stays(trip, voice['We'])}",
            " ".join(sentences),
            pick(_CLOSINGS, rng),
        ]
    )


def _stays(trip: Trip, we: str) -> str:
    """When the travelers go from one city to the next."""
    text, day = "", 0
    for before, after in zip(trip.stays, trip.stays[1:], strict=False):
        day += before.nights
        date = _day(trip.date(day))
        text += f" {we} stay in {before.city} first, and go on to {after.city} on {date}."
    return text


def _day(date: str) -> str:
    day = datetime.date.fromisoformat(date)
    return f"{WEEKDAYS[day.weekday()]}, {_MONTHS[day.month - 1]} {day.day}, {day.year}"


def _sentence(template: str, asked: dict[str, Any], voice: dict[str, str]) -> str:
    ways = asked.get("directions", ())
    return template.format(**asked, **voice, way="return" if ways == ["inbound"] else "outbound")
