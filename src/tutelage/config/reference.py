"""Every key of a configuration with its default, unit and documentation, read from the classes.

The documentation of a key is the text below its field, that of a table the docstring of its class.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

from tutelage.config.keys import KEYS, TABLES
from tutelage.config.schema import Config
from tutelage.config.suggest import find_key
from tutelage.errors import ConfigError

_UNITS = {
    "bytes": ("hidden_budget_bytes", "max_bytes"),
    "seconds": ("timeout_s", "tool_timeout_s", "process_timeout_s"),
    "tokens": (
        *("max_new_tokens", "max_prompt_tokens", "max_turn_tokens", "max_inserted_tokens"),
        *("max_model_len", "num_tokens", "micro_batch_tokens", "teacher_prefix_tokens"),
    ),
    "ids": ("top_k", "k", "num_logprobs"),
    "layers": ("num_layers",),
    "prompts": ("num_held_out", "num_problems", "num_prompts", "prompts_per_step", "num_tasks"),
    "completions": (
        *("num_samples", "num_rollouts", "micro_batch_size", "sampling_batch_size"),
        *("num_concurrent",),
    ),
    "steps": (
        *("num_steps", "warmup_steps", "every", "checkpoint_every", "max_skipped_steps"),
        "teacher_prefix_steps",
    ),
    "updates": ("updates_per_step",),
    "evaluations": ("patience",),
    "checkpoints": ("keep_checkpoints",),
    "processes": ("sharding_group_size",),
    "replicas": ("min_replicas",),
    "threads": ("num_threads",),
    "turns": ("max_turns",),
    "items": ("num_items", "num_products", "max_items"),
    "nats": ("threshold", "width", "max_logprob_gap", "quadrant_thresholds"),
    "share": (
        *("keep", "top_p", "dropout", "ema_decay", "gpu_memory_utilization", "on_policy_share"),
        *("teacher_weight", "alpha", "drop", "beta1", "beta2", "b"),
    ),
    "1": (
        *("rank", "temperature", "seed", "level", "success_reward", "learning_rate"),
        *("weight_decay", "max_grad_norm", "reverse_weight", "forward_weight"),
        *("value", "distillation_weight", "clip", "clip_low", "clip_high", "outside", "beta"),
    ),
}
"""Units and the keys that have them, by the last part of their names; 1 is a plain number."""
UNITS = {key: unit for unit, keys in _UNITS.items() for key in keys}
_UNITS_OF_KEYS = {"student.lora.alpha": "1", "teacher.num_concurrent": "sequences"}
"""Where the last part of a name is not enough."""


@dataclass(frozen=True)
class Key:
    """One key of one kind of a table."""

    name: str
    """Dotted, such as "sampling.top_p"."""
    default: str
    """As TOML; empty where a configuration may or must do without one."""
    is_required: bool
    values: str
    """What it takes: words as TOML, or a type."""
    unit: str
    """Empty for a key that is no number."""
    doc: str


@dataclass(frozen=True)
class Kind:
    """One kind of a table: a class of the configuration."""

    table: str
    """Dotted name of the table; "" is the top."""
    tag_key: str
    """Key that names the kind; empty for a table of one kind."""
    tags: tuple[str, ...]
    doc: str
    keys: tuple[Key, ...]

    @property
    def title(self) -> str:
        """The kind in the words of a configuration, such as `rule = "all"`."""
        return f"{self.tag_key} = {', '.join(map(json.dumps, self.tags))}" if self.tag_key else ""


@cache
def kinds() -> tuple[Kind, ...]:
    """Every kind of every table; those of the top come first."""
    return tuple(_kinds(Config, ""))


def find(name: str) -> list[Kind]:
    """The kinds of a table, or those of its table that have a key, with this key alone.

    Args:
        name: dotted name of a table or key, or a key's last part, or its name elsewhere.

    Raises:
        ConfigError: nothing has this name.
    """
    parts = name.strip().strip("[]").split(".")
    if parts[0] == "teachers" and len(parts) > 1:
        parts = ["teacher", *parts[2:]]
    name = ".".join(parts)
    if name and (name in TABLES or name == "teachers"):
        return [kind for kind in kinds() if kind.table == name] or find("teacher")
    key = name if name in KEYS else find_key(name)
    if key is None:
        tables = ", ".join(filter(None, TABLES))
        raise ConfigError(
            f"unknown key {name!r}. `tutelage config` prints every key; tables are {tables}."
        )
    return [
        Kind(kind.table, kind.tag_key, kind.tags, kind.doc, (found,))
        for kind in kinds()
        for found in kind.keys
        if found.name == key
    ]


def choices(name: str) -> list[str]:
    """The words that a key takes over all kinds of its table; none for numbers and texts."""
    values = " | ".join(kind.keys[0].values for kind in find(name))
    return list(dict.fromkeys(re.findall(r'(?<=")[^"|]+(?=")|true|false', values)))


def _kinds(cls: Any, table: str, tag_key: str = "") -> Iterator[Kind]:
    hints, docs = get_type_hints(cls, include_extras=True), documentation(cls)
    inner = {name: _classes(hint) for name, hint in hints.items() if name != "teachers"}
    tags = get_args(hints[tag_key]) if tag_key else ()
    keys = tuple(
        _key(f"{table}.{field.name}".lstrip("."), field, hints[field.name], docs)
        for field in sorted(fields(cls), key=lambda field: field.name != tag_key)
        if not inner.get(field.name)
    )
    yield Kind(table, tag_key, tags, _one_line(inspect.getdoc(cls) or ""), keys)
    for name, classes in inner.items():
        path = f"{table}.{name}".lstrip(".")
        for each in classes:
            kind = next((kind for kind in TABLES[path].values() if kind.tag_key), None)
            yield from _kinds(each, path, kind.tag_key if kind else "")


def _classes(hint: Any) -> list[Any]:
    """The dataclasses in a type."""
    if is_dataclass(hint):
        return [hint]
    return [found for part in get_args(hint) for found in _classes(part)]


def _key(name: str, field: Field[Any], hint: Any, docs: dict[str, str]) -> Key:
    last = name.rpartition(".")[2]
    values = _values(hint)
    unit = _UNITS_OF_KEYS.get(name, UNITS.get(last, "")) if is_number(values) else ""
    is_required = field.default is field.default_factory is MISSING
    doc = docs.get(field.name, "Names the kind of this table." if '"' in values else "")
    return Key(name, _default(field), is_required, values, unit, doc)


def is_number(values: str) -> bool:
    """Whether a key takes numbers, and so has a unit."""
    return re.search(r"(?<!\")number", values) is not None


def _default(field: Field[Any]) -> str:
    if field.default is MISSING or field.default is None:
        return ""
    return toml_value(field.default)


def toml_value(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(toml_value, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _values(hint: Any) -> str:
    """What a type takes, in the words of a configuration."""
    names = {str: "text", int: "whole number", float: "number", bool: "true | false"}
    origin, parts = get_origin(hint), get_args(hint)
    if hint in names:
        return names[hint]
    if origin is Annotated:
        return _values(parts[0])
    if origin is Literal:
        return " | ".join(map(json.dumps, parts))
    if origin is tuple:
        inner = [_values(part) for part in parts if part is not Ellipsis]
        count = "" if Ellipsis in parts else f"{len(parts)} × "
        return f"list of {count}{inner[0]}"
    if origin is dict:
        return "table"
    return " | ".join(_values(part) for part in parts if part is not NoneType)


@cache
def documentation(cls: Any) -> dict[str, str]:
    """The text below each field of a class, its bases' too, as one line."""
    found: dict[str, str] = {}
    for base in reversed([each for each in cls.__mro__ if is_dataclass(each)]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cast(type, base)))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                name, text = ast.unparse(field.target), below.value
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found[name] = _one_line(text.value)
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())


