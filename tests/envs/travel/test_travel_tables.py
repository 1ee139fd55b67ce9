"""Tables of a folder: read as they are documented, and refused in one line otherwise."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tutelage.data.types import Prompt, Turn
from tutelage.envs.travel.agent import scripted_agent
from tutelage.envs.travel.environment import TravelEnvironment
from tutelage.envs.travel.generate import World, make_world
from tutelage.envs.travel.rows import Road, coordinates, meters_between, road_between
from tutelage.envs.travel.tables import Tables, read_tables
from tutelage.errors import DataError

WORLD = make_world("tables", 1, False)
NAMES = ("trains", "flights", "hotels", "attractions", "restaurants", "locations", "roads")


def cell(value: Any) -> Any:
    """A value as a CSV file has it."""
    if isinstance(value, tuple):
        return ";".join(value)
    return "" if value is None else value


def write(tables: Tables, folder: Path, end: str) -> Path:
    """The tables as files of a folder."""
    folder.mkdir(exist_ok=True)
    for name in NAMES:
        rows = [asdict(row) for row in getattr(tables, name)]
        if not rows:
            continue
        with (folder / f"{name}.{end}").open("w", encoding="utf-8", newline="") as file:
            if end == "jsonl":
                file.writelines(f"{json.dumps(row)}\n" for row in rows)
                continue
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({key: cell(value) for key, value in row.items()} for row in rows)
    return folder


@pytest.mark.parametrize("end", ["csv", "jsonl"])
def test_tables_are_read_as_they_were_written(tmp_path: Path, end: str) -> None:
    ways = [tuple(WORLD.tables.places.values())[:2], tuple(WORLD.tables.places.values())[2:4]]
    tables = replace(WORLD.tables, roads=tuple(road_between(*way) for way in ways))
    assert read_tables(write(tables, tmp_path, end)) == tables


def test_a_trip_over_read_tables_is_solved(tmp_path: Path) -> None:
    world = World(read_tables(write(WORLD.tables, tmp_path, "csv")), WORLD.query)
    environment = TravelEnvironment(lambda prompt: world)
    environment.start(Prompt("mine", ""), 0)
    asked = [(c.kind, c.parameters) for c in world.query.constraints]
    agent = scripted_agent(world.query.trip, asked)
    step = next(agent)
    while isinstance(step, list):
        messages = environment.act(Turn("", tuple(step))).messages
        step = agent.send([message["content"] for message in messages])
    environment.act(Turn(step))
    assert environment.score().is_success


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


# --- refusals -------------------------------------------------------------------------------------


def edit(name: str, change: Callable[[list[dict[str, Any]]], None]) -> Callable[[Path], None]:
    """A change of the records of a JSONL file."""

    def apply(folder: Path) -> None:
        path = folder / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        change(rows)
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")

    return apply


def value(name: str, column: str, content: Any) -> Callable[[Path], None]:
    return edit(name, lambda rows: rows[0].__setitem__(column, content))


REFUSALS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a missing file": (lambda f: (f / "hotels.jsonl").unlink(), "no files hotels.csv or hotels"),
    "two files": (lambda f: (f / "hotels.csv").write_text("name\n"), "has 2 files hotels.csv"),
    "a missing column": (
        edit("trains", lambda rows: rows[0].pop("price")),  # type: ignore[arg-type, return-value]
        "row 1: missing column price. The columns are origin_city",
    ),
    "an unknown column": (value("hotels", "pool", 1), "row 1: unknown column pool."),
    "a wrong number": (value("hotels", "price", "cheap"), "price: Input should be a valid number"),
    "a negative price": (value("hotels", "price", -1), "price: Input should be greater"),
    "not a number": (value("hotels", "price", "nan"), "price: Input should be a finite number"),
    "a wrong time": (value("attractions", "opening_time", "9 am"), "opening_time: String should"),
    "a wrong date": (value("trains", "dep_date", "01.02.2026"), "dep_date: String should match"),
    "no latitude": (value("hotels", "latitude", 91), "latitude: Input should be less than"),
    "an unknown station": (
        value("trains", "dep_station_name", "Nowhere"),
        "the station 'Nowhere' of",
    ),
    "a name twice": (
        edit("restaurants", lambda rows: rows.append(rows[0])),
        "two places have the name",
    ),
    "no object": (lambda f: (f / "hotels.jsonl").write_text("[1]\n"), "a line is list and no"),
    "no JSON": (lambda f: (f / "hotels.jsonl").write_text("{\n"), "cannot be read"),
    "no UTF-8": (lambda f: (f / "hotels.jsonl").write_bytes(b"\xff\xfe\xff"), "cannot be read"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_an_unusable_folder_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    change, message = REFUSALS[case]
    change(write(WORLD.tables, tmp_path, "jsonl"))
    with pytest.raises(DataError) as caught:
        read_tables(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_csv_rows_of_the_wrong_length_are_refused(tmp_path: Path) -> None:
    path = write(WORLD.tables, tmp_path, "csv") / "locations.csv"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0], lines[1] + ",more"]), encoding="utf-8")
    with pytest.raises(DataError, match=r"row 1: unknown column \(more\)"):
        read_tables(tmp_path)
    path.write_text("\n".join([lines[0], lines[1].rpartition(",")[0]]), encoding="utf-8")
    with pytest.raises(DataError, match="longitude: Input should be a valid number"):
        read_tables(tmp_path)
