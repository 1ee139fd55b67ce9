"""Numbers and untrusted strings as readable text."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.evaluation.metrics import Interval

MISSING = "–"
_MAX_CHARS = 2000
_MAX_ROWS = 300


@dataclass(frozen=True)
class Table:
    """A table whose first row and first column are headings, for a terminal and for a page."""

    title: str
    rows: Sequence[Sequence[str]]
    lines: Sequence[str] = ()
    """Sentences that belong to it."""
    caption: str = ""
    """What a reader of the page has to know."""


def number(value: float | None, digits: int = 4) -> str:
    """Up to `digits` significant digits, or a dash for a value that was not measured."""
    if value is None:
        return MISSING
    return f"{value:,d}" if isinstance(value, int) else f"{value:.{digits}g}"


def percent(share: float | None) -> str:
    """A share in [0, 1] as a percentage with one decimal."""
    return MISSING if share is None else f"{100 * share:.1f} %"


def interval(found: Interval | None) -> str:
    """`62.3 % [55.0, 69.1]`, or a dash."""
    if found is None:
        return MISSING
    return f"{percent(found.value)} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def signed_interval(found: Interval) -> str:
    """A difference as `+3.1 points of mean@k [-0.4, +6.6]`."""
    value, low, high = (100 * part for part in (found.value, found.low, found.high))
    return f"{value:+.1f} points of mean@k [{low:+.1f}, {high:+.1f}]"


def duration(seconds: float) -> str:
    """Seconds as `9.4 s`, `3 min 12 s` or `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def visible(text: str, max_chars: int = _MAX_CHARS) -> str:
    """Text with its invisible characters spelled out and its length bounded.

    Control, direction-changing and other format characters can hide or reorder what a reader
    sees; they become `⟨U+202E⟩`. Line breaks and tabs stay.

    Args:
        text: any string, lone surrogates included.
        max_chars: characters of the input to keep; the count of the rest is stated.

    Returns:
        Text that can be encoded and shown.
    """
    shown = "".join(_visible_char(char) for char in text[:max_chars])
    hidden = len(text) - max_chars
    return f"{shown} … ({hidden:,} more characters)" if hidden > 0 else shown


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Pairs of dotted name and value text of a nested mapping, in its own order."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{name}.")
        else:
            yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def visible_rows(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The flattened mapping as table rows, made visible and bounded in number."""
    rows = [(visible(name, 200), visible(value, 500)) for name, value in flatten(tree)]
    hidden = len(rows) - _MAX_ROWS
    return [*rows[:_MAX_ROWS], ("…", f"{hidden:,} more")] if hidden > 0 else rows


def toml(config: Mapping[str, Any]) -> str:
    """The configuration as TOML text that `tutelage train` reads; null values are left out."""
    return "\n".join(_toml_lines(config, ())).strip() + "\n"


def table(rows: Iterable[Sequence[str]]) -> str:
    """Cells on one line each, first column left-aligned, the others right-aligned."""
    cells = [[cell.replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in cells
    )


def tables(found: Sequence[Table], notes: Sequence[str]) -> str:
    """Tables for a terminal, the first without its title; sentences and notes follow."""
    first, *others = found
    parts = [table(first.rows), *(f"{other.title}\n{table(other.rows)}" for other in others)]
    lines = [line for part in found for line in part.lines]
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else []), *notes])


def _toml_lines(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    present = {key: value for key, value in table.items() if value is not None}
    for key, value in present.items():
        if not isinstance(value, Mapping):
            yield f"{_toml_key(key)} = {_toml_value(value)}"
    for key, value in present.items():
        if isinstance(value, Mapping):
            yield f"\n[{'.'.join(_toml_key(part) for part in (*path, key))}]"
            yield from _toml_lines(value, (*path, key))


def _toml_key(key: str) -> str:
    is_bare = bool(key) and all(char.isascii() and (char.isalnum() or char in "-_") for char in key)
    return key if is_bare else _toml_string(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, str):
        return _toml_string(value)
    if isinstance(value, Mapping):
        pairs = (f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items() if v is not None)
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{', '.join(_toml_value(item) for item in value if item is not None)}]"
    # TOML spells infinities as Python does and JSON does not; booleans are the other way round.
    return repr(value) if isinstance(value, float) else json.dumps(value)


def _toml_string(text: str) -> str:
    """JSON and TOML escape alike, but TOML also wants DEL and the invisible characters escaped."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(_toml_escape(char) if _is_invisible(char) else char for char in quoted)


def _toml_escape(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) <= 0xFFFF else f"\\U{ord(char):08x}"


def _visible_char(char: str) -> str:
    return f"⟨U+{ord(char):04X}⟩" if char not in "\n\t" and _is_invisible(char) else char


def _is_invisible(char: str) -> bool:
    # Cc control, Cf format (bidi, zero width), Cs surrogate, Co private, Cn unassigned,
    # Zl and Zp line and paragraph separators.
    return unicodedata.category(char) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
