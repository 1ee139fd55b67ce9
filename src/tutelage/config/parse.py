"""From a file and `key=value` overrides to a `Config`, with one clear line for every mistake."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tutelage.config.keys import TABLES, split_location
from tutelage.config.read import EARLIER_NAMES, apply_override, read_table, with_current_names
from tutelage.config.schema import Config
from tutelage.config.suggest import did_you_mean_key, did_you_mean_value, owners
from tutelage.config.teachers import NOT_EVALUATED
from tutelage.errors import ConfigError

_ADAPTER = TypeAdapter(Config)

_RENAMED = {
    "teacher.offload": 'teacher.mode = "offload"',
    "engine.url": 'a list of addresses: engine.urls = ["URL"]',
}

SAFE_KEYS = (
    "out",
    "checkpoint_every",
    "checkpoint_writer",
    "keep_checkpoints",
    "keep_best",
    "max_skipped_steps",
    "process_timeout_s",
    "trackers",
)
"""Keys that may change when a run is continued: they change no number in it."""
ADDRESS_KEYS = ("url", "logprob_url", "timeout_s")
"""Keys of teachers that say where one answers, and how long that may take; they may change and name
no run."""
_UNNAMED_KEYS = (*SAFE_KEYS, "num_threads", "device", "recording")
"""Keys that do not name a run: they change no more than rounding, or nothing."""
SHARDING_KEYS = ("sharding", "sharding_group_size")
"""Keys of models that say which process holds which weights; they may change and name no run, as
the number of processes does."""


_SMALLEST, _LARGEST = 1e-30, 1e9
"""Sizes of numbers beyond which products of a few of them leave the range of float32."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a file, with `key=value` overrides applied.

    Args:
        path: TOML or YAML file, with its base where it names one.
        overrides: e.g. "selection.rule=soft_or"; values are TOML, or plain text.

    Raises:
        ConfigError: the file, a key or a value is wrong.
    """
    table = read_table(path)
    for override in overrides:
        apply_override(table, override)
    return parse_config(table)


def parse_config(table: dict[str, Any]) -> Config:
    """The configuration a nested table describes.

    Raises:
        ConfigError: a key is unknown or missing, or a value does not fit; the first such.
    """
    config = _read(table)
    _require_usable_values(config)
    return config


def _read(table: dict[str, Any]) -> Config:
    table = with_current_names(table)
    for name, kind in (("objective", "kl"), ("teacher", "local")):
        if isinstance(inner := table.get(name), dict):
            table = {**table, name: {"kind": kind, **inner}}
    if isinstance(several := table.get("teachers"), dict):
        named = several.items()
        kinds = {n: {"kind": "local", **x} if isinstance(x, dict) else x for n, x in named}
        table = {**table, "teachers": kinds}
    if _is_unevaluated(table) and isinstance(table.get("evaluation", {}), dict):
        # it gives no completions: what is left out is false, and an explicit true is refused
        table = {**table, "evaluation": {"teacher": False, **table.get("evaluation", {})}}
    try:
        config = _ADAPTER.validate_python(table)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None
    _refuse_truth_values(config, table)
    return config


def _is_unevaluated(table: dict[str, Any]) -> bool:
    kind = teacher.get("kind") if isinstance(teacher := table.get("teacher"), dict) else None
    return str(kind) in NOT_EVALUATED or bool(table.get("teachers"))


def parse_saved_config(table: dict[str, Any]) -> Config:
    """`parse_config` of what an earlier version saved: keys it did not know have their effect then.

    Raises:
        ConfigError: as `parse_config`.
    """
    optimizer = table.get("optimizer")
    if isinstance(optimizer, dict) and optimizer.get("weight_decay"):
        table = {**table, "optimizer": {"decay_all": True, **optimizer}}
    engine = table.get("engine")
    if isinstance(engine, dict) and "url" in engine:
        rest = {key: value for key, value in engine.items() if key != "url"}
        table = {**table, "engine": {**rest, "urls": (engine["url"],)}}
    return _read(table)  # with numbers of any size: what it did, it did


def current_table(saved: Any) -> Any:
    """A saved configuration with every key of this version, or as it is if it cannot be read."""
    try:
        return json.loads(json.dumps(to_table(parse_saved_config(saved))))
    except (ConfigError, AttributeError, TypeError):
        return saved


def _refuse_truth_values(config: Config, table: dict[str, Any]) -> None:
    # pydantic takes true for the number 1
    found = flat_values(to_table(config))
    for key, value in _flat(table):
        read = found.get(key)
        pairs = zip(value, read, strict=True) if isinstance(read, list) else [(value, read)]
        for given, number in pairs:
            if isinstance(given, bool) and type(number) in (int, float):
                raise ConfigError(
                    f"{key} must be a number, got {str(given).lower()}. Write a number."
                )


def _require_usable_values(config: Config) -> None:
    """No infinity or NaN, which JSON lacks, nothing that overflows in float32 or in 64 bits, and no
    text that no file, and no path, can hold."""
    for key, value in _flat(to_table(config)):
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, str) and re.search("[\0\ud800-\udfff]", number):
                raise ConfigError(
                    f"{key} must be text that UTF-8 can write, without zero bytes, got {number!r}. "
                    "Change it."
                )
            size = abs(number) if isinstance(number, int | float) else 0
            if isinstance(size, int) and size >= 1 << 63:
                got = number if size < 1 << 128 else f"{size.bit_length()} bits"
                raise ConfigError(f"{key} must be a number of 64 bits, got {got}. Change it.")
            if not math.isfinite(size):
                raise ConfigError(f"{key} must be finite, got {number}. Change it.")
            if isinstance(number, float) and not (_SMALLEST <= size <= _LARGEST or size == 0):
                raise ConfigError(
                    f"{key} must be 0 or have a size from {_SMALLEST:g} to {_LARGEST:g}, got "
                    f"{number}. Change it."
                )


def to_table(config: Config) -> dict[str, Any]:
    """The configuration as a nested table of plain values."""
    return asdict(config)


def fingerprint(config: Config) -> str:
    """Eight hexadecimal digits naming everything in the configuration that changes results."""
    earlier = {now: key for key, now in EARLIER_NAMES.items()}
    chosen = _chosen(config).items()
    table = {earlier.get(key, key): value for key, value in chosen if key not in _UNNAMED_KEYS}
    if len(urls := table.get("engine", {}).get("urls", ())) == 1:
        del table["engine"]["urls"]
        table["engine"]["url"] = urls[0]  # as earlier versions named the only one
    if table["teacher"]["kind"] == "local":
        del table["teacher"]["kind"]  # as before there were kinds
    for teacher in (table["teacher"], *table.get("teachers", {}).values()):
        for key in ADDRESS_KEYS:
            teacher.pop(key, None)
    table = {key: value for key, value in table.items() if value or key != "teachers"}
    text = json.dumps(table, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _chosen(table: Any) -> dict[str, Any]:
    """What differs from the defaults, and the kinds of tables.

    Later versions have more keys; while those have their defaults, a run keeps its name.
    """
    found: dict[str, Any] = {}
    for field in fields(table):
        if field.name in SHARDING_KEYS:
            continue
        value = getattr(table, field.name)
        if is_dataclass(value):
            make = field.default_factory
            if make is MISSING or value != make():
                found[field.name] = _chosen(value)
        elif field.name == "teachers":
            found[field.name] = {name: _chosen(inner) for name, inner in value.items()}
        elif field.name in ("kind", "rule") or value != field.default:
            found[field.name] = value
    return found


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Dotted keys whose values differ, safe keys aside, sorted."""
    before, after = dict(_flat(old)), dict(_flat(new))
    keys = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    return sorted(key for key in keys if not _is_safe(key))


