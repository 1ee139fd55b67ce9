"""The claims benchmark: rules that can fail, arms that are paired, intervals that cover."""

from __future__ import annotations

import ast
import json
import multiprocessing.dummy
import random
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import claims
import claims_design
from claims_design import FULL, GRID, QUICK, SETTINGS, Cell, Design, cells, config_of, tuning_cells
from claims_figures import draw_all
from claims_page import _verdicts as page_verdicts
from claims_page import page
from claims_probe import OSCILLATION_RATES, SCORES, probe
from claims_rules import CLAIMS, arms_of_claims
from claims_table import PER_PROBLEM, PER_SEED, Table
from claims_verdicts import TESTS, Comparison, Verdict, judge, overall
from claims_work import do, fresh
from tutelage.config.parse import changed_keys, to_table
from tutelage.evaluation.metrics import Interval

ORDER = ["contradicted here", "not supported", "supported"]
RATE = 1e-3
RATES = dict.fromkeys(SETTINGS, RATE)
BRIEF = replace(
    FULL,
    seeds=(1, 2, 3),
    more_seeds=(4,),
    arms={**arms_of_claims(), "small": ("all", "eopd", "soft_or-50")},
)
"""The full design without most arms that no verdict needs."""
Quality = Callable[[Cell, str], float]


# --- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("test", "interval", "expected"),
    [
        ("beats", (0.02, 0.01, 0.03), "supported"),
        ("beats", (0.02, -0.01, 0.05), "not supported"),
        ("beats", (-0.02, -0.03, -0.01), "contradicted here"),
        ("matches", (-0.01, -0.02, 0.01), "supported"),
        ("matches", (0.00, -0.021, 0.01), "not supported"),
        ("matches", (-0.04, -0.05, -0.021), "contradicted here"),
        ("nearly", (-0.02, -0.029, 0.0), "supported"),
        ("nearly", (-0.021, -0.029, 0.0), "not supported"),
        ("nearly", (0.0, -0.03, 0.03), "not supported"),
        ("nearly", (-0.04, -0.05, -0.021), "contradicted here"),
        ("is_blind", (0.0, -0.1, 0.05), "supported"),
        ("is_blind", (0.0, -0.1, 0.06), "not supported"),
        ("is_blind", (0.2, 0.06, 0.3), "contradicted here"),
    ],
)
def test_every_test_reaches_every_verdict(
    test: str, interval: tuple[float, float, float], expected: Verdict
) -> None:
    assert TESTS[test](Interval(*interval)) == expected


@given(
    st.sampled_from(["beats", "matches", "nearly"]),
    st.lists(st.floats(-0.1, 0.1), min_size=3, max_size=3).map(sorted),
    st.floats(0.0, 0.1),
)
def test_a_better_difference_is_never_judged_worse(
    test: str, points: list[float], shift: float
) -> None:
    low, value, high = points
    before = TESTS[test](Interval(value, low, high))
    after = TESTS[test](Interval(value + shift, low + shift, high + shift))
    assert ORDER.index(after) >= ORDER.index(before)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["supported", "supported"], "supported"),
        (["supported", "not supported"], "not supported"),
        (["supported", "contradicted here"], "not supported"),
        (["not supported", "contradicted here"], "contradicted here"),
        (["not supported"], "not supported"),
        ([], "not supported"),
    ],
)
def test_a_claim_needs_all_of_its_comparisons(parts: list[Verdict], expected: Verdict) -> None:
    assert overall(parts) == expected


@pytest.mark.parametrize(
    ("test", "interval", "expected"),
    [
        ("beats", (0.05, 0.01, 0.09), "decided"),
        ("beats", (0.00, -0.015, 0.015), "a tie"),
        ("beats", (-0.01, -0.05, 0.015), "not ahead"),
        ("beats", (0.03, -0.01, 0.07), "too noisy to say"),
        ("beats", (0.012, -0.001, 0.025), "too noisy to say"),
        ("matches", (0.00, -0.03, 0.03), "too noisy to say"),
        ("matches", (-0.02, -0.025, -0.015), "at the limit"),
        ("matches", (-0.05, -0.06, -0.04), "decided"),
        ("is_blind", (0.05, 0.03, 0.07), "at the limit"),
        ("is_blind", (0.05, -0.2, 0.3), "too noisy to say"),
    ],
)
def test_a_wide_interval_is_told_from_a_measured_tie(
    test: str, interval: tuple[float, float, float], expected: str
) -> None:
    assert Comparison("", "points", test, Interval(*interval), 5).reading == expected


