"""Numbers, untrusted text and TOML."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.report import text

anything = st.text(st.characters(exclude_categories=()), max_size=60)
json_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
scalars = st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | json_text
configs = st.recursive(
    st.dictionaries(json_text, scalars | st.lists(scalars, max_size=3), max_size=4),
    lambda inner: st.dictionaries(json_text, scalars | inner, max_size=4),
    max_leaves=12,
)


@given(anything)
def test_visible_text_can_be_encoded_and_hides_nothing(value: str) -> None:
    shown = text.visible(value)
    shown.encode("utf-8")
    assert all(char.isprintable() or char in "\n\t" or char.isspace() for char in shown)


@given(st.text("abc äß漢😀\n\t<>&'\"", max_size=60))
def test_ordinary_text_is_left_alone(value: str) -> None:
    assert text.visible(value) == value


def test_direction_changes_are_spelled_out() -> None:
    assert text.visible("a\u202eb\u2066c\x1b[31m\x00") == (
        "a⟨U+202E⟩b⟨U+2066⟩c⟨U+001B⟩[31m⟨U+0000⟩"
    )


def test_long_text_is_cut_and_the_rest_is_counted() -> None:
    assert text.visible("x" * 2500) == "x" * 2000 + " … (500 more characters)"
    assert text.visible("x" * 2000) == "x" * 2000


@given(configs)
def test_toml_reads_back_as_the_configuration(config: dict[str, Any]) -> None:
    assert tomllib.loads(text.toml(config)) == config


def test_toml_leaves_null_out_and_writes_tables_of_tables() -> None:
    config = {"a": None, "b": {"c": [1, {"d": "e\x7f\u202e"}], "f": {}, "g": None}, "h": 1.5}
    expected = {"b": {"c": [1, {"d": "e\x7f\u202e"}], "f": {}}, "h": 1.5}
    written = text.toml(config)
    assert tomllib.loads(written) == expected
    assert "\u202e" not in written


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 00 s"), (119.7, "2 min 00 s"),
     (3599.6, "1 h 00 min"), (7500, "2 h 05 min")],
)  # fmt: skip
def test_durations_read_well(seconds: float, expected: str) -> None:
    assert text.duration(seconds) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(None, "–"), (0, "0"), (28479, "28,479"), (0.0123456, "0.01235"),
                            (1e-6, "1e-06"), (3.0, "3")]
)  # fmt: skip
def test_numbers_keep_four_digits(value: float | None, expected: str) -> None:
    assert text.number(value) == expected


def test_a_huge_mapping_is_bounded() -> None:
    rows = text.visible_rows({str(index): index for index in range(1000)})
    assert len(rows) == 301
    assert rows[-1] == ("…", "700 more")
