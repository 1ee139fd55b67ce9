"""Pages of the claims benchmark from the published JSON alone, and controls that can fail."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from claims_records import BRIEF, RATE, all_records, level, made_up_choices
from scipy import stats

import claims
import claims_controls
import claims_statistics
from claims_controls import Trial, controls, drawn, rates, share_with_interval
from claims_design import QUICK, Cell, Controls
from claims_figures import draw_all
from claims_markdown import signed
from claims_page import _controls, _expected, page, shown
from claims_rules import CLAIMS
from claims_why import _explained, why_page
from tutelage.evaluation.metrics import Interval


@pytest.fixture(scope="module", autouse=True)
def few_resamples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims_statistics, "NUM_RESAMPLES", 50)
        patch.setattr(claims_controls, "NUM_DRAWS", 10)
        short = partial(claims_statistics.correlation_intervals, num_resamples=5)
        patch.setattr("claims_table.correlation_intervals", short)
        claims_statistics._weights.cache_clear()
        yield
    claims_statistics._weights.cache_clear()


def mixed(cell: Cell, name: str) -> float:
    """Entropy sampling is worse than all tokens in one setting, and scattered in the other."""
    is_late = cell.kind == "arm" and cell.learning_rate == 2 * RATE
    if name == "mean" and cell.arm == "all" and is_late:
        return 0.9
    if (cell.arm, name) != ("entropy_sample-50", "mean"):
        return level(cell, name)
    return 0.2 if cell.setting == "overconfident" else 0.5 + 0.1 * (-1) ** cell.seed


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return claims.published(all_records(BRIEF, mixed), BRIEF)


def test_the_page_is_made_from_the_json_alone(results: dict[str, Any]) -> None:
    text = json.dumps(results)
    made = page(json.loads(text))
    for name, claim in CLAIMS.items():
        assert f"### {name}\n" in made
        assert claim.text in made
        assert claim.source in made
        assert f"images/claims-{name}.svg" in made
    assert "Q3 is made, in both tasks" in made
    assert "50 % of its tokens are in Q3 and hold 50 % of the reverse KL" in made
    assert "says nothing about large models" in made
    assert not re.search(r"\bnan\b|\binf\b|[{}]", made)
    order = ("## Verdicts", "## Against what was published", "## Read this first", "### T1")
    places = [made.index(head) for head in order]
    assert places == sorted(places)
    assert text == json.dumps(json.loads(claims.as_text(results)))


def test_the_page_names_contradictions_changes_and_what_is_noise(results: dict[str, Any]) -> None:
    claim = results["claims"]["T1"]
    verdicts = {**claim["verdicts"], "coins": "not supported"}
    assert verdicts == dict.fromkeys(("scarce", "coins"), "not supported") | {
        "overconfident": "contradicted here"
    }
    assert claim["agreement"] == "contradicted in part"
    assert [c["reading"] for c in claim["comparisons"]][:2] == ["decided", "too noisy to say"]
    made = page(results)
    assert "**contradicted** in `overconfident`; not supported in `scarce`" in made
    assert "* [T1](#t1) in overconfident: supported, now contradicted here." in made
    assert "* [T1](#t1) in scarce" not in made


def test_sensitivity_tells_a_verdict_that_hangs_on_the_rate(results: dict[str, Any]) -> None:
    found = {e["label"]: e for e in results["sensitivity"]}
    entry = found["mean@8, overconfident: probability_gap-20 minus all"]
    verdicts = {factor: c["verdict"] for factor, c in entry["at"].items()}
    assert verdicts["2.0"] == "contradicted here" != verdicts["1.0"]
    assert {e["claim"] for e in results["sensitivity"]} >= {"D1", "D3", "E1", "E3"}


def test_the_page_of_choices_names_what_rules_prefer(results: dict[str, Any]) -> None:
    made = why_page(json.loads(json.dumps(results)))
    line = next(line for line in made.splitlines() if line.startswith("| `soft_or` | 20 %"))
    assert "| `7` 2.0 · `↵` 0.5 · `a¦` 0.5 | `(start)` 1.0 · `7` 1.0 |" in line
    assert "agree most (30 %)" in made
    moved = next(line for line in made.splitlines() if line.startswith("| `soft_or-20+sampled`"))
    assert moved.split(" | ")[2:6] == ["20 %", "25 % → 50 %", "40 % → 40 %", "100 %"]
    setting = results["design"]["choice_settings"][0]
    gain = results["arms"][setting]["soft_or-20+sampled"]["minus_all"]["mean"]
    assert moved.split(" | ")[1] == signed([100 * x for x in gain])
    assert not re.search(r"\bnan\b|\binf\b|[{}]", made)


def test_the_page_of_choices_has_the_real_model_too(results: dict[str, Any]) -> None:
    cell = Cell("arm", "overconfident", "start", 1, RATE, 1, 1)
    arms = {"start": made_up_choices(cell), "gap-20": made_up_choices(replace(cell, arm="gap-20"))}
    found = {"stories/cpu": {"task": "stories", "num_prompts": 96, "seed": 1, "arms": arms}}
    made = why_page(results, found)
    assert made.startswith(why_page(results).rstrip("\n"))
    _, _, there = made.partition("## SmolLM2-135M, `stories`")
    assert "96 problems" in there
    assert "| `gap-20` | 20 % | 25 % → 50 % |" in there


def test_the_quick_page_says_that_it_is_no_evidence(results: dict[str, Any]) -> None:
    quick = {**results, "design": {**results["design"], "name": "quick"}}
    assert "too few seeds" in page(quick)
    assert "too few seeds" not in page(results)
    places = (claims.results_file(QUICK), claims.page_folder(QUICK), claims.working_file(QUICK))
    assert all(path.is_relative_to(claims.ROOT / "runs") for path in places)


@pytest.mark.slow
def test_the_same_json_draws_the_same_figures(results: dict[str, Any], tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        draw_all(json.loads(json.dumps(results)), tmp_path / folder)
    drawn = sorted(tmp_path.glob("a/*.svg"))
    assert len(drawn) == len(CLAIMS) + 1
    assert all(f.read_bytes() == (tmp_path / "b" / f.name).read_bytes() for f in drawn)


def test_a_run_that_was_cut_off_has_a_page_that_says_so() -> None:
    design = replace(BRIEF, arms={"overconfident": ("all", "all+sampled"), "scarce": ("all",)})
    records = all_records(design, level)
    short = {
        key: r for key, r in records.items() if r["kind"] != "control" and r["arm"] != "teacher"
    }
    made = page(
        json.loads(json.dumps(claims.published(short, replace(design, sensitivity_arms={}))))
    )
    assert "**Cut short**: 20 runs are missing" in made
    assert "Not run: arms were not compared with themselves." in made
    assert "**not run**" in made


# --- controls -------------------------------------------------------------------------------------


def false_rate(values: torch.Tensor, test: str, num_comparisons: int) -> list[float]:
    trials = [t for t in drawn("all", "mean", values, 4) if t.num_comparisons == num_comparisons]
    found: list[float] = rates(trials, len(values), 2)[test]
    return found


def test_controls_find_a_procedure_that_is_wrong_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(24, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    monkeypatch.setattr(claims_controls, "NUM_DRAWS", 60)
    honest = {n: false_rate(values, "beats", n) for n in (1, 2, 4)}

    def too_narrow(x: torch.Tensor) -> Interval:
        found = claims_statistics.mean_interval(x)
        return Interval(found.value, found.value - 1e-6, found.value + 1e-6)

    monkeypatch.setattr(claims_controls, "mean_interval", too_narrow)
    wrong = {n: false_rate(values, "beats", n)[0] for n in (1, 2, 4)}
    assert max(share for share, _, _ in honest.values()) < 0.3
    assert all(low <= share <= high for share, low, high in honest.values())
    # Of several comparisons with one baseline, one supported and one contradicted make neither.
    assert wrong[1] == 1.0 > wrong[2] > wrong[4] > 0.1
    assert false_rate(values, "matches", 1)[0] == pytest.approx(0.5, abs=0.2)


def test_groups_of_a_draw_share_no_cell_and_a_claim_needs_all_comparisons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A group's values are its first cell's number, so that the intervals tell the groups."""
    seen: list[torch.Tensor] = []

    def first(gaps: torch.Tensor) -> Interval:
        seen.append(gaps)
        return Interval(float(gaps[0, 0]), float(gaps[0, 0]), float(gaps[0, 0]))

    monkeypatch.setattr(claims_controls, "mean_interval", first)
    values = torch.arange(20.0, dtype=torch.float64)[:, None].expand(20, 3)
    trials = drawn("all", "mean", values, 4)
    assert trials == drawn("all", "mean", values, 4)
    assert [t.num_comparisons for t in trials[:3]] == [1, 2, 4]
    assert all(len(t.cells) == 4 * (1 + t.num_comparisons) for t in trials)
    assert len({t.cells for t in trials if t.num_comparisons == 1}) > 5
    for one, two, four, draw in zip(
        trials[::3], trials[1::3], trials[2::3], range(10), strict=True
    ):
        gaps = [float(g[0, 0]) for g in seen[4 * draw : 4 * draw + 4]]
        for trial in (one, two, four):
            ahead = [gap > 0 for gap in gaps[: trial.num_comparisons]]
            assert trial.is_wrong("beats") == (len(set(ahead)) == 1)
        assert one.cells < two.cells < four.cells
    assert {t.num_comparisons for t in drawn("all", "mean", values[:12], 4)} == {1, 2}
    assert drawn("all", "mean", values[:7], 4) == []
    same = {"beats": "not supported", "matches": "supported"}
    assert not Trial("all", "mean", 4, 1, frozenset(), same).is_wrong("beats")  # type: ignore[arg-type]