def record(cell: Cell, quality: Quality) -> dict[str, Any]:
    """A finished cell whose figures are `quality` and a little noise."""
    rng = random.Random(cell.key)
    found: dict[str, Any] = {"key": cell.key, **asdict(cell), "commit": "c" * 40}
    found |= {"cpu_s": 1.0, "wall_s": 2.0, "digest": "d"}

    def noisy(name: str) -> float:
        return quality(cell, name) + rng.gauss(0.0, 1e-3)

    match cell.kind:
        case "probe":
            worth = [rng.random() for _ in range(40)]
            tokens = {
                rule: [quality(cell, rule) * w + rng.gauss(0.0, 0.3) for w in worth]
                for rule in SCORES
            }
            quadrant = [rng.randrange(1, 5) for _ in worth]
            found["tokens"] = {**tokens, "decrease": worth, "gradient": worth, "quadrant": quadrant}
        case "oscillation":
            for name in ("flat", "peaked"):
                for rate in OSCILLATION_RATES:
                    found[f"changes_{name}_{rate}"] = noisy(name)
                    found[f"late_{name}_{rate}"] = noisy(name)
        case "bias":
            for form in ("start", "full", "tail", "renorm"):
                for figure in ("entropy", "forward_kl"):
                    found[f"{figure}_{form}"] = noisy(f"{figure}_{form}")
        case _:
            found["problems"] = {name: [noisy(name) for _ in range(6)] for name in PER_PROBLEM}
            found |= {name: sum(x) / len(x) for name, x in found["problems"].items()}
            found |= {name: noisy(name) for name in PER_SEED}
    return found


def all_records(design: Design, quality: Quality) -> dict[str, dict[str, Any]]:
    work = [*tuning_cells(design), *cells(design, RATES)]
    return {cell.key: record(cell, quality) for cell in work}


FAVOURED = ("soft_or", "q3", "entropy_sample", "random-50", "eopd", "flat")
"""Arms and things that the claims want to be ahead."""


def as_claimed(cell: Cell, name: str) -> float:
    """A world in which every claim holds."""
    if name == "q3_kept_first":
        return 0.9 if cell.arm.startswith("soft_or") else 0.1
    if cell.kind in ("arm", "tune"):
        sign = -1 if name in ("high_forward_kl", "reverse_kl") else 1
        is_ahead = cell.arm.startswith(FAVOURED) or (cell.kind, cell.learning_rate) == (
            "tune",
            RATE,
        )
        return 0.5 + sign * 0.1 * is_ahead
    world = {"entropy_start": 4.0, "entropy_renorm": 3.0, "forward_kl_renorm": 2.0, "flat": 5.0}
    world |= {"forward_kl_tail": 0.1, "forward_kl_start": 0.4, "soft_or": 20.0}
    return world.get(name, 0.0)


def opposite(cell: Cell, name: str) -> float:
    """A world in which every claim fails."""
    if name == "q3_kept_first":
        return {"soft_or": 0.1, "random": 0.0}.get(cell.arm.split("-")[0], 0.9)
    if cell.kind == "probe":
        return 0.0 if name == "soft_or" else 20.0
    if cell.kind == "bias":
        return {"entropy_renorm": 5.0, "forward_kl_start": 4.0, "forward_kl_tail": 2.0}.get(
            name, 1.0
        )
    worst = 0.1 if cell.arm.startswith("soft_or_sample") else 0.0  # its rival is favoured too
    return as_claimed(cell, name) * (1 if cell.kind == "tune" else -1) - worst


@pytest.mark.parametrize(
    ("world", "expected"), [(as_claimed, "supported"), (opposite, "contradicted here")]
)
def test_every_claim_can_be_supported_and_contradicted(world: Quality, expected: str) -> None:
    results = claims.published(all_records(BRIEF, world), BRIEF)
    verdicts = {name: claim["verdict"] for name, claim in results["claims"].items()}
    assert verdicts == dict.fromkeys(CLAIMS, expected)


def test_a_claim_whose_arms_are_missing_is_not_supported() -> None:
    work = [c for c in cells(FULL, RATES) if c.arm not in ("entropy_sample-50", "eopd")]
    table = Table([record(c, as_claimed) for c in work], FULL.seeds, RATES)
    assert not table.has("overconfident", "entropy_sample-50", "all")
    with pytest.raises(KeyError):
        judge(table, {})


# --- arms are paired ------------------------------------------------------------------------------