# --- as text, Markdown and a schema ---------------------------------------------------------------


def as_text(found: list[Kind]) -> Iterator[str]:
    """Lines of plain text: each key with its default, unit and documentation."""
    for kind in found:
        heading = f"[{kind.table}]" if kind.table else "at the top"
        yield f"{heading} {kind.title}".rstrip()
        yield from textwrap.wrap(kind.doc, 96, initial_indent="# ", subsequent_indent="# ")
        for key in kind.keys:
            unit = f"unit {key.unit}" if key.unit else ""
            about = ", ".join(filter(None, (key.values, unit, _presence(key))))
            yield f"{key.name}{' = ' if key.default else ''}{key.default}  # {about}"
            yield from textwrap.wrap(key.doc, 96, initial_indent="    ", subsequent_indent="    ")
        yield ""


def _presence(key: Key) -> str:
    return "required" if key.is_required else "" if key.default else "left out"


_HEAD = """# Configuration

Every key of a configuration with its default, generated by `tutelage config --markdown` from the
documented fields in `src/tutelage/config`. `tutelage config KEY` prints one of them, `tutelage init
FILE` writes a file to start from.

- A file is TOML, or YAML with the ending `.yaml` or `.yml` (`1e-6` is a number there, and only
  `true` and `false` are truth values). `base = "other.toml"` puts its values over another file's.
- Every key can be set on the command line: `tutelage train mine.toml selection.rule=soft_or`.
- A table with several kinds has a heading for each; the key that it begins with names the kind.
- "left out" stands where a key has no default, which descriptions call None; a unit of 1 is a plain
  number.
- Editors complete and check keys by `tutelage config --schema > tutelage.schema.json`: a TOML file
  names it in its first line, `#:schema tutelage.schema.json` (Even Better TOML), a YAML file in
  `# yaml-language-server: $schema=tutelage.schema.json`.
- Shells complete commands, keys and values with the extra `completion`: in bash and zsh by
  `eval "$(register-python-argcomplete tutelage)"`, in fish by
  `register-python-argcomplete --shell fish tutelage | source`."""


