"""A method that makes no sense is refused by the program in one line, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from calling import LEDGER, TINY, write_jsonl
from test_user_errors import refused

METHODS = [
    ("selection.rule=soft_or selection.keep=0", "keep must be in (0, 1], got 0.0. Use keep = 1.0"),
    ("selection.rule=soft_or selection.keep=1.5", "selection.keep must be in (0, 1], got 1.5."),
    ("objective.kind=jsd objective.teacher_weight=1", "strictly between 0 and 1, got 1.0. Use"),
    ("objective.kind=eopd objective.threshold=-0.5", "threshold must be at least 0 nats, got -0.5"),
    ("selection.rule=softor", "got 'softor'. Did you mean 'soft_or'?"),
    (
        "selection.rule=soft_or selection.normalization=minmax_p89",
        "got 'minmax_p89'. Did you mean 'minmax_p98'?",
    ),
    ("objective.kind=eopd objective.fkl=topk_tial", "'topk_tial'. Did you mean 'topk_tail'?"),
    ("objective.kind=eopd objective.gate=percent", "'percent'. Did you mean 'percentile'?"),
    ("weighting.kind=pace", "got 'pace'. Did you mean 'paced'?"),
]


@pytest.mark.parametrize(("overrides", "part"), METHODS)
def test_a_method_that_makes_no_sense(tmp_path: Path, overrides: str, part: str) -> None:
    out = tmp_path / "run"
    refused("train", LEDGER, *TINY, *overrides.split(), f"out={out}")(part)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ("--keep 0", "--keep must be in (0, 1], got 0."),
        ("--keep 1.5", "--keep must be in (0, 1], got 1.5."),
        ("--rules local_gian", "got 'local_gian'. Did you mean 'local_gain'?"),
    ],
)
def test_a_score_that_makes_no_sense(tmp_path: Path, options: str, part: str) -> None:
    out = tmp_path / "tokens.jsonl"
    refused("score", LEDGER, *options.split(), "--out", out)(part)
    assert not out.exists()


def test_a_completion_without_tokens(tmp_path: Path) -> None:
    given = write_jsonl(tmp_path / "c.jsonl", {"id": "x", "prompt": "a1+7;>", "completion": ""})
    out = tmp_path / "tokens.jsonl"
    refused("score", LEDGER, "--completions", given, "--out", out)("completion")
    assert not out.exists()
