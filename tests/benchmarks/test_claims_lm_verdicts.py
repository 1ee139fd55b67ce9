"""The claims on a real language model: verdicts, power and the page from made-up cells."""

from __future__ import annotations

import pytest
import torch
from claims_lm_records import LAST, RATES, SCALE, record, records, results_of
from scipy import stats

import claims_lm_published
import claims_lm_rules
from claims_lm_design import Cell
from claims_lm_page import _verdict, page
from claims_lm_table import (
    controls,
    detectable,
    judge,
    places,
    power,
    rates_of,
    summary,
    tables,
    tuned,
)
from claims_verdicts import MARGIN, beats, matches
from tutelage.evaluation.metrics import Interval


def test_verdicts_follow_the_rules() -> None:
    found = records(start=0.1, gap_20=0.5, random_10=0.2, stored=0.3)
    exact, sampled = tables(found)
    assert (exact.loss, sampled.loss) == ("exact", "sampled")
    verdicts = {name: one["verdict"] for name, one in judge(exact).items()}
    assert verdicts["D1"] == verdicts["D4"] == verdicts["D5"] == "supported"
    assert verdicts["F1"] == "contradicted here"
    assert verdicts["O1"] == "supported"
    assert verdicts["T1"] is verdicts["I1"] is None  # their arms were not run
    text = page(results_of(found))
    assert "**contradicted here**" in text
    assert "settings disagree" not in text.split("## Verdicts")[0]


def test_nothing_matches_where_all_tokens_gain_nothing() -> None:
    """A match says something only where the loss certainly gains more than the margin."""
    for start, verdict, gained in ((0.39, "cannot tell", "+1.0"), (0.3, "supported", "+10.0")):
        found = records(start=start)
        judged = judge(tables(found)[0])
        assert judged["F1"]["verdict"] == judged["D3"]["verdict"] == verdict
        text = page(results_of(found))
        assert ("**cannot tell** (nothing to lose)" in text) == (verdict == "cannot tell")
        assert f"stories, exact loss (cpu): {gained} [" in text
    lost = judge(tables(records(start=0.39, stored=0.3))[0])
    assert lost["F1"]["verdict"] == "contradicted here"  # what is certainly worse stays so


