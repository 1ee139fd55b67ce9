"""Options without effect beside others are named; those with effect, and defaults, are not."""

from __future__ import annotations

from typing import Any

import pytest

from tutelage.config.parse import parse_config
from tutelage.setup.unused_options import unused_warnings

MODELS = {"student": {"model": "s"}, "teacher": {"model": "t"}}


@pytest.mark.parametrize(
    ("table", "options", "beside", "used_with"),
    [
        ("selection", {"normalization": "minmax"}, {"rule": "entropy"}, {"rule": "soft_or"}),
        (
            "selection",
            {"normalization": "minmax"},
            {"rule": "entropy_sample"},
            {"rule": "soft_or_sample"},
        ),
        (
            "selection",
            {"normalization": "minmax", "usefulness": "teachability"},
            {"rule": "influence", "combine": "none"},
            None,
        ),
        (
            "selection",
            {"normalization": "minmax"},
            {"rule": "influence", "usefulness": "teachability"},
            {"rule": "influence"},
        ),
        ("objective", {"width": 0.2}, {"kind": "eopd"}, {"kind": "eopd", "gate": "soft"}),
        ("objective", {"k": 8}, {"kind": "eopd"}, {"kind": "eopd", "fkl": "topk_tail"}),
        ("objective", {"clip": 0.3}, {"kind": "eopd"}, {"kind": "eopd", "estimator": "sampled"}),
    ],
)
def test_an_option_without_effect_is_named(
    table: str, options: dict[str, Any], beside: dict[str, Any], used_with: dict[str, Any] | None
) -> None:
    def warnings(settings: dict[str, Any]) -> list[str]:
        return list(unused_warnings(parse_config({**MODELS, table: settings})))

    found = warnings(beside | options)
    assert len(found) == len(options)
    for line, name in zip(sorted(found), sorted(options), strict=True):
        assert line.startswith(f"{table}.{name} = ")
        assert "has no effect with" in line
    assert warnings(beside) == []
    assert used_with is None or warnings(used_with | options) == []


def test_the_default_method_has_no_such_option() -> None:
    assert list(unused_warnings(parse_config(MODELS))) == []
