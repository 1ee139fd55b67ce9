"""The claims benchmark: rules that can fail, arms that are paired, intervals that cover."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import claims
import claims_design
from claims_design import FULL, QUICK, Cell, Design, cells, config_of, tuning_cells
from claims_figures import draw_all
from claims_page import page
from claims_probe import OSCILLATION_RATES, SCORES, bias, probe
from claims_statistics import correlation_intervals, mean_interval, pearson, spearman
from claims_table import PER_PROBLEM, PER_SEED, Table
from claims_verdicts import CLAIMS, TESTS, Verdict, judge, overall
from claims_work import do, fresh, graded, hidden_start
from tutelage.data.types import Prompt, Rollout
from tutelage.evaluation.evaluate import Evaluation
from tutelage.evaluation.metrics import Interval
from tutelage.run.parse import changed_keys, to_table

ORDER = ["contradicted here", "not supported", "supported"]
RATE = 1e-3
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


def record(cell: Cell, quality: Quality) -> dict[str, Any]:
    """A finished cell whose figures are `quality` and a little noise."""
    rng = random.Random(cell.key)
    found: dict[str, Any] = {"key": cell.key, **asdict(cell), "seconds": 1.0, "commit": "c" * 40}

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
        case "bias":
            for form in ("start", "full", "tail", "renorm"):
                for figure in ("entropy", "forward_kl"):
                    found[f"{figure}_{form}"] = noisy(f"{figure}_{form}")
        case _:
            found["problems"] = {name: [noisy(name) for _ in range(6)] for name in PER_PROBLEM}
            found["mean"] = sum(found["problems"]["mean"]) / 6
            found |= {name: noisy(name) for name in PER_SEED}
    return found


def all_records(design: Design, quality: Quality) -> dict[str, dict[str, Any]]:
    work = [*tuning_cells(design), *cells(design, RATE)]
    return {cell.key: record(cell, quality) for cell in work}


FAVOURED = ("soft_or", "q3", "entropy_sample", "random-50", "eopd", "flat")
"""Arms and things that the claims want to be ahead."""


def as_claimed(cell: Cell, name: str) -> float:
    """A world in which every claim holds."""
    if name == "q3_kept_first":
        return 0.9 if cell.arm.startswith("soft_or") else 0.1
    if cell.kind in ("arm", "tune"):
        sign = -1 if name == "high_forward_kl" else 1
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
    records = all_records(FULL, world)
    results = claims.published(records, FULL)
    verdicts = {name: claim["verdict"] for name, claim in results["claims"].items()}
    assert verdicts == dict.fromkeys(CLAIMS, expected)


def test_a_claim_whose_arms_are_missing_is_not_supported() -> None:
    work = [c for c in cells(FULL, RATE) if c.arm not in ("entropy_sample-50", "eopd")]
    table = Table([record(c, as_claimed) for c in work], FULL.seeds, RATE)
    assert not table.has("overconfident", "entropy_sample-50", "all")
    with pytest.raises(KeyError):
        judge(table, {})


# --- arms are paired ------------------------------------------------------------------------------


@pytest.mark.parametrize("design", [FULL, QUICK], ids=lambda d: d.name)
def test_arms_of_a_setting_and_seed_differ_in_the_method_alone(design: Design) -> None:
    work = [c for c in cells(design, RATE) if c.kind == "arm"]
    assert len({c.key for c in work}) == len(work)
    reference = {
        (c.setting, c.seed, c.learning_rate): to_table(config_of(c)) for c in work if c.arm == "all"
    }
    for cell in work:
        other = reference[cell.setting, cell.seed, cell.learning_rate]
        keys = changed_keys(other, to_table(config_of(cell)))
        assert all(key.split(".")[0] in ("selection", "objective") for key in keys)


def test_every_rule_and_budget_of_the_issue_is_an_arm() -> None:
    arms = FULL.arms["overconfident"]
    assert len(FULL.seeds) >= 5
    for rule in claims_design.RULES:
        assert all(f"{rule}-{percent}" in arms for percent in (50, 20, 10))
    assert {"all", "bottom-50", "eopd", "eopd_sampled", "opd_sampled", "q3-10+eopd"} <= set(arms)


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
    for name in first:
        assert len({r[name] for r in records.values()}) == 1
    assert len({r["weights"] for r in records.values()}) == 3
    assert records["random-10"]["tokens_trained"] < records["all"]["tokens_trained"] / 5
    assert do(cell) == records["all"]
    other = do(replace(cell, seed=8))
    assert other["training_reverse_kl_first"] != records["all"]["training_reverse_kl_first"]


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
    parts = fresh(cell)
    before = [p.clone() for p in parts.student.parameters()]
    tokens = probe(parts, config_of(cell), 4)["tokens"]
    assert all(torch.equal(a, b) for a, b in zip(before, parts.student.parameters(), strict=True))
    assert len(tokens["decrease"]) == 4
    assert any(tokens["decrease"])
    assert min(tokens["gradient"]) > 0


# --- grading and toys -----------------------------------------------------------------------------


def test_hidden_starts_are_spread_and_counted() -> None:
    prompts = [Prompt(f"p{i}", "e4+7;j7-6;n3+7;m0-6;b9*7;>", "0") for i in range(400)]
    letters = [hidden_start(p) for p in prompts]
    assert set(letters) == set("ejnmb")
    assert all(letters.count(x) > 50 for x in "ejnmb")
    wanted = letters[0]
    other = next(x for x in "ejnmb" if x != wanted)
    texts = [wanted, wanted, other, other, other, other, wanted, wanted]
    rollouts = [Rollout(prompts[0], i, (1,), (ord(t), i // 2), text=t) for i, t in enumerate(texts)]
    verdicts: list[bool | None] = [True] * 6 + [False] * 2
    found = graded(Evaluation(None, None, 1, 8, rollouts, verdicts))
    assert found == {
        "mean": [0.75],
        "pass": [1.0],
        "hidden_mean": [0.25],
        "hidden_pass": [1.0],
        "distinct": [3.0],
    }


def test_the_toy_tells_a_biased_objective_from_an_unbiased_one() -> None:
    found = bias(9)
    assert abs(found["entropy_full"] - found["teacher_entropy"]) < 0.01
    assert found["forward_kl_full"] < 0.01 < found["forward_kl_start"]


# --- statistics -----------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=3, max_size=30), st.randoms(use_true_random=False))
def test_correlations_are_those_of_scipy(x: list[int], rng: random.Random) -> None:
    y = [rng.randrange(4) for _ in x]
    a, b = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert spearman(a, b) == pearson(a, b) == 0.0
        return
    assert pearson(a, b) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-9)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)


def coverage(interval: Callable[[torch.Tensor], Interval], with_problems: bool = True) -> float:
    """How often an interval of 5 seeds holds the true mean 0."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hits = 0
    for _ in range(200):
        values = 1.5 * normal(5, 1)
        if with_problems:
            values = values + 4 * normal(1, 60) + 10 * normal(5, 60)
        found = interval(values)
        hits += found.low <= 0 <= found.high
    return hits / 200