def as_markdown() -> str:
    """The reference of all keys as a page."""
    lines, last = [_HEAD], None
    for kind in kinds():
        if kind.table != last:
            lines += ["", f"## `[{kind.table}]`" if kind.table else "## At the top", ""]
        if kind.tag_key:
            lines += [*([""] if kind.table == last else []), f"### `{kind.title}`", ""]
        last = kind.table
        lines += [kind.doc, ""]
        lines += ["| key | default | values | unit | |", "|---|---|---|---|---|"]
        for key in kind.keys:
            name, default = key.name.rpartition(".")[2], f"`{key.default}`"
            shown = default if key.default else _presence(key)
            cells = (f"`{name}`", shown, _cell(key.values), key.unit, _cell(key.doc))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines).strip() + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def json_schema() -> dict[str, Any]:
    """A JSON schema of configuration files, for editors.

    A file may leave to its base, or to the command line, what a run needs; so nothing is required
    but the two models where there is no base.
    """
    from pydantic import TypeAdapter

    schema = TypeAdapter(Config).json_schema()
    classes = {each.__name__: each for each in _all_classes(Config)}
    for name, table in (*schema["$defs"].items(), ("Config", schema)):
        table.pop("required", None)
        for key, doc in documentation(classes[name]).items():
            if key in table.get("properties", {}):
                table["properties"][key]["description"] = doc
    schema = cast(dict[str, Any], _plain(schema))
    base = {"type": "string", "description": "Another TOML or YAML file that this one goes over."}
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "tutelage"}
    schema["properties"] = {"base": base, **schema["properties"]}
    needs = {"if": {"not": {"required": ["base"]}}, "then": {"required": ["student", "teacher"]}}
    return head | schema | needs


def _all_classes(cls: Any) -> Iterator[Any]:
    yield cls
    for hint in get_type_hints(cls, include_extras=True).values():
        for each in _classes(hint):
            yield from _all_classes(each)


def _plain(node: Any) -> Any:
    """Without titles made of names, and with unions as editors read them."""
    if isinstance(node, list):
        return [_plain(part) for part in node]
    if not isinstance(node, dict):
        return node
    return {
        {"oneOf": "anyOf"}.get(key, key): _plain(value)
        for key, value in node.items()
        if key != "discriminator" and not (key == "title" and isinstance(value, str))
    }