def test_what_goes_with_a_good_end_is_the_correlation_of_each_seed() -> None:
    def cell(arm: str, seed: int, kl_kept: float, mean: float) -> dict[str, Any]:
        return {
            "kind": "arm",
            "setting": "s",
            "arm": arm,
            "seed": seed,
            "learning_rate": 1e-3,
            "kl_kept": kl_kept,
            "tokens_trained": 5 - 4 * kl_kept,
            "mean": mean,
        }

    arms = ("random-20", "q3-20", "soft_or-20", "divergence-20")
    best_first = [cell(arm, seed, n / 4, n / 8) for seed in (1, 2) for n, arm in enumerate(arms)]
    others = [
        cell(arm, 1, 0.0, 1.0) for arm in ("all", "eopd", "soft_or-20+sampled", "ida+sampled")
    ]
    at_another_rate = [cell(arm, 1, n / 4, -n) for n, arm in enumerate(arms)]
    for one in at_another_rate:
        one["learning_rate"] = 2e-3
    text = _explained("s", [*best_first, *others, *at_another_rate], 1e-3)
    assert "Over the 4 arms" in text
    assert "is 1.00 [1.00, 1.00], with the number of tokens trained −1.00 [−1.00, −1.00]" in text
    assert "the first minus the second 2.00 [2.00, 2.00]. Mean over 2 seeds" in text