def test_the_page_names_contradictions(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = {"coins, sampled loss": "supported"}
    there = {"F1": sampled, "D1": sampled, "T1": {"coins": "x"}}
    monkeypatch.setattr(claims_lm_published, "embedded", lambda: there)
    judged = {"s, sampled loss": judge(tables(records(start=0.1, gap_20=0.5, stored=0.3))[0])}
    lines = claims_lm_published.against(judged).splitlines()
    rows = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| ")}
    assert "**contradicted** in `s, sampled loss`" in rows["F1"]
    differs = (
        "**differs from the paper** with the sampled loss; **differs from the embedded tasks**"
    )
    assert differs in rows["F1"]
    assert "14 of 17 pairs" in rows["F1"]  # the number of the paper
    agrees = "agrees with the paper with the sampled loss; agrees with the embedded tasks"
    assert agrees in rows["D1"]
    assert "differs" not in rows["T1"]  # was not run here
    assert "not in the results" in rows["D5"]
    assert set(rows) >= set(claims_lm_rules.CLAIMS)


def test_words_for_verdicts_that_differ() -> None:
    yes, no, undecided = "supported", "contradicted here", "not supported"

    def words(exact: str, sampled: str, *there: str, name: str = "O1", loss: str = "") -> str:
        here = {"s, exact loss (cpu)": exact, "s, sampled loss (cpu)": sampled}
        places = {f"place {number}{loss}": verdict for number, verdict in enumerate(there)}
        return claims_lm_published.in_words(name, here, places)

    assert claims_lm_published.in_words("O1", {}, {"a": yes}) == "not run here"
    assert words(yes, undecided, yes) == (
        "agrees with the paper with the exact loss; agrees with the embedded tasks"
    )
    assert words(yes, undecided, name="D2") == (
        "agrees with the paper with the exact loss, but not decided with the sampled loss, which "
        "is the paper's"
    )
    assert words(undecided, yes, name="D2") == "agrees with the paper with the sampled loss"
    assert words(undecided, "cannot tell", no) == (
        "undecided here, neither for nor against the paper; decided in some of the embedded "
        "settings"
    )
    assert words(undecided, undecided, undecided).endswith("the embedded tasks do not decide it")
    assert words(yes, yes, undecided) == (
        "agrees with the paper with the exact and the sampled loss; the embedded tasks do not "
        "decide it"
    )
    assert "in some settings" in words(yes, undecided, yes, no)
    assert words(yes, undecided, yes, loss=", sampled loss").endswith(
        "; the embedded tasks decide it with the other loss alone"
    )
    assert words(no, yes, yes, loss=", sampled loss").endswith("; agrees with the embedded tasks")
    assert words(yes, no) == (
        "agrees with the paper with the exact loss and **differs from the paper** with the sampled "
        "loss"
    )
    assert words(yes, undecided, name="D5") == "decided here; no paper says it in this form"
    assert words(undecided, undecided, name="D5") == "undecided here"


def test_only_an_undecided_verdict_says_why() -> None:
    def cell(verdict: str | None, *parts: tuple[str, str]) -> str:
        comparisons = [{"verdict": v, "reading": why, "num_seeds": 6} for v, why in parts]
        return _verdict({"verdict": verdict, "comparisons": comparisons})

    no, noisy = ("contradicted here", "decided"), ("not supported", "too noisy to say")
    yes = ("supported", "decided")
    assert cell("contradicted here", no, noisy) == "**contradicted here**"
    assert cell("supported", yes) == "**supported**"
    assert cell("not supported", noisy) == "**not supported** (too noisy to say)"
    assert cell("not supported", yes, no) == "**not supported** (a part contradicted)"
    assert cell(None, noisy) == "not judged (6 seeds)"
    assert cell(None) == "not run"


def test_the_page_says_what_is_missing() -> None:
    found = records()
    text = page(results_of(found))
    assert "No pair of GSM8K was run" in text
    assert "No cell was run on a GPU" in text
    assert "`eopd`" in text
    assert "`gap-20`" not in text.split("## Verdicts")[0]
    gpu = {**found[-1], "task": "gsm8k", "arm": "eopd", "scale": "gpu"}
    gpu["key"] = gpu["key"].replace("/cpu/pair", "/cuda/other")
    there = page(results_of([*found, gpu]))
    assert "No pair of GSM8K was run" not in there
    assert "are in no table" not in text + there
    old = {**found[-1], "rate": found[-1]["rate"] / 2}
    assert "1 more are in no table" in page(results_of([*found, old]))
    assert "No cell was run on a GPU" not in there
    assert "`eopd`" not in there.split("## Verdicts")[0]


def test_rates_at_an_end_of_the_grid_are_flagged() -> None:
    found = records()
    assert "its best may lie" not in page(results_of(found))
    ends = ((SCALE.grid[0], "lowest", "below"), (SCALE.grid[-1], "highest", "above"))
    for rate, which, side in ends:
        ended = [
            {**r, "reverse_kl": 0.0}
            if (r["kind"], r["loss"], r["rate"]) == ("tune", "exact", rate)
            else r
            for r in found
        ]
        text = page(results_of(ended))
        assert text.count("its best may lie") == 1
        assert f"loss (cpu)` takes the {which} rate of the grid: its best may lie {side}" in text


def test_a_claim_without_all_seeds_is_not_judged() -> None:
    found = [r for r in records(gap_20=0.5) if (r["arm"], r["seed"]) != ("gap-20", LAST)]
    one = judge(tables(found)[0])["D1"]
    assert one["verdict"] is None
    assert [c["num_seeds"] for c in one["comparisons"]] == [LAST - 1]
    text = page(results_of(found))
    assert f"not judged ({LAST - 1} seeds)" in text
    assert "exact gap-20 (1)" in text


def test_no_claim_is_judged_where_what_there_is_to_lose_is_not_known() -> None:
    found = [r for r in records(gap_20=0.5) if (r["arm"], r["seed"]) != ("start", LAST)]
    assert {one["verdict"] for one in judge(tables(found)[0]).values()} == {None}


def test_cells_at_other_rates_or_of_other_pairs_are_not_compared() -> None:
    found = records()
    other = [{**r, "key": r["key"].replace("/pair", "/other"), "source": "t"} for r in found[:9]]
    strange = record(Cell("arm", "stories", "cpu", "exact", "all", 1, 0.5), 1.0)
    assert len(places([*found, *other])) == 1
    table = tables([*found, *other, strange])[0]
    assert table.values("all", "mean", (1,)).max() < 0.5


def test_rates_wait_for_the_whole_grid() -> None:
    found = records()
    place = places(found)[0]
    assert rates_of(tuned(found, place)) == RATES
    lacking = rates_of(tuned(found[1:], place))
    assert lacking == {loss: rate for loss, rate in RATES.items() if loss != "exact"}


def test_the_page_says_what_each_test_needs() -> None:
    """The differences that it names are those at which the tests change their verdict."""
    found = records()
    text = page(results_of(found))
    for table in tables(found):
        seen = power(table)
        assert seen is not None
        h = seen["mean"]["half_width"]
        row = f"above {100 * h:+.1f} points | above {100 * (h - MARGIN):+.1f} points"
        assert row.replace("-", "−") in text
    h, little = 0.055, 1e-6
    for value, better, match in (
        (h + little, "supported", "supported"),
        (h - little, "not supported", "supported"),
        (h - MARGIN + little, "not supported", "supported"),
        (h - MARGIN - little, "not supported", "not supported"),
        (-h - little, "contradicted here", "not supported"),
        (-h - MARGIN - little, "contradicted here", "contradicted here"),
    ):
        interval = Interval(value, value - h, value + h)
        assert (beats(interval), matches(interval)) == (better, match)


def test_power_and_controls() -> None:
    table = tables(records())[0]
    seen = power(table)
    assert seen is not None
    mean = seen["mean"]
    size = mean["detectable"] * 6**0.5 / mean["paired_sd"]
    assert size == pytest.approx(detectable(0.975, 6))
    assert [c["is_false_positive"] for c in controls(table)] == [False] * 4
    shifted = [
        record(Cell(**{name: r[name] for name in _NAMES}), 0.6) if r["seed"] > 10 else r
        for r in records()
    ]
    assert all(c["is_false_positive"] for c in controls(tables(shifted)[0]))


@pytest.mark.parametrize(("level", "num_seeds"), [(0.95, 3), (0.975, 6)])
def test_a_detectable_difference_is_found_in_four_of_five_cases(
    level: float, num_seeds: int
) -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(40_000, num_seeds, generator=generator, dtype=torch.float64)
    errors = values.std(1) / num_seeds**0.5
    means = values.mean(1) + detectable(level, num_seeds) / num_seeds**0.5
    reach = float(stats.t.ppf((1 + level) / 2, num_seeds - 1))
    found = ((means / errors).abs() > reach).double().mean()
    assert float(found) == pytest.approx(0.8, abs=0.01)  # five standard errors


def test_shares_stay_shares_and_one_seed_has_no_interval() -> None:
    found = records(teacher=0.9)
    for one in found:
        if (one["arm"], one["loss"]) == ("gap-20", "exact"):
            one["problems"]["mean"] = [float(one["seed"] == 1)] * 5
    rows = summary(tables(found)[0])
    value, low, high = rows["gap-20"]["mean"]
    assert (value, low) == (pytest.approx(1 / LAST), 0.0)
    assert value < high <= 1.0
    assert rows["teacher"]["mean"][1:] == [None, None]


_NAMES = ("kind", "task", "scale", "loss", "arm", "seed", "rate")