@pytest.mark.parametrize("design", [FULL, QUICK], ids=lambda d: d.name)
def test_arms_of_a_setting_and_seed_differ_in_the_method_alone(design: Design) -> None:
    work = [c for c in cells(design, RATES) if c.kind == "arm"]
    assert len({c.key for c in work}) == len(work)
    reference = {
        (c.setting, c.seed, c.learning_rate): to_table(config_of(c)) for c in work if c.arm == "all"
    }
    for cell in work:
        assert config_of(cell).optimizer.learning_rate == cell.learning_rate
        other = reference[cell.setting, cell.seed, cell.learning_rate]
        keys = changed_keys(other, to_table(config_of(cell)))
        assert all(key.split(".")[0] in ("selection", "objective") for key in keys)


def test_every_student_meets_every_arm_and_every_rule_and_budget_is_one() -> None:
    assert set(FULL.arms) == set(SETTINGS)
    assert len(FULL.seeds) >= 5
    for arms in FULL.arms.values():
        for rule in claims_design.RULES:
            assert all(f"{rule}-{percent}" in arms for percent in (50, 20, 10))
        assert {"all", "bottom-50", "eopd", "eopd_sampled", "opd_sampled", "q3-10+eopd"} <= {*arms}


def test_claims_have_more_seeds_and_are_repeated_at_other_rates() -> None:
    work = [c for c in cells(FULL, RATES) if c.kind == "arm"]
    for setting, arms in arms_of_claims().items():
        for arm in arms:
            mine = [c for c in work if (c.setting, c.arm, c.learning_rate) == (setting, arm, RATE)]
            assert {c.seed for c in mine} == {*FULL.seeds, *FULL.more_seeds}
    for setting, arms in FULL.sensitivity_arms.items():
        rates = {c.learning_rate for c in work if c.setting == setting and c.arm in arms}
        assert rates == {RATE / 2, RATE, 2 * RATE}
    assert not {*FULL.seeds, *FULL.more_seeds} & {c.seed for c in tuning_cells(FULL)}