def test_no_rate_is_over_metrics_that_no_claim_asks_the_test_of() -> None:
    """Groups match in entropy, and differ in accuracy: claims ask *matches* of the latter alone."""
    assert claims_controls.ASKED["matches"] == {"mean"}
    assert claims_controls.ASKED["beats"] >= {"mean", "pass", "entropy"}
    everywhere = dict.fromkeys(("beats", "matches"), "supported")
    nowhere = dict.fromkeys(("beats", "matches"), "contradicted here")
    trials = [
        Trial("all", metric, 4, 1, frozenset(range(n, n + 8)), verdicts)  # type: ignore[arg-type]
        for metric, verdicts in (("entropy", everywhere), ("mean", nowhere))
        for n in range(3)
    ]
    both = rates(trials, 20, 2)
    assert (both["matches"][0], both["matches_confirmed"]) == (1.0, 0.0)
    of_entropy = rates(trials[:3], 20, 2)
    assert (of_entropy["matches"], of_entropy["matches_confirmed"]) == (None, None)
    assert of_entropy["beats"][0] == 1.0


def test_a_claim_with_a_contradicted_part_is_told_from_other_undecided_ones() -> None:
    def part(group: str, verdict: str) -> dict[str, str]:
        return {"group": group, "verdict": verdict}

    parts = [part("a", "supported"), part("a", "contradicted here"), part("b", "supported")]
    claim = {
        "verdicts": {"a": "not supported", "b": "not supported", "c": "contradicted here"},
        "comparisons": [*parts, part("b", "not supported"), part("c", "contradicted here")],
    }
    assert shown(claim) == {
        "a": "not supported, a part contradicted",
        "b": "not supported",
        "c": "contradicted here",
    }