def pooled(values: torch.Tensor) -> Interval:
    """The negative control: all values as if they were independent."""
    half = 1.96 * float(values.std()) / values.numel() ** 0.5
    return Interval(float(values.mean()), float(values.mean()) - half, float(values.mean()) + half)


def test_intervals_cover_and_pooling_would_not() -> None:
    assert coverage(mean_interval) >= 0.92
    assert coverage(mean_interval, with_problems=False) >= 0.9
    assert coverage(pooled) < 0.85


def test_correlation_differences_use_the_same_tokens_on_both_sides() -> None:
    rng = random.Random(0)
    target = [rng.random() for _ in range(60)]
    noisy = [t + rng.gauss(0, 0.3) for t in target]
    twins = {"soft_or": noisy, "twin": noisy, "random": [rng.random() for _ in target]}
    whole, gaps = correlation_intervals(twins, target, "spearman", 100)
    assert (gaps["twin"].low, gaps["twin"].high) == (0.0, 0.0)
    assert gaps["random"].low > 0
    assert whole["soft_or"].value == pytest.approx(stats.spearmanr(noisy, target).statistic)


# --- files ----------------------------------------------------------------------------------------


def test_a_torn_line_is_done_again_and_finished_cells_are_not(tmp_path: Path) -> None:
    work = cells(QUICK, RATE)[:3]
    lines = [json.dumps(record(cell, as_claimed)) for cell in work]
    path = tmp_path / "cells.jsonl"
    path.write_text("\n".join(lines) + "\n" + lines[0][: len(lines[0]) // 2], encoding="utf-8")
    assert set(claims.finished(path)) == {cell.key for cell in work}
    assert set(claims.complete(work, path, num_workers=0)) == {cell.key for cell in work}
    path.write_text(lines[0] + "\n" + lines[1][:-20], encoding="utf-8")
    assert set(claims.finished(path)) == {work[0].key}


def test_the_learning_rate_is_the_best_of_the_grid_and_the_smaller_of_equals() -> None:
    work = tuning_cells(FULL)
    best = {2e-3: 0.9, 4e-3: 0.9}
    records = {c.key: {"mean": best.get(c.learning_rate, 0.5)} for c in work}
    assert claims.tuned_rate(records, FULL)[0] == 2e-3


def test_the_page_is_made_from_the_json_alone(tmp_path: Path) -> None:
    results = claims.published(all_records(FULL, as_claimed), FULL)
    text = json.dumps(results)
    made = page(json.loads(text))
    for name, claim in CLAIMS.items():
        assert f"### {name}\n" in made
        assert claim in made
        assert f"images/claims-{name}.svg" in made
    assert "creates Q3 by construction" in made
    assert "says nothing about large models" in made
    assert "nan" not in made.replace("nats", "")
    widths = {line.count("|") for line in made.splitlines() if line.startswith("| `all`")}
    assert len(widths) == 2  # the tables of arms, and the one of learning rates
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        draw_all(json.loads(text), tmp_path / folder)
    drawn = sorted(tmp_path.glob("a/*.svg"))
    assert len(drawn) == len(CLAIMS) + 1
    assert all(f.read_bytes() == (tmp_path / "b" / f.name).read_bytes() for f in drawn)


def test_the_quick_page_says_that_it_is_no_evidence() -> None:
    results = claims.published(all_records(QUICK, as_claimed), QUICK)
    assert "too few seeds" in page(json.loads(json.dumps(results)))
