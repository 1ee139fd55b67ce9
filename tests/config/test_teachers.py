"""Kinds of `[teacher]`: one without a kind is local, and others have their own keys."""

from __future__ import annotations

from typing import Any

import pytest

from tutelage.config.models import TeacherConfig
from tutelage.config.parse import fingerprint, parse_config, parse_saved_config, to_table
from tutelage.config.schema import Config
from tutelage.config.teachers import HiddenServerTeacher
from tutelage.errors import ConfigError

SERVED = {"kind": "hidden_server", "model": "m", "url": "http://localhost:8100"}


def parsed(teacher: dict[str, Any], **tables: Any) -> Config:
    return parse_config({"student": {"model": "s"}, "teacher": teacher, **tables})


def test_a_teacher_without_a_kind_is_local_and_runs_keep_their_names() -> None:
    plain, named = parsed({"model": "m"}), parsed({"kind": "local", "model": "m"})
    assert plain == named
    assert isinstance(plain.teacher, TeacherConfig)
    assert fingerprint(plain) == fingerprint(named) == "cb442b9f"  # as before there were kinds
    saved = to_table(plain)
    del saved["teacher"]["kind"]
    assert parse_saved_config(saved) == plain


def test_addresses_are_one_or_several() -> None:
    one, several = parsed(SERVED).teacher, parsed(SERVED | {"url": ["http://a", "http://b"]})
    assert isinstance(one, HiddenServerTeacher)
    assert one.urls == ("http://localhost:8100",)
    assert isinstance(several.teacher, HiddenServerTeacher)
    assert several.teacher.urls == ("http://a", "http://b")
    assert parse_saved_config(to_table(several)) == several


def test_a_served_teacher_is_not_evaluated() -> None:
    assert not parsed(SERVED).evaluation.teacher
    assert not parsed(SERVED, evaluation={"num_problems": 3}).evaluation.teacher
    with pytest.raises(ConfigError, match=r"evaluation.teacher must be false with teacher.kind"):
        parsed(SERVED, evaluation={"teacher": True})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "hidden_serve"}, "local, hidden_server.*Did you mean 'hidden_server'"),
        ({"mode": "reload"}, "unknown key 'teacher.mode'. It belongs to teacher.kind local"),
        ({"url": []}, r"teacher.url must be at least one address, got \[\]"),
        ({"url": 3}, "teacher.url: input should be a valid string or input should be a valid"),
        ({"num_concurrent": -1}, "teacher.num_concurrent must be from 0 to 256, got -1"),
        ({"timeout_s": 0.5}, "teacher.timeout_s must be from 1 to 86400, got 0.5"),
        ({"hidden_budget_bytes": -1}, "teacher.hidden_budget_bytes must be at least 0, got -1"),
    ],
)
def test_what_a_served_teacher_cannot_have_is_one_line(
    changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        parsed(SERVED | changed)
    assert "\n" not in str(found.value)


def test_a_missing_address_is_named() -> None:
    with pytest.raises(ConfigError, match=r"teacher.url is missing"):
        parsed({"kind": "hidden_server", "model": "m"})
    with pytest.raises(ConfigError, match=r"belongs to teacher\.kind hidden_server"):
        parsed({"model": "m", "url": "http://a"})