def test_only_verdicts_with_the_test_can_be_false_by_its_rate() -> None:
    def part(group: str, test: str) -> dict[str, str]:
        return {"group": group, "test": test}

    claims = {
        "T1": {"comparisons": [part("a", "beats"), part("a", "beats"), part("b", "matches")]},
        "T2": {"comparisons": [part("a", "matches"), part("a", "beats")]},
    }
    tables = [{"all": [{"beats": [0.5, 0.0, 1.0]}, {"beats": [0.25, 0.0, 1.0]}]}]
    assert _expected(tables, claims).startswith("0.5 to 1.0 of the 2 verdicts with a test *beats*")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--judge", r"has 0 of the \d+ cells that rates are tuned by, of source .*Run without"),
        ("--page", r"There is no .*\.json\. Run without --judge and --page first"),
    ],
)
def test_what_was_not_run_is_neither_judged_nor_shown(
    option: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "working_file", lambda design: tmp_path / "cells.jsonl")
    monkeypatch.setattr(claims, "results_file", lambda design: tmp_path / "claims.json")
    monkeypatch.setattr("sys.argv", ["claims.py", "--quick", option])
    with pytest.raises(SystemExit, match=message):
        claims.main()
    assert list(tmp_path.iterdir()) == []


def test_a_share_of_nothing_has_the_exact_binomial_interval() -> None:
    cells = [frozenset({i, i + 1}) for i in range(9)]
    bound = stats.binomtest(0, 5).proportion_ci(method="exact").high
    never = share_with_interval([(c, False) for c in cells], 10, 5)
    always = share_with_interval([(c, True) for c in cells], 10, 5)
    assert never == pytest.approx([0.0, 0.0, bound])
    assert always == pytest.approx([1.0, 1 - bound, 1.0])
    everything = frozenset(range(10))
    assert share_with_interval([(everything, True), (everything, False)], 10, 1) == [0.5, 0.0, 1.0]


def test_controls_have_a_table_for_each_setting_that_was_run() -> None:
    """Groups of as many seeds as verdicts rest on, or half of the cells where these are fewer."""
    several = (Controls("scarce", ("all", "random-10"), 12), Controls("coins", ("all",), 5))
    design = replace(BRIEF, seeds=(1, 2, 3), controls=several)
    records = [
        {"kind": "control", "setting": c.setting, "arm": arm, "seed": seed}
        | {"problems": {m: [0.5, 0.25] for m in claims_controls.METRICS}}
        for c in several
        for arm in c.arms
        for seed in c.seeds
    ]
    found = controls(records, design)
    keys = ("group_size", "num_comparisons", "num_disjoint")
    assert [[tuple(row[k] for k in keys) for row in table["all"]] for table in found] == [
        [(3, 1, 4), (3, 2, 2)],
        [(2, 1, 1)],
    ]
    assert len(found[0]["rows"]) == 2 * 2 * len(claims_controls.METRICS)
    assert {row["beats"][0] for row in found[0]["rows"]} == {0.0}
    assert [table["setting"] for table in controls(records[:-1], design)] == ["scarce"]
    assert controls([], design) == []
    shown = _controls(json.loads(json.dumps(found)))
    assert "In `scarce`, 12 seeds an arm" in shown
    assert "In `coins`, 5 seeds an arm" in shown
    # both arms have the same seeds: their four disjoint draws count as two trials, not as four
    assert "| 1 | 4 | 3 | 0.0 [0.0, 84.2] % | 0.0 [0.0, 84.2] % | 100 % |" in shown


@pytest.mark.slow
def test_the_interval_of_a_rate_covers_it_though_pairs_share_cells() -> None:
    """Normal cells; a pair is wrong where the mean of its paired differences is far from 0."""
    num_cells, size = 60, 6

    def once(seed: int) -> list[float]:
        cells = torch.randn(num_cells, generator=torch.Generator().manual_seed(seed))
        rng = random.Random(seed)
        pairs = []
        for _ in range(400):
            drawn = rng.sample(range(num_cells), 2 * size)
            gaps = cells[drawn[:size]] - cells[drawn[size:]]
            pairs.append((frozenset(drawn), bool(gaps.mean().abs() > gaps.std())))
        return share_with_interval(pairs, num_cells, num_cells // (2 * size))

    found = [once(seed) for seed in range(60)]
    truth = sum(share for share, _, _ in found) / len(found)
    hits = sum(low <= truth <= high for _, low, high in found)
    assert hits / len(found) >= 0.9
    assert sum(high - low for _, low, high in found) / len(found) < 0.12
