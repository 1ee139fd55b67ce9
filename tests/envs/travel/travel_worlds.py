"""Worlds that tests ask for, and the choices that are right in them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from tutelage.envs.travel.choices import choose
from tutelage.envs.travel.generate import World, draw_world
from tutelage.envs.travel.plan import Plan
from tutelage.envs.travel.planner import Choices, compose


def world_with(identity: str, level: int, kinds: Sequence[str], is_held_out: bool = False) -> World:
    """The first world of an identity with constraints of these kinds."""
    for attempt in itertools.count():
        rng = random.Random(f"travel{level}/{identity}/{attempt}")
        world = draw_world(level, is_held_out, kinds, rng)
        if world is not None:
            return world
    raise AssertionError


def choices_of(world: World) -> Choices:
    query = world.query
    found = choose(world.tables, query.trip, ((c.kind, c.parameters) for c in query.constraints))
    assert found is not None
    return found


def right_plan(world: World) -> Plan:
    plan = compose(world.tables, world.query.trip, choices_of(world))
    assert plan is not None
    return plan
