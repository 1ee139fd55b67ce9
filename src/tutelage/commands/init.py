"""`tutelage init`: write a commented configuration that fits two models and prompts."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import Any

from tutelage.commands.progress import PhaseReporter
from tutelage.commands.proposal import LEDGER, Proposal, propose
from tutelage.config.keys import KEYS, TAG_KEYS
from tutelage.config.parse import parse_config
from tutelage.config.read import apply_override
from tutelage.config.reference import find, toml_value
from tutelage.data.prompts import GRADERS, PromptFormat, fitting_grader, load_prompts
from tutelage.data.types import Prompt
from tutelage.errors import ConfigError, TutelageError
from tutelage.files.atomic import write_output
from tutelage.models.reference import resolve_model
from tutelage.setup.run_folder import run_folder
from tutelage.setup.validate import validate

_MODEL = "folder, .gguf file, package:NAME/folder, or hub id"
_WRAP: Any = {"break_on_hyphens": False, "break_long_words": False}
_OPTIONS = {
    "student": "student.model",
    "teacher": "teacher.model",
    "prompts": "data.path",
    "grader": "data.grader",
}
"""Options and the keys that they stand for."""


def run(arguments: argparse.Namespace) -> int:
    """Write the configuration, and print what to do next."""
    path = Path(arguments.config)
    _refuse_place(path)
    table = _given(arguments)
    with PhaseReporter() as reporter:
        for who in ("student", "teacher"):
            _ask_model(who, table)
        prompts = _ask_prompts(table)
        _refuse_mistakes(table)
        reporter("reading models and prompts")
        proposal = propose(table, prompts)
        config = parse_config(proposal.table)
        inputs = validate(config, run_folder(config, path.stem))
    write_output(path, as_toml(proposal, path.name), "another FILE")
    for line in (*proposal.warnings, *inputs.warnings):
        print(f"warning: {line}", file=sys.stderr)
    print(
        f"wrote {path}\nnext:\n"
        f"  tutelage check {path}   # loads both models, checks that they fit, plans memory\n"
        f"  tutelage train {path}   # Ctrl-C saves; the same command continues\n"
        "every key: tutelage config; one of them: tutelage config selection.rule"
    )
    return 0


def _refuse_mistakes(table: dict[str, Any]) -> None:
    """A mistake in what was given, before anything is loaded."""
    updates = table.get("updates_per_step")
    is_count = isinstance(updates, int) and updates > 0
    parse_config(({"prompts_per_step": updates} if is_count else {}) | table)


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """What options and overrides give, as a nested table.

    Raises:
        ConfigError: an option and an override give the same, or a table is a value.
    """
    table: dict[str, Any] = {"student": {}, "teacher": {}, "data": {}}
    for override in arguments.overrides:
        apply_override(table, override)
    for option, key in _OPTIONS.items():
        value, (name, last) = getattr(arguments, option), key.split(".")
        if not isinstance(table[name], dict):
            raise ConfigError(f"{name} is a table, got {table[name]!r}. Write {name}.KEY=VALUE.")
        if value is not None and last in table[name]:
            raise ConfigError(f"--{option} and {key} give the same. Leave one of them out.")
        if value is not None:
            table[name][last] = value
    return table


def _refuse_place(path: Path) -> None:
    if path.suffix != ".toml":
        raise ConfigError(f"init writes TOML, got {str(path)!r}. Name a file that ends in .toml.")
    if os.path.lexists(path):
        raise ConfigError(f"{path} exists and stays as it is. Name a new file, or remove it.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: {path.parent} is no folder. Make it.")


# --- what to ask ----------------------------------------------------------------------------------


def _ask_model(who: str, table: dict[str, Any]) -> None:
    """A question about a model that was not given; a student that is its own teacher is one."""
    if who == "teacher" and table[who].get("kind") == "self":
        return
    name = table[who].get("model")
    if name is None:
        name = _answer(f"{who} ({_MODEL})", f"--{who} MODEL", resolve_model)
    else:
        resolve_model(str(name))
    table[who] = {"model": name, **table[who]}


def _ask_prompts(table: dict[str, Any]) -> list[Prompt]:
    """The prompts of a file; none of a task that generates them. What was asked joins the table."""
    data = table["data"]
    name = data.pop("path", None)
    read: list[Prompt] = []

    def load(source: str) -> None:
        if source != LEDGER:
            columns = PromptFormat(data.get("prompt_column"), data.get("answer_column", "answer"))
            where = {key: data[key] for key in ("split", "subset") if key in data}
            read[:] = load_prompts(source, columns, **where)

    is_asked = name is None and data.get("kind", "file") == "file"
    if is_asked:
        question = "prompts (JSONL or parquet file, or hub id; ledger for the embedded task)"
        name = _answer(question, "--prompts FILE", load)
    elif name is not None:
        load(str(name))
    if name in (None, LEDGER):
        table["data"] = {"kind": LEDGER, **data}
        return []
    if "grader" not in data:
        data["grader"] = _grader(read, is_asked)
    elif data["grader"] != "none" and all(prompt.answer is None for prompt in read):
        raise ConfigError(
            f"the grader {data['grader']} compares with reference answers, and {name} has none in "
            f"the column {data.get('answer_column', 'answer')!r}. Leave it out, or name the column "
            "with data.answer_column=NAME."
        )
    table["data"] = {"kind": "file", "path": name, **data}
    return read


def _grader(prompts: list[Prompt], is_asked: bool) -> str:
    """What fits the reference answers; where prompts were asked for, a question."""
    if all(prompt.answer is None for prompt in prompts):
        return "none"
    fitting = str(fitting_grader(prompts))
    if fitting == "math" and find_spec("math_verify") is None:
        fitting = "exact"
    if not is_asked:
        return fitting

    def check(name: str) -> None:
        if name not in GRADERS:
            raise ConfigError(f"grader must be one of {', '.join(GRADERS)}, got {name!r}.")

    return _answer(f"grader ({', '.join(GRADERS)})", "--grader NAME", check, fitting)


def _answer(question: str, option: str, check: Callable[[str], object], default: str = "") -> str:
    """One line of standard input; a person is asked again after an answer that is refused.

    Raises:
        TutelageError: there is no line, or its answer is refused where nobody can be asked again.
    """
    is_person = sys.stdin.isatty()
    while True:
        shown = f" [{default}]" if default else ""
        print(f"{question}{shown}: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not is_person:
            print(file=sys.stderr)
        answer = line.strip() or default
        if not line and not default:
            what = question.partition(" ")[0]
            raise ConfigError(f"{what} is missing. Give {option}, or answer the question.")
        try:
            if not answer:
                raise ConfigError(f"{question.partition(' ')[0]} cannot be empty.")
            check(answer)
        except TutelageError as error:
            if not is_person:
                raise
            print(error, file=sys.stderr)
        else:
            return answer


# --- as a file ------------------------------------------------------------------------------------

_FEWER = (
    "# Fewer tokens: those that a rule ranks highest, such as",
    '# rule = "soft_or"',
    "# keep = 0.5",
)


def as_toml(proposal: Proposal, name: str) -> str:
    """The table as TOML, each key below its reason or its documentation."""
    lines = [
        *wrap(proposal.title, 96, initial_indent="# ", subsequent_indent="# ", **_WRAP),
        "#",
        f"#   tutelage check {name}",
        f"#   tutelage train {name}",
        "#",
        "# Keys that are not here have their defaults: `tutelage config` prints all of them.",
        "",
    ]
    tables = {key: value for key, value in proposal.table.items() if isinstance(value, dict)}
    lines += _keys(proposal, "", {k: v for k, v in proposal.table.items() if k not in tables})
    for table, values in tables.items():
        lines += _table(proposal, table, values)
    return "\n".join(lines) + "\n"


def _table(proposal: Proposal, table: str, values: dict[str, Any]) -> list[str]:
    inner = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines = ["", f"[{table}]"]
    lines += _keys(proposal, f"{table}.", {k: v for k, v in values.items() if k not in inner})
    lines += _FEWER if (table, values.get("rule")) == ("selection", "all") else ()
    for key, value in inner.items():
        lines += _table(proposal, f"{table}.{key}", value)
    return lines


def _keys(proposal: Proposal, prefix: str, values: dict[str, Any]) -> list[str]:
    lines = []
    for key, value in values.items():
        why = proposal.reasons.get(f"{prefix}{key}") or _documented(f"{prefix}{key}")
        lines += wrap(why and f"{why}.", 96, initial_indent="# ", subsequent_indent="# ", **_WRAP)
        lines.append(f"{key} = {toml_value(value)}")
    return lines


def _documented(key: str) -> str:
    """The first sentence on a key; nothing for one that names the kind of its table."""
    if key not in KEYS or key.rpartition(".")[2] in TAG_KEYS:
        return ""
    return find(key)[0].keys[0].doc.partition(". ")[0].rstrip(".")
