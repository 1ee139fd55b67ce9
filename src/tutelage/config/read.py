"""Configuration files as nested tables: TOML or YAML, their bases, and `key=value` overrides."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from tutelage.errors import ConfigError

EARLIER_NAMES = {"renormalise": "renormalize"}
"""Keys of earlier versions and their names now; both are read, and name the same run."""
_YAML_ENDINGS = (".yaml", ".yml")


def read_table(path: str | Path) -> dict[str, Any]:
    """The nested table of a file; `base = "other.toml"` puts its values over those of another.

    Args:
        path: TOML file, or a YAML file by its ending; the path of its base is relative to its own
            folder.

    Raises:
        ConfigError: the file or one of its bases cannot be read, or is its own base.
    """
    path, table = Path(path), _table(Path(path))
    seen = [path.resolve()]
    while "base" in table:
        name = table.pop("base")
        if not isinstance(name, str):
            raise ConfigError(
                f"base must be the path of a TOML file, got {name!r}. Write its path."
            )
        path = path.parent / name
        if path.resolve() in seen:
            raise ConfigError(
                f"configuration {path} is its own base. Let base name another TOML file."
            )
        seen.append(path.resolve())
        table = _over(_table(path), table)
    return table


def apply_override(table: dict[str, Any], override: str) -> None:
    """Put the value of `key=value` into a nested table.

    Args:
        table: changed in place.
        override: e.g. "selection.rule=soft_or"; values are TOML, or plain text.

    Raises:
        ConfigError: it has another form, or leads through a value.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"override {override!r} is not of the form key=value. Write e.g. selection.keep=0.5."
        )
    *parents, last = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a table.")
    table[last if parents else current_name(last)] = _value(text.strip())


def current_name(key: str) -> str:
    """The name of a key in this version."""
    return EARLIER_NAMES.get(key, key)


def with_current_names(table: dict[str, Any]) -> dict[str, Any]:
    """A table with the names that its keys have in this version.

    Raises:
        ConfigError: it has a key under both names.
    """
    for earlier, now in EARLIER_NAMES.items():
        if earlier in table and now in table:
            raise ConfigError(f"{earlier} is the earlier name of {now}. Write {now} alone.")
    return {current_name(key): value for key, value in table.items()}


def _value(text: str) -> Any:
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # also a number of thousands of digits
        return text
    return table["value"] if len(table) == 1 else text  # not the first of several lines


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if isinstance(value, dict) and isinstance(under, dict):
            value = _over(under, value)
        merged[key] = value
    return merged


def _table(path: Path) -> dict[str, Any]:
    is_yaml = path.suffix.lower() in _YAML_ENDINGS
    parse: Callable[[str, Path], Any] = _yaml if is_yaml else _toml
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"configuration {path} does not exist. Give the path of a TOML file, "
            "such as configs/examples/ledger.toml."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"configuration {path} cannot be read: {error}. Give the path of a TOML file."
        ) from None
    return with_current_names(parse(text, path))


def _toml(text: str, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise ConfigError(f"configuration {path} is not valid TOML: {error}.") from None


# --- YAML -----------------------------------------------------------------------------------------

_SCALARS = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+0123456789."),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
)
"""Words that are no text, by YAML 1.2: 1e-6 is a number, `no` and `on` are texts, and a date is."""
_TAGS = ("null", "bool", "float", "str", "seq")
"""Tags whose values are read as PyYAML does; maps and whole numbers are read here."""


def _yaml(text: str, path: Path) -> dict[str, Any]:
    import yaml

    try:
        table = _loader()(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark, what = error.problem_mark, " ".join(str(error.problem).split())
        where = f" (at line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(f"configuration {path} is not valid YAML: {what}{where}.") from None
    except (yaml.YAMLError, RecursionError) as error:
        what = " ".join(str(error).split())
        raise ConfigError(f"configuration {path} is not valid YAML: {what}.") from None
    if table is None:
        return {}
    if not isinstance(table, dict):
        raise ConfigError(
            f"configuration {path} must hold keys with values, got {str(table)[:40]!r}. Write e.g. "
            "num_steps: 100."
        )
    return table


def _loader() -> Any:
    """A loader of plain data that knows the words of YAML 1.2 and refuses a key that repeats."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
        yaml_constructors: ClassVar[dict[str | None, Any]] = {
            tag: found
            for tag, found in yaml.SafeLoader.yaml_constructors.items()
            if tag is None or tag.rpartition(":")[2] in _TAGS
        }

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep=deep)
            except (ValueError, KeyError):
                problem = f"{str(node.value)[:40]!r} is no {node.tag.rpartition(':')[2]}"
                raise yaml.constructor.ConstructorError(
                    None, None, problem, node.start_mark
                ) from None

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            found: dict[Any, Any] = {}
            for key_node, value_node in node.value:
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, str):
                    problem = f"a key must be text, got {key!r}"
                elif key in found:
                    problem = f"the key {key!r} is there twice"
                else:
                    found[key] = self.construct_object(value_node, deep=True)
                    continue
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            return found

        def construct_table(self, node: Any) -> dict[Any, Any]:
            return self.construct_mapping(node, deep=True)

    Loader.add_constructor("tag:yaml.org,2002:map", Loader.construct_table)
    Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
    for name, pattern, first in _SCALARS:
        tag, words = f"tag:yaml.org,2002:{name}", re.compile(f"(?:{pattern})$")
        Loader.add_implicit_resolver(tag, words, [*first.replace("\0", ""), ""])
    return Loader
