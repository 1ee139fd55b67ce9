"""A configuration in YAML is the one in TOML, and its mistakes are one line with a place."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.config.parse import load_config
from tutelage.config.read import apply_override, read_table
from tutelage.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs").rglob("*.toml"))
TEXT = """
num_steps: 7
student: {model: a}
teacher:
  model: b
optimizer:
  learning_rate: 1e-6   # a text in YAML 1.1
selection:
  rule: soft_or
  keep: .5
out: 2026-01-01
data: {kind: file, path: "no", suffix: off, subset: null, chat: false}
trackers: [wandb]
"""


def written(folder: Path, text: str, name: str = "x.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_words_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, TEXT, "x.yml"))
    assert table["optimizer"] == {"learning_rate": 1e-6}
    assert table["data"] == {
        "kind": "file", "path": "no", "suffix": "off", "subset": None, "chat": False,
    }  # fmt: skip
    assert (table["out"], table["selection"]["keep"]) == ("2026-01-01", 0.5)
    config = load_config(tmp_path / "x.yml", ["selection.keep=0.25", "trackers=[]"])
    assert (config.num_steps, config.trackers) == (7, ())
    assert vars(config.selection)["keep"] == 0.25


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_the_same_as_yaml(path: Path, tmp_path: Path) -> None:
    table = read_table(path)
    assert read_table(written(tmp_path, yaml.safe_dump(table))) == table


def texts(largest: int | None = None) -> st.SearchStrategy[str]:
    """But 1e5, which is a text by YAML 1.1, is written without quotes, and a number by YAML 1.2."""
    found = st.text(st.characters(codec="utf-8"), max_size=largest)
    return found.filter(lambda text: not re.fullmatch(r"[-+]?[0-9]+[eE][-+]?[0-9]+", text))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | texts()
    | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts(5), inner),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=25)
@given(st.dictionaries(texts(5).filter(bool), VALUES, max_size=3))
def test_what_another_writer_quotes_is_read_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, table: dict[str, Any]
) -> None:
    table.pop("base", None)
    table.pop("renormalise", None)
    path = written(tmp_path_factory.getbasetemp(), yaml.safe_dump(table, allow_unicode=False))
    assert read_table(path) == table


def test_bases_mix_both_formats(tmp_path: Path) -> None:
    written(tmp_path, "num_steps = 5\n[student]\nmodel = 'a'\n", "low.toml")
    table = read_table(written(tmp_path, "base: low.toml\nstudent: {num_layers: 2}\n"))
    assert table == {"num_steps": 5, "student": {"model": "a", "num_layers": 2}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: [1, 2\n", "(at line 3, column 1)"),
        ("a: 1\na: 2\n", "the key 'a' is there twice (at line 2, column 1)"),
        ("s:\n  k: 1\n  k: 2\n", "the key 'k' is there twice (at line 3, column 3)"),
        ("1: 2\n", "a key must be text, got 1 (at line 1, column 1)"),
        ("[a, b]: 2\n", "a key must be text"),
        ("- a\n", "must hold keys with values"),
        ("x: !!python/object:os.system a\n", "could not determine a constructor"),
        ("a: &a {b: *a}\n", "recursive"),
        ("a: 1\n---\nb: 2\n", "(at line 2"),
        ("a: \x00\n", "not valid YAML"),
        ("{" * 1100, "not valid YAML"),
        ("a:\n\tb: 1\n", "(at line 2, column 1)"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_table(written(tmp_path, text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "x.yaml") in str(caught.value)


def test_an_empty_file_is_an_empty_table_and_a_missing_one_is_named(tmp_path: Path) -> None:
    assert read_table(written(tmp_path, "# nothing\n")) == {}
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        read_table(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num_step: 3\n", "unknown key 'num_step'"),
        ("num_steps: no\n", "num_steps"),
        ("num_steps: true\n", "num_steps must be a number, got true"),
        ("selection: {rule: soft}\n", "did you mean"),
    ],
)
def test_keys_and_values_have_the_errors_of_toml(tmp_path: Path, text: str, said: str) -> None:
    whole = f"student: {{model: a}}\nteacher: {{model: b}}\n{text}"
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, whole))
    assert said.lower() in str(caught.value).lower()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("!!int abc", "'abc' is no int (at line 1, column 12)"),
        ("!!float abc", "'abc' is no float"),
        ("!!bool maybe", "'maybe' is no bool"),
        ("1" * 5000, f"'{'1' * 40}' is no int"),
        ("!!timestamp 2001-01-01", "timestamp"),
        ("!!binary '***'", "binary"),
        ("!!set {a}", "set"),
    ],
)
def test_a_value_that_is_not_of_its_tag_is_one_line(tmp_path: Path, value: str, said: str) -> None:
    path = written(tmp_path, f"num_steps: {value}")
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        read_table(path)
    assert str(caught.value).startswith(f"configuration {path} is not valid YAML: ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_number_of_thousands_of_digits_is_one_line_in_toml_too(tmp_path: Path) -> None:
    digits = "1" * 5000
    with pytest.raises(ConfigError, match="not valid TOML: Exceeds the limit"):
        read_table(written(tmp_path, f"num_steps = {digits}", "x.toml"))
    table: dict[str, Any] = {}
    apply_override(table, f"num_steps={digits}")
    assert table == {"num_steps": digits}


def test_the_second_line_of_an_override_is_not_dropped() -> None:
    table: dict[str, Any] = {}
    apply_override(table, "num_steps=1\nprompts_per_step=2")
    assert table == {"num_steps": "1\nprompts_per_step=2"}


def test_the_ending_may_have_capitals(tmp_path: Path) -> None:
    assert read_table(written(tmp_path, "num_steps: 7", "x.YAML")) == {"num_steps": 7}


@pytest.mark.parametrize("key", ["out", "student.model", "trackers"])
@pytest.mark.parametrize("text", ["a\0b", chr(0xD800), "\udcff"])
def test_texts_that_no_file_can_hold_are_refused(tmp_path: Path, key: str, text: str) -> None:
    path = written(tmp_path, "student: {model: a}\nteacher: {model: b}")
    value = [text] if key == "trackers" else text
    with pytest.raises(ConfigError, match=f"^{key}.* got "):
        load_config(path, [f"{key}={json.dumps(value)}" if key == "trackers" else f"{key}={text}"])
