"""Hundreds of random batches under every rule: exact counts, no leak, nothing that cutting changes.

Two processes (gloo) share each batch out between them, one of them often empty-handed, and gather
it as a training step does. What they score and keep is compared, bit for bit, with one process that
reads the rows directly; see `sweep.py`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import sweep
from sweep import KEEPS, NUM_RANKS, Report, random_case

from ranks import run_script
from tutelage.core import NORMALIZATIONS, RULES

HERE = Path(__file__).parent
NUM_BATCHES = int(os.environ.get("TUTELAGE_SWEEP", "180"))


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Report]]:
    """What both ranks saw, by fault."""
    out = tmp_path_factory.mktemp("sweep")
    run_script(HERE / "sweep.py", (NUM_BATCHES, out), NUM_RANKS)
    found: dict[str, list[Report]] = {}
    for rank in range(NUM_RANKS):
        for table in json.loads((out / f"rank{rank}.json").read_text()):
            found.setdefault(table["fault"], []).append(Report(**table))
    return found


def violations(reports: list[Report]) -> Counter[tuple[str, str]]:
    """Number of batches with each kind of violation of each rule, on either rank."""
    return Counter((rule, kind) for report in reports for _, rule, kind in report.violations)


def test_two_ranks_score_and_keep_what_one_process_does(reports: dict[str, list[Report]]) -> None:
    first, second = reports["none"]
    assert first.violations + second.violations == []
    assert len(first.digests) == NUM_BATCHES
    assert first.digests == second.digests


def test_the_sweep_covers_what_it_claims() -> None:
    cases = [random_case(seed) for seed in range(NUM_BATCHES)]
    share = NUM_BATCHES // 20
    assert sum(case.has_ties for case in cases) > share
    assert sum(bool(case.bad) for case in cases) > share
    assert sum(bool(case.certain) for case in cases) > share
    assert sum(len(case.bad) == len(case.names) for case in cases) > 0
    assert sum(1 in case.lengths for case in cases) > share
    assert sum(len(set(case.rank)) == 1 for case in cases) > share  # the other rank has nothing
    interleaved = [case.rank for case in cases if case.rank != sorted(case.rank)]
    assert len(interleaved) > share
    assert {case.scope for case in cases} == {"completion", "batch"}
    assert {case.keep for case in cases} == set(KEEPS)
    assert {case.normalization for case in cases} == set(NORMALIZATIONS)


def test_a_leaked_row_is_seen_in_every_batch(reports: dict[str, list[Report]]) -> None:
    """Negative control: one row from outside of a completion, on each rank that has any."""
    seen = violations(reports["leak"])
    assert seen["*", "rows"] == NUM_RANKS * sweep.CONTROLS
    # It is far from any other row: minima and maxima, and so the choice, change.
    assert all(seen[rule, "importance"] > sweep.CONTROLS // 2 for rule in RULES if rule != "all")


def test_a_shifted_order_is_seen(reports: dict[str, list[Report]]) -> None:
    """Negative control: statistics of the neighbouring row."""
    seen = violations(reports["shift"])
    blind = {"all", "random", "first_n"}  # look at no statistic
    assert all(
        seen[rule, "importance"] > sweep.CONTROLS // 2 for rule in RULES if rule not in blind
    )
    assert all(seen[rule, "kept"] > sweep.CONTROLS // 4 for rule in RULES if rule not in blind)


def test_statistics_of_each_rank_by_itself_are_seen(reports: dict[str, list[Report]]) -> None:
    """Negative control: normalised per rank, Soft-OR and its kin score and keep other rows."""
    seen = violations(reports["per_rank"])
    for rule in ("soft_or", "soft_or_sample", "q3", "bottom", "teachability"):
        assert seen[rule, "importance"] > sweep.CONTROLS // 4
    assert sum(seen[rule, "kept"] for rule in ("soft_or", "q3", "bottom")) > sweep.CONTROLS // 4
    assert seen["entropy", "importance"] == 0  # a score that needs no other row