def _is_safe(key: str) -> bool:
    table, _, name = key.rpartition(".")
    is_address = name in ADDRESS_KEYS and table.partition(".")[0] in ("teacher", "teachers")
    is_free = name in SHARDING_KEYS or is_address
    return key in SAFE_KEYS or key.startswith("recording.") or is_free


def flat_keys(table: dict[str, Any]) -> list[str]:
    """Dotted names of all values of a nested table."""
    return [key for key, _ in _flat(table)]


def flat_values(table: dict[str, Any]) -> dict[str, Any]:
    """All values of a nested table by their dotted names."""
    return dict(_flat(table))


def _flat(table: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _explain(error: ValidationError) -> str:
    """The first mistake as one line: key, what is wrong, the value seen, what to do."""
    details = error.errors(include_url=False)
    # An unknown key explains the missing one it was meant to be.
    first = next((d for d in details if _kind(d) == "unknown"), details[0])
    location = [str(part) for part in first["loc"]]
    key = _key(location)
    match _kind(first):
        case "unknown" if key in _RENAMED:
            return f"{key} is now {_RENAMED[key]}. Write that instead."
        case "unknown":
            return f"unknown key {key!r}.{_did_you_mean(location)}"
        case "missing":
            *parents, last = location
            before = ".".join([*split_location(parents)[0], ""])
            kinds = list(TABLES.get(before + last, {}).values())
            inside = kinds[0].required if kinds else ()  # the first kind is what it is without one
            keys = [f"{before}{last}.{name}" for name in inside] or [before + last]
            return (
                f"{', '.join(keys)} is missing. Add it to the configuration or pass "
                f"{' '.join(f'{k}=VALUE' for k in keys)}."
            )
        case "tag":
            return _explain_tag(first, key)
        case "ours":
            return str(first["ctx"]["error"])
    if first["type"] == "tuple_type" and isinstance(text := first["input"], str):
        return (
            f"{key} must be a list, got {text!r}. Write {key} = {json.dumps([text])}, in a shell "
            f"'{key}={json.dumps([text])}'."
        )
    # A value that fits none of several types has one complaint for each.
    same = [d for d in details if _key([str(p) for p in d["loc"]]) == key]
    messages = [d["msg"] for d in same if _kind(d) == "other"]
    message = " or ".join(message[0].lower() + message[1:] for message in messages)
    return f"{key}: {message}, got {first['input']!r}.{_did_you_mean_value(first)}"


def _did_you_mean_value(detail: Any) -> str:
    """What to write instead of a value of the wrong kind, where that is known."""
    value = detail["input"]
    if detail["type"] == "literal_error":
        # pydantic lists the words as 'a', 'b' or 'c'
        return did_you_mean_value(value, detail["ctx"]["expected"].split("'")[1::2])
    if isinstance(value, str) and (share := re.fullmatch(r"\s*([0-9.]+)\s*%\s*", value)):
        return f" Write {float(share[1]) / 100:g}."
    return ""


def _key(location: Sequence[str]) -> str:
    """The dotted key of an error."""
    return ".".join(split_location(location)[0])


def _kind(detail: Any) -> str:
    kinds = {
        "unexpected_keyword_argument": "unknown",
        "missing": "missing",
        "missing_argument": "missing",
        "union_tag_invalid": "tag",
        "union_tag_not_found": "tag",
        "value_error": "ours",
    }
    return kinds.get(detail["type"], "other")


def _explain_tag(detail: Any, key: str) -> str:
    context = detail["ctx"]
    field = context["discriminator"].strip("'")
    if "tag" not in context:
        return f"{key}.{field} is missing. Choose one of {', '.join(TABLES[key])}."
    names = [name.strip("' ") for name in context["expected_tags"].split(",")]
    hint = did_you_mean_value(context["tag"], names)
    return f"{key}.{field} must be one of {', '.join(names)}, got {context['tag']!r}.{hint}"


def _did_you_mean(location: list[str]) -> str:
    *parents, last = location
    if parents == ["selection", "all"] and owners(parents, last):
        return " Rule 'all' keeps every token; choose another selection.rule to use it."
    return did_you_mean_key(parents, last)
