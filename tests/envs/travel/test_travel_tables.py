"""Roads, distances and routes of tables."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tutelage.envs.travel.generate import make_world
from tutelage.envs.travel.rows import Road, coordinates, meters_between, road_between

WORLD = make_world("tables", 1, False)


def test_a_table_of_roads_goes_before_the_formula() -> None:
    (first, a), (second, b) = list(WORLD.tables.places.items())[:2]
    road = Road(coordinates(a), coordinates(b), 7, 3, 2)
    tables = replace(WORLD.tables, roads=(road,))
    assert tables.road(first, second) == road
    assert tables.road(second, first) == road_between(b, a)


def test_distances_are_those_of_the_globe() -> None:
    """A degree of a meridian; and one of the parallel at 60 degrees, which is half as long."""
    assert meters_between((10.0, 20.0), (11.0, 20.0)) == pytest.approx(111_195)
    assert meters_between((60.0, 20.0), (60.0, 21.0)) == pytest.approx(111_195 / 2)


def test_transfers_are_grouped_by_their_route() -> None:
    trip = WORLD.query.trip
    routes = WORLD.tables.routes("train", *trip.legs[0], trip.date(0))
    assert [len(route) for route in routes][-1] == 2
    assert [leg.segment_index for leg in routes[-1]] == [1, 2]
    assert WORLD.tables.routes("train", "A", "B", trip.date(0)) == []
