"""The example on one page: a step keeps the rows it should, and all steps reach the accuracy."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import opd_in_one_file  # noqa: E402


def test_a_step_trains_on_the_kept_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    opd_in_one_file.train("soft_or", 0.1, num_steps=1, num_problems=1)
    counts = re.findall(r"step \d: (\d+) of (\d+) tokens, (\S+) nats", capsys.readouterr().out)
    assert len(counts) == 1
    for kept, tokens, loss in counts:
        # 32 completions of about 48 tokens, of each the tenth part, rounded down
        assert 1400 < int(tokens) < 1700
        assert 0.08 * int(tokens) < int(kept) <= 0.1 * int(tokens)
        assert float(loss) > 0.3  # of all tokens it is 0.2


@pytest.mark.slow
def test_it_trains_as_well_as_the_program() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    row = re.search(r"student after 60 steps \| [\d.]+ % \| ([\d.]+) – ([\d.]+)", readme)
    assert row is not None
    before, after = opd_in_one_file.train("all", 1.0, num_steps=60, num_problems=128)
    assert before.high < float(row[1]) / 100 < after.value < float(row[2]) / 100


def test_it_fits_on_a_page() -> None:
    source = Path(opd_in_one_file.__file__).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 120
