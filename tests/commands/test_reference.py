"""`tutelage config`: every key has a default, a unit and a documentation, everywhere the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import argcomplete
import jsonschema
import pytest
from argcomplete.lexers import split_line
from calling import ROOT, call, succeed

from tutelage.commands.options import make_parser
from tutelage.config.keys import KEYS
from tutelage.config.parse import load_config
from tutelage.config.read import read_table
from tutelage.config.reference import UNITS, Kind, choices, find, is_number, json_schema, kinds
from tutelage.errors import ConfigError

RECIPES = sorted((ROOT / "configs").rglob("*.toml"))
EVERY = [(kind, key) for kind in kinds() for key in kind.keys]


def test_every_key_is_documented_and_a_number_has_a_unit() -> None:
    assert {key.name for _, key in EVERY} == set(KEYS)
    assert [key.name for _, key in EVERY if not key.doc] == []
    assert [kind.table for kind in kinds() if not kind.doc] == []
    assert [key.name for _, key in EVERY if is_number(key.values) != bool(key.unit)] == []
    lasts = {key.name.rpartition(".")[2] for _, key in EVERY if is_number(key.values)}
    assert set(UNITS) <= lasts, "units of keys that there are not"


def test_defaults_are_those_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('student.model = "a"\nteacher.model = "b"\n')
    plain = load_config(path)
    shown = [
        f"{key.name}={key.default}"
        for kind, key in EVERY
        if key.default and kind.table not in ("student.lora", "data") and not _is_other(kind)
    ]
    assert len(shown) > 50
    assert load_config(path, shown) == plain


def _is_other(kind: Kind) -> bool:
    """Of several kinds of a table, one that a configuration without the table does not have."""
    defaults = ("local", "ledger", "transformers", "live", "all", "kl", "none")
    return bool(kind.tags) and kind.tags[0] not in defaults


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    hint = "run: tutelage config --markdown > docs/configuration.md"
    assert succeed("config", "--markdown").out == page, hint
    assert set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE)) == {
        key.rpartition(".")[2] for key in KEYS
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sampling.top_p", "sampling.top_p = 1.0  # number, unit share"),
        ("selection.rule", '"soft_or"'),
        ("keep", "selection.keep = 0.5"),
        ("lr", "optimizer.learning_rate = 1e-06"),
        ("student.model", "text, required"),
        ("teachers.mathematics.mode", "teacher.mode"),
        ("[engine]", "engine.urls"),
        ("objective.k", 'kind = "eopd"'),
    ],
)
def test_one_key_or_one_table(name: str, said: str) -> None:
    assert said in succeed("config", name).out


def test_a_key_that_there_is_not_is_one_line() -> None:
    outcome = call("config", "colour")
    assert (outcome.code, outcome.out) == (2, "")
    assert "unknown key 'colour'" in outcome.err
    with pytest.raises(ConfigError):
        find("selection.colour")
    assert call("config", "seed", "--schema").code == 2


# --- schema ---------------------------------------------------------------------------------------

SCHEMA = jsonschema.Draft7Validator(json_schema())
PAIR: dict[str, Any] = {"student": {"model": "a"}, "teacher": {"model": "b"}}


def test_the_schema_is_printed_and_describes_every_key() -> None:
    printed = json.loads(succeed("config", "--schema").out)
    assert printed == json_schema()
    jsonschema.Draft7Validator.check_schema(printed)
    text = json.dumps(printed)
    assert all(json.dumps(key.doc)[1:-1] in text for _, key in EVERY if "Names the" not in key.doc)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits_the_schema(path: Path) -> None:
    import tomllib

    SCHEMA.validate(tomllib.loads(path.read_text()))
    SCHEMA.validate(read_table(path))


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_step": 3},
        {"num_steps": "many"},
        {"sampling": {"top_q": 1}},
        {"selection": {"rule": "soft"}},
        {"selection": {"rule": "all", "keep": 0.5}},
        {"objective": {"kind": "jsd", "k": 4}},
        {"data": {"kind": "file", "path": "x", "grader": "maths"}},
        {"student": {"model": 3}},
        {"teachers": {"x": {"kind": "none"}}},
    ],
)
def test_the_schema_refuses_what_a_run_refuses(wrong: dict[str, Any]) -> None:
    SCHEMA.validate(PAIR)
    assert not SCHEMA.is_valid(PAIR | wrong)


def test_models_are_missed_where_there_is_no_base() -> None:
    assert not SCHEMA.is_valid({"num_steps": 3})
    assert SCHEMA.is_valid({"base": "x.toml", "selection": {"keep": 0.5}})


# --- completion -----------------------------------------------------------------------------------


def test_words_of_a_key() -> None:
    assert choices("objective.kind")[:2] == ["kl", "jsd"]
    assert choices("data.chat") == ["true", "false"]
    assert choices("quadrant_thresholds") == ["median"]
    assert choices("num_steps") == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("tutelage sc", {"score"}),
        ("tutelage train x.toml selection.ru", {"selection.rule="}),
        ("tutelage train x.toml seed=1 selection.rule=soft_o",
         {"selection.rule=soft_or", "selection.rule=soft_or_sample"}),
        ("tutelage check x.toml --dr", {"--dry-run"}),
        ("tutelage config optimizer.b", {"optimizer.beta1", "optimizer.beta2"}),
        ("tutelage train x.toml num_steps=", set()),
    ],
)  # fmt: skip
def test_a_shell_completes_commands_options_keys_and_values(line: str, found: set[str]) -> None:
    quote, word, _, words, place = split_line(line)
    finder = argcomplete.CompletionFinder(make_parser("1"))
    given = finder._get_completions(words, word, quote, place)
    assert {each.strip() for each in given} == found