def test_a_difference_uses_all_seeds_and_a_table_the_common_ones() -> None:
    """Arms ahead by 0.1 in the first five seeds only."""
    work = [c for c in cells(FULL, RATES) if c.setting == "overconfident" and c.kind == "arm"]

    def early(cell: Cell, name: str) -> float:
        return 0.5 + 0.1 * (cell.arm == "q3-10" and cell.seed in FULL.seeds)

    records = [record(c, early) for c in work]
    table = Table(records, FULL.seeds, RATES)
    difference = table.difference("overconfident", "q3-10", "all", "mean")
    assert difference.value == pytest.approx(0.1 * 5 / 8, abs=2e-3)
    assert table.interval("overconfident", "q3-10", "mean").value == pytest.approx(0.6, abs=2e-3)
    assert len(table.seeds_of("overconfident", "q3-10", "all")) == 8
    assert len(table.seeds_of("overconfident", "q3-10", "eopd", "teacher")) == 5
    without = [r for r in records if (r["arm"], r["seed"]) != ("q3-10", 3)]
    table = Table(without, FULL.seeds, RATES)
    assert not table.has("overconfident", "q3-10")
    with pytest.raises(KeyError):
        table.difference("overconfident", "q3-10", "all", "mean")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of two small steps."""
    for name, setting in claims_design.SETTINGS.items():
        brief = replace(setting, prompts_per_step=4, num_steps=2)
        monkeypatch.setitem(claims_design.SETTINGS, name, brief)


@pytest.mark.usefixtures("short")
def test_arms_start_alike_and_the_same_cell_gives_the_same_numbers() -> None:
    cell = Cell("arm", "overconfident", "all", 7, RATE, 3)
    records = {arm: do(replace(cell, arm=arm)) for arm in ("all", "random-10", "eopd")}
    first = ("training_reverse_kl_first", "q3_share_first", "q3_kl_first")
    for name in first:  # `all` measures while it learns, the others before: rounding differs
        assert [r[name] for r in records.values()] == pytest.approx(
            [records["all"][name]] * 3, 1e-5
        )
    assert len({r["weights"] for r in records.values()}) == 3
    assert records["random-10"]["tokens_trained"] < records["all"]["tokens_trained"] / 5
    assert do(cell) == records["all"]
    other = do(replace(cell, seed=8))
    assert other["training_reverse_kl_first"] != records["all"]["training_reverse_kl_first"]
    faster = do(replace(cell, learning_rate=2 * RATE))
    assert faster["training_reverse_kl_first"] == records["all"]["training_reverse_kl_first"]
    assert faster["weights"] != records["all"]["weights"]


@pytest.mark.usefixtures("short")
def test_baselines_are_measured_untrained() -> None:
    cell = Cell("arm", "overconfident", "start", 7, RATE, 3)
    start, teacher = do(cell), do(replace(cell, arm="teacher"))
    assert start["weights"] != teacher["weights"]
    assert max(teacher["problems"]["reverse_kl"]) < 1e-6 < start["reverse_kl"]
    assert "tokens_trained" not in start


@pytest.mark.usefixtures("short")
def test_a_probed_step_is_undone_and_finds_tokens_that_help() -> None:
    cell = Cell("probe", "overconfident", "", 1, 0.0, 0, 4)
    components = fresh(cell)
    before = [p.clone() for p in components.student.parameters()]
    tokens = probe(components, config_of(cell), 4)["tokens"]
    assert all(
        torch.equal(a, b) for a, b in zip(before, components.student.parameters(), strict=True)
    )
    assert len(tokens["decrease"]) == 4
    assert any(tokens["decrease"])
    assert min(tokens["gradient"]) > 0


# --- files ----------------------------------------------------------------------------------------


def test_a_torn_line_is_done_again_and_finished_cells_are_not(tmp_path: Path) -> None:
    work = cells(QUICK, RATES)[:3]
    lines = [json.dumps(record(cell, as_claimed)) for cell in work]
    path = tmp_path / "cells.jsonl"
    path.write_text("\n".join(lines) + "\n" + lines[0][: len(lines[0]) // 2], encoding="utf-8")
    assert set(claims.finished(path)) == {cell.key for cell in work}
    assert set(claims.complete(work, path, num_workers=0)) == {cell.key for cell in work}
    path.write_text(lines[0] + "\n" + lines[1][:-20], encoding="utf-8")
    assert set(claims.finished(path)) == {work[0].key}


def test_every_setting_takes_the_rate_of_the_lowest_divergence_and_the_smaller_of_equals() -> None:
    best = {"small": {GRID[0]: 0.1}, "overconfident": {2e-3: 0.2, 4e-3: 0.2}}
    records = {
        c.key: {"reverse_kl": best.get(c.setting, {8e-3: 0.3}).get(c.learning_rate, 0.5), "mean": 0}
        for c in tuning_cells(FULL)
    }
    rates = claims.chosen_rates(claims.tuned(records, FULL))
    expected = {"overconfident": 2e-3, "scarce": 8e-3, "collapsed": 8e-3, "small": GRID[0]}
    assert rates == expected
    chosen = {c.setting: c.learning_rate for c in cells(FULL, rates) if c.arm == "start"}
    assert chosen == expected


def test_a_cell_of_another_source_is_not_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = cells(QUICK, RATES)[-1]
    path = tmp_path / "cells.jsonl"
    path.write_text(json.dumps(record(cell, as_claimed)) + "\n", encoding="utf-8")
    assert cell.key in claims.finished(path)
    monkeypatch.setattr(claims_design, "source", lambda: "another")
    assert cell.key not in claims.finished(path)


def test_the_source_hash_sees_every_byte_and_every_file(tmp_path: Path) -> None:
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text("x = 1\n")
    b.write_text("y = 2\n")
    before = claims_design.digest_of([a, b])
    assert claims_design.digest_of([a, b]) == before != claims_design.digest_of([a])
    b.write_text("y = 3\n")
    assert claims_design.digest_of([a, b]) != before


def test_cells_are_keyed_by_all_code_that_they_can_run() -> None:
    """Also by what is imported within functions, and by folders that are added later."""
    files = claims_design.sources()
    code = {file for file in files if file.suffix == ".py"}
    missing = {str(part) for file in code for part in imported_from_package(file) - code}
    assert not missing
    assert all((claims_design.PACKAGE / name).exists() for name in claims_design.NOT_SOURCES)
    folders = {file.parent.name for file in code}
    assert {"core", "train", "stored", "rollout", "teachers", "setup", "models"} <= folders
    assert {"claims_work.py", "claims_probe.py", "claims_design.py"} <= {f.name for f in code}
    of_models = {(file.parent.name, file.name) for file in files if file not in code}
    assert {("ledger-teacher", "model.safetensors"), ("ledger-small", "tokenizer.json")} < of_models


def imported_from_package(file: Path) -> set[Path]:
    """Files of the package that a file imports anywhere, itself or its parts."""
    names = {
        name
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module
        for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    }
    parts = [name.split(".")[1:] for name in names if name.startswith("tutelage.")]
    places = [claims_design.PACKAGE.joinpath(*part) for part in parts]
    found = {file for p in places for file in (p.with_suffix(".py"), p / "__init__.py")}
    return {file for file in found if file.is_file()}


@pytest.mark.parametrize("is_same", [True, False])
def test_verify_runs_cells_of_the_json_again_and_fails_where_a_number_differs(
    is_same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = cells(QUICK, RATES)[:3]
    made = {cell.key: record(cell, as_claimed) for cell in work}
    old = [{k: v for k, v in r.items() if k not in claims.NOT_PUBLISHED} for r in made.values()]
    old[1]["cpu_s"] = 9.0
    if not is_same:
        old[2]["digest"] = "other"
    file = tmp_path / "claims.json"
    file.write_text(json.dumps({"source": claims_design.source(), "cells": old}))
    monkeypatch.setattr(claims, "results_file", lambda _: file)
    monkeypatch.setattr(claims, "do", lambda cell: made[cell.key])
    threads = SimpleNamespace(get_context=lambda _: multiprocessing.dummy)
    monkeypatch.setattr(claims, "multiprocessing", threads)
    assert claims.verify(QUICK, sys.maxsize, 1) == is_same


def test_a_repeated_cell_that_differs_is_named_and_times_are_not_compared() -> None:
    cell = cells(FULL, RATES)[-1]
    again = record(cell, as_claimed)
    published = {k: v for k, v in again.items() if k not in claims.NOT_PUBLISHED}
    assert Cell(**{name: published[name] for name in asdict(cell)}) == cell
    assert claims.differing({**published, "cpu_s": 9.0}, again) == []
    assert claims.differing({**published, "digest": "e", "pass": -1.0}, again) == ["digest", "pass"]


def test_the_page_is_made_from_the_json_alone(tmp_path: Path) -> None:
    results = claims.published(all_records(BRIEF, as_claimed), BRIEF)
    text = json.dumps(results)
    made = page(json.loads(text))
    for name, claim in CLAIMS.items():
        assert f"### {name}\n" in made
        assert claim.text in made
        assert f"images/claims-{name}.svg" in made
    assert "creates Q3 by construction" in made
    assert "says nothing about large models" in made
    assert not re.search(r"\bnan\b|\binf\b|[{}]", made)
    assert made.index("## Verdicts") < made.index("## Read this first") < made.index("### T1")
    assert text == json.dumps(json.loads(claims.as_text(results)))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        draw_all(json.loads(text), tmp_path / folder)
    drawn = sorted(tmp_path.glob("a/*.svg"))
    assert len(drawn) == len(CLAIMS) + 1
    assert all(f.read_bytes() == (tmp_path / "b" / f.name).read_bytes() for f in drawn)


def test_the_quick_page_says_that_it_is_no_evidence() -> None:
    results = claims.published(all_records(QUICK, as_claimed), QUICK)
    assert "too few seeds" in page(json.loads(json.dumps(results)))
    places = (claims.results_file(QUICK), claims.page_folder(QUICK), claims.working_file(QUICK))
    assert all(path.is_relative_to(claims.ROOT / "runs") for path in places)


def test_the_page_names_contradicted_parts_and_what_is_noise() -> None:
    """Entropy sampling is worse than all tokens in one setting, and scattered in the other."""

    def mixed(cell: Cell, name: str) -> float:
        if (cell.arm, name) != ("entropy_sample-50", "mean"):
            return as_claimed(cell, name)
        return 0.2 if cell.setting == "overconfident" else 0.5 + 0.1 * (-1) ** cell.seed

    claim = claims.published(all_records(BRIEF, mixed), BRIEF)["claims"]["T1"]
    assert claim["verdict"] == "contradicted here"
    assert [c["reading"] for c in claim["comparisons"]] == ["decided", "too noisy to say"]
    line = page_verdicts({"T1": claim}).splitlines()[-1]
    assert line.endswith("| mean@8, overconfident: entropy_sample-50 minus all |")
    assert "1 contradicted here, 1 not supported (1 too noisy to say)" in line


def test_sensitivity_tells_a_verdict_that_hangs_on_the_rate() -> None:
    def at_double(cell: Cell, name: str) -> float:
        is_late = cell.kind == "arm" and cell.learning_rate == 2 * RATE
        return as_claimed(cell, name) - 0.3 * (is_late and cell.arm == "random-50")

    found = claims.published(all_records(BRIEF, at_double), BRIEF)["sensitivity"]
    t4 = next(e for e in found if e["claim"] == "T4" and "overconfident" in e["label"])
    verdicts = {factor: c["verdict"] for factor, c in t4["at"].items()}
    assert verdicts == {"0.5": "supported", "1.0": "supported", "2.0": "contradicted here"}
    assert {e["claim"] for e in found} >= {"T1", "T2", "T3", "T4", "E1", "E2", "E3"}
