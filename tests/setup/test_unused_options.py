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
        ("objective", {"clip": 0.3}, {"kind": "eopd"}, None),
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


LIVE = {"updates_per_step": 1}
OLDER = {"rollouts": {"source": "stored"}}
TWO = {"updates_per_step": 2}


@pytest.mark.parametrize(
    ("objective", "without_effect", "with_effect"),
    [
        ({"kind": "sampled", "old_logprobs": "step"}, [LIVE, TWO], [OLDER]),
        ({"kind": "sampled", "clip": 0.3}, [LIVE], [OLDER, TWO]),
        ({"kind": "sampled", "old_logprobs": "step", "clip": 0.3}, [], [OLDER | TWO]),
        ({"kind": "eopd", "estimator": "sampled", "clip": 0.3}, [LIVE], [OLDER, TWO]),
        ({"kind": "tropd", "clip": 0.3}, [LIVE], [OLDER, TWO]),
        ({"kind": "opsa", "clip": 0.3}, [LIVE], [OLDER, TWO]),
        ({"kind": "grpo", "clip_high": 0.28}, [LIVE], [TWO]),
    ],
)
def test_options_of_a_ratio_need_older_weights_or_several_updates(
    objective: dict[str, Any],
    without_effect: list[dict[str, Any]],
    with_effect: list[dict[str, Any]],
) -> None:
    def warnings(beside: dict[str, Any]) -> list[str]:
        several = {"sampling": {"num_samples": 2}, "objective": objective}
        return list(unused_warnings(parse_config({**MODELS, **several, **beside})))

    for beside in without_effect:
        (line,) = warnings(beside)
        assert line.startswith(f"objective.{list(objective)[-1]} = ")
    for beside in with_effect:
        assert warnings(beside) == []


def test_a_clip_beside_recomputed_probabilities_needs_several_updates() -> None:
    objective = {"kind": "sampled", "old_logprobs": "step", "clip": 0.3}
    (line,) = unused_warnings(parse_config({**MODELS, **OLDER, "objective": objective}))
    assert line == ("objective.clip = 0.3 has no effect with updates_per_step = 1. Leave it out")


def test_the_default_method_has_no_such_option() -> None:
    assert list(unused_warnings(parse_config(MODELS))) == []
