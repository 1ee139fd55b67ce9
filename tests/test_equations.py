"""docs/equations.md has every rule, objective, gate and weighting, and none that is not there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from tutelage.config.method import EOPDObjective, ObjectiveConfig, WeightingConfig
from tutelage.config.parse import parse_config
from tutelage.config.selection import SelectionConfig
from tutelage.core import EXTRAS, NORMALIZATIONS, RULES, policy, terms
from tutelage.core.weighting import GATES

TEXT = (Path(__file__).parents[1] / "docs" / "equations.md").read_text(encoding="utf-8")


def tags(union: Any, field: str) -> set[str]:
    """Values of the field that tells the members of a configuration's union apart."""
    members = get_args(get_args(union)[0])
    return {tag for member in members for tag in get_args(get_type_hints(member)[field])}


def choices(field: str) -> set[str]:
    """Values of one of EOPD's options."""
    return set(get_args(get_type_hints(EOPDObjective)[field]))


def term_names() -> set[str]:
    found = {
        name
        for module in (terms, policy)
        for name, x in vars(module).items()
        if isinstance(x, type) and x.__module__ == module.__name__
    }
    return {name for name in found if not name.startswith("_")} - {
        "Term",
        "HasStudentTop",
        "Buckets",
    }


# First cell of a table's heading: the names its rows must have.
TABLES: dict[str, set[str]] = {
    "rule": set(RULES),
    "`normalization`": set(NORMALIZATIONS),
    "name": set(EXTRAS),
    "term of `core.terms`": term_names(),
    "`objective.kind`": tags(ObjectiveConfig, "kind"),
    "`objective.estimator`": choices("estimator"),
    "`objective.fkl`": choices("fkl"),
    "`gate`": set(GATES),
    "`weighting.kind`": tags(WeightingConfig, "kind") - {"none"},
}


def tables(text: str) -> dict[str, list[list[str]]]:
    """Rows of cells of every table, by the first cell of its heading."""
    found: dict[str, list[list[str]]] = {}
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    for block in blocks:
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()
        ]
        found[rows[0][0]] = rows[2:]
    return found


def complaints(text: str) -> list[str]:
    """Names that a table lacks or invents, and cells that say nothing."""
    found = []
    for heading, names in TABLES.items():
        rows = tables(text).get(heading, [])
        written = {name for row in rows for name in re.findall(r"`(\w+)", row[0])}
        found += [f"{heading}: {name}" for name in sorted(written ^ names)]
        found += [f"{heading}: {row[0]} has an empty cell" for row in rows if not all(row)]
    return found


def test_every_name_has_its_equation_and_source() -> None:
    assert complaints(TEXT) == []
    with_source = ["rule", "`objective.kind`", "`objective.estimator`", "`objective.fkl`", "`gate`"]
    headings = re.findall(r"^\| (.+) \|\n\|-", TEXT, re.MULTILINE)
    for name in [*with_source, "`weighting.kind`"]:
        assert any(h.startswith(f"{name} |") and h.endswith("| source") for h in headings), name


@pytest.mark.parametrize("heading", TABLES)
def test_a_missing_invented_or_empty_entry_would_be_seen(heading: str) -> None:
    """Negative control: tables without their first row, with another name, without an equation."""
    row = tables(TEXT)[heading][0]
    line = f"| {' | '.join(row)} |\n"
    assert line in TEXT
    for changed in ("", line.replace("`", "`x", 1), line.replace(f"| {row[1]} |", "|  |")):
        assert complaints(TEXT.replace(line, changed)) != []


def test_every_rule_is_reachable_from_a_file() -> None:
    """Objectives and weightings are the unions themselves; rules live in the core."""
    assert tags(SelectionConfig, "rule") == set(RULES)
    assert choices("gate") == set(GATES)
    models = {"student": {"model": "s"}, "teacher": {"model": "t"}}
    for rule in RULES:
        more = {"num_tokens": 3} if rule == "first_n" else {}
        config = parse_config(models | {"selection": {"rule": rule, **more}})
        assert config.selection.rule == rule
