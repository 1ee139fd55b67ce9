"""Checks that the tables of a configuration share: each raises one line that names the key."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ConfigDict

from tutelage.errors import ConfigError, as_share

STRICT = ConfigDict(extra="forbid")

LARGEST_COUNT = 1 << 20
"""Most prompts, samples or tokens of one kind, which are in memory together."""


def require(is_right: bool, key: str, rule: str, value: object, hint: str) -> None:
    """Raises a one-line `ConfigError` unless `is_right`."""
    if not is_right:
        share = as_share(value) if rule.startswith(("in (0, 1", "in [0, 1")) else ""
        raise ConfigError(f"{key} must be {rule}, got {value}. {share}{hint}")


def require_least(table: str, values: Mapping[str, int], **least: int) -> None:
    """Numbers of a table by their names, e.g. of "data.", that are at least so large."""
    for name, lowest in least.items():
        value = values[name]
        require(value >= lowest, f"{table}{name}", f"at least {lowest}", value, "Raise it.")


def require_counts(table: str, values: Mapping[str, int], **least: int) -> None:
    """The same for numbers of things that are in memory together, which have a maximum too."""
    require_least(table, values, **least)
    for name in least:
        most, value = LARGEST_COUNT, values[name]
        require(value <= most, f"{table}{name}", f"at most {most}", value, "Lower it.")
