"""The tables and keys that a configuration may have, read from its dataclasses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from tutelage.config.schema import Config


@dataclass(frozen=True)
class Table:
    """One kind of a table of the TOML file."""

    keys: tuple[str, ...]
    required: tuple[str, ...]
    tag_key: str = ""
    """Key that names the kind, such as "rule"; empty for a table of one kind."""


TABLES: dict[str, dict[str, Table]] = {}
"""Kinds of each table by its dotted name ("" is the top) and tag ("" for a table of one kind)."""


TAG_KEYS = ("rule", "kind", "source")
"""Keys that name one of several kinds of a table."""


def _walk(kind: Any, name: str, tag_key: str = "") -> Iterator[str]:
    """Adds a table and those in it to `TABLES`; yields the dotted keys that are no tables."""
    hints = get_type_hints(kind)
    required = [f.name for f in fields(kind) if f.default is f.default_factory is MISSING]
    table = Table(tuple(hints), tuple(required), tag_key)
    tags = get_args(hints[tag_key]) if tag_key else ("",)
    TABLES.setdefault(name, {}).update(dict.fromkeys(tags, table))
    for key, hint in hints.items():
        path = f"{name}.{key}".lstrip(".")
        kinds = [part for part in (hint, *get_args(hint)) if is_dataclass(part)]
        for inner in kinds:
            tag = next((name for name in TAG_KEYS if name in get_type_hints(inner)), "")
            yield from _walk(inner, path, tag if len(kinds) > 1 else "")
        if not kinds:
            yield path


KEYS = tuple(dict.fromkeys(_walk(Config, "")))
"""Every key that a configuration may have, tables not, by its dotted name."""


def split_location(location: Sequence[str]) -> tuple[list[str], str]:
    """Keys and last tag in the place of an error, without the types and numbers pydantic adds."""
    keys: list[str] = []
    tag = ""
    for part in location:
        if part and not tag and part in TABLES.get(_table_of(keys), {}):
            tag = part
        elif not part.isdigit() and "[" not in part and part != "str":
            keys.append(part)
            tag = ""
    return keys, tag


def _table_of(keys: Sequence[str]) -> str:
    """Name of the table that some keys lead to; those of [teachers.NAME] are those of [teacher]."""
    if len(keys) > 1 and keys[0] == "teachers":
        keys = ["teacher", *keys[2:]]
    return ".".join(keys)


def kinds_at(location: Sequence[str]) -> tuple[Table, dict[str, Table]]:
    """The table in which an error is, and all kinds of that table by their tags."""
    keys, tag = split_location(location)
    kinds = TABLES[_table_of(keys)]
    return kinds.get(tag, next(iter(kinds.values()))), kinds
