"""The claims on a real language model: cells that can be continued, verdicts, power, the page."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

import claims_lm
import claims_lm_design as design
import claims_lm_published
import claims_lm_rules
from claims_choices import COMPARED_RULES
from claims_lm_design import SCALES, Cell, Pair, cells, tuning_cells
from claims_lm_page import page
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
from claims_lm_work import do, problems_of
from claims_verdicts import MARGIN, beats, matches
from tests.tiny import save_tiny_model
from tutelage.evaluation.metrics import Interval

TINY = replace(
    SCALES["cpu"],
    arms=("all", "random-40", "gap-20", "stored"),
    seeds=(1, 2),
    grid=(1e-4, 1e-3),
    num_steps=2,
    prompts_per_step=3,
    num_problems=4,
    num_scored=2,
    num_other_texts=2,
    evaluation_batch=8,
    num_looks=1,
)
FACTS = {
    "task": "stories",
    "num_texts": 4,
    "minutes": 1.0,
    "parameters": 9,
    "test": {"mean_at_k": 0.5},
    "recipe": {"num_layers": None, "num_epochs": 1},
    "machine": {"device": "cpu"},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    (folder / "data").mkdir()
    for seed, who in enumerate(("teacher", "student")):
        save_tiny_model(folder / who, seed)
        (folder / f"{who}.json").write_text(json.dumps(FACTS))
    for split in ("train", "prompts", "test"):
        rows = [
            {"id": f"{split}{n}", "prompt": f"a{n}+{n};>", "answer": "1", "signs": "+"}
            for n in range(20)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{split}.jsonl").write_text(text)
    others = folder / "others.jsonl"
    others.write_text('{"problem": "1+2=3"}\n{"problem": "4+4=8~2"}\n')
    return Pair(folder, "stories", others)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALES, "cpu", TINY)
    monkeypatch.setitem(design.MAX_NEW_TOKENS, "stories", 6)


def test_cells_continue_where_they_stopped(
    tiny: None, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = tmp_path / "result.json"

    def run(*more: str) -> dict[str, Any]:
        given = ["--pair", str(pair.folder), "--others", str(pair.others), "--result", str(result)]
        given += ["--page-file", str(tmp_path / "page.md"), "--losses", "exact", *more]
        monkeypatch.setattr("sys.argv", ["claims_lm.py", *given])
        claims_lm.main()
        found: dict[str, Any] = json.loads(result.read_text())
        return found

    def run_verify(*more: str) -> int:
        with pytest.raises(SystemExit) as ended:
            run(*more)
        assert isinstance(ended.value.code, int)
        return ended.value.code

    assert run("--minutes", "-1")["cells"] == []
    assert "No cell has been run" in (tmp_path / "page.md").read_text()
    first = run("--cells", "tune/", "arm/stories/cpu/exact/stored/1")["cells"]
    assert [(r["kind"], r["arm"]) for r in first] == [("tune", "all")] * 2 + [("arm", "stored")]
    assert "Not run" in (tmp_path / "page.md").read_text()
    chosen = first[-1]["rate"]
    assert chosen == min(first[:2], key=lambda r: r["reverse_kl"])["rate"]
    second = run("--cells", "/all/1")["cells"]
    assert second[:3] == first
    assert [(r["arm"], r["seed"]) for r in second[3:]] == [("all", 1), ("all", 11), ("all", 12)]
    live, stored = second[3], second[2]
    assert live["training_kl_first"] == stored["training_kl_first"]  # the same first step
    assert live["weights"] != stored["weights"]
    last = run("--cells", "/all/1")
    assert last["cells"] == second  # nothing is left to do
    assert last["sizes"]["cpu"]["num_steps"] == TINY.num_steps
    for one in second:
        assert last["environments"][one["environment"]]["versions"]["torch"] == torch.__version__
    assert last["pairs"][pair.digest()]["shared"] == {"tuning": 0, "teacher": 4}
    assert "0 of the 4 judged stories have the numbers" in (tmp_path / "page.md").read_text()
    assert run_verify("--verify", "2", "--cells", "/all/1") == 0
    tampered = json.loads(result.read_text())
    tampered["cells"][-1]["weights"] = "0"
    result.write_text(json.dumps(tampered))
    assert run_verify("--verify", "9") == 1
    result.write_text(json.dumps(last))
    kept = run("--choices")
    assert kept["cells"] == second
    ((place, chosen_tokens),) = kept["choices"].items()
    assert place.startswith("stories/cpu/cpu/")
    assert chosen_tokens["source"] == claims_lm.source()
    merged = {"pairs": {}, "sizes": {}, "environments": {}, "cells": []}
    claims_lm.merge(merged, kept)
    assert merged["choices"] == kept["choices"]
    arms = chosen_tokens["arms"]
    assert set(arms) == {"start", "gap-20"}
    assert set(arms["start"]["rules"]) == {*COMPARED_RULES}
    assert arms["gap-20"]["before"] != arms["gap-20"]["after"]
    assert arms["gap-20"]["before"]["texts"] == arms["start"]["rules"]["probability_gap"]["texts"]


def test_choices_wait_for_a_learning_rate(
    tiny: None, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--pair", str(pair.folder), "--result", str(tmp_path / "none.json"), "--choices"]
    monkeypatch.setattr("sys.argv", ["claims_lm.py", *given])
    with pytest.raises(SystemExit, match="No learning rate"):
        claims_lm.main()


def test_a_cell_is_a_pure_function(tiny: None, pair: Pair) -> None:
    cell = Cell("arm", "stories", "cpu", "sampled", "gap-20", 1, 1e-3)
    one, two = (do(cell, pair, "cpu") for _ in range(2))
    for record in (one, two):
        assert record.pop("train_s") >= 0
        assert record.pop("measure_s") >= 0
    assert one == two
    assert one["tokens_trained"] < one["tokens_sampled"]
    assert len(one["problems"]["mean"]) == TINY.num_problems
    assert len(one["problems"]["other_loss"]) == TINY.num_other_texts
    alone = do(Cell("arm", "stories", "cpu", "own", "opsa-20", 1, 1e-3), pair, "cpu")
    assert alone["weights"] != one["weights"]
    assert alone["reverse_kl"] > 0
    start = do(Cell("arm", "stories", "cpu", "exact", "start", 1, 0.0), pair, "cpu")
    teacher = do(Cell("arm", "stories", "cpu", "exact", "teacher", 1, 0.0), pair, "cpu")
    assert start["weights"] != one["weights"]
    assert teacher["reverse_kl"] == pytest.approx(0.0, abs=1e-5)
    assert start["reverse_kl"] > 0.01


def test_keys_follow_what_a_cell_depends_on(
    tiny: None, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell("arm", "stories", "cpu", "exact", "gap-20", 1, 1e-3)
    key, base = cell.key(pair, "cpu"), design._BASE.read_text()
    other = tmp_path / "claims_lm.toml"
    monkeypatch.setattr(design, "_BASE", other)

    def with_base(text: str) -> str:
        other.write_text(text)
        return cell.key(pair, "cpu")

    assert with_base(base + "\n# a comment\n") == key
    for old, new in (
        ('schedule = "linear"', 'schedule = "constant"'),
        ("warmup_steps = 1", "warmup_steps = 2"),
        ('scoring = "forward"', 'scoring = "recorded"'),
    ):
        assert old in base
        assert with_base(base.replace(old, new)) != key
    assert with_base(base) == key
    moved = shutil.copytree(pair.folder, tmp_path / "moved")
    assert cell.key(Pair(moved, "stories", pair.others), "cpu") == key  # no folder is part of it
    more = replace(TINY, seeds=(1, 2, 3), grid=(1e-5, *TINY.grid), arms=("all",), num_looks=2)
    with monkeypatch.context() as patch:
        patch.setitem(SCALES, "cpu", more)  # more cells, each as it was
        assert cell.key(pair, "cpu") == key
        patch.setitem(SCALES, "cpu", replace(TINY, num_problems=5))
        assert cell.key(pair, "cpu") != key
    with monkeypatch.context() as patch:
        patch.setattr(design, "OTHER_TOKENS", 95)
        assert cell.key(pair, "cpu") != key
    with monkeypatch.context() as patch:
        patch.setitem(design.MAX_NEW_TOKENS, "stories", 7)
        assert cell.key(pair, "cpu") != key
    assert cell.key(pair, "cpu") == key


def test_published_cells_are_those_of_the_present_design() -> None:
    """Fails when claims_lm.toml, a size or an arm is edited and the published cells stay."""
    published = claims_lm.read(claims_lm.RESULT)
    assert published["cells"]
    for one in published["cells"]:
        assert design.is_current(one), one["key"]
        assert not design.is_current({**one, "seed": one["seed"] + 1})
        assert one["environment"] in published["environments"]
    assert set(published["sizes"]) == {one["scale"] for one in published["cells"]}


def test_another_configuration_is_tuned_again(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [*tuning_cells(SCALE, "stories"), *cells(SCALE, "stories", RATES)]
    made = [{**record(c, 0.4), "key": c.key(pair, "cpu"), "source": "other code"} for c in whole]
    given = argparse.Namespace(any_source=True, device="cpu", losses=["exact", "sampled"], cells=[])
    assert claims_lm.todo({"cells": made}, pair, SCALE, given) == []
    left = claims_lm.todo({"cells": made[:-1]}, pair, SCALE, given)
    assert left == whole[-1:]
    base = tmp_path / "claims_lm.toml"
    base.write_text(design._BASE.read_text().replace("warmup_steps = 1", "warmup_steps = 2"))
    monkeypatch.setattr(design, "_BASE", base)
    left = claims_lm.todo({"cells": made}, pair, SCALE, given)
    assert left == [*tuning_cells(SCALE, "stories"), *cells(SCALE, "stories", {})]


def test_a_cell_of_another_configuration_gives_way() -> None:
    results: dict[str, Any] = {"cells": []}
    old = record(Cell(*_KEPT), 0.4)
    new = {**old, "key": old["key"].replace("/size/", "/other/")}
    elsewhere = {**old, "key": old["key"].replace("/cpu/pair", "/cuda/pair")}
    for one in (old, elsewhere, new):
        claims_lm.keep(results, one)
    assert results["cells"] == [elsewhere, new]


def test_a_merge_takes_no_cell_of_other_code_for_a_present_one() -> None:
    cell = Cell(*_KEPT)
    present = {**record(cell, 0.4), "key": cell.key_on("cpu", "pair"), "source": design.source()}
    mine: dict[str, Any] = {name: {} for name in ("pairs", "sizes", "environments")}
    mine["cells"] = [present]
    for other, is_taken in (({**present, "source": "s"}, False), ({**present, "mean": 1}, True)):
        claims_lm.merge(mine, {**mine, "cells": [other]})
        assert mine["cells"] == [other if is_taken else present]
    claims_lm.merge(old := {**mine, "cells": [{**present, "source": "s"}]}, mine)
    assert old["cells"] == mine["cells"]


_KEPT = ("arm", "stories", "cpu", "exact", "all", 1, 2e-5)


def test_rates_are_tuned_on_problems_of_their_own(tiny: None, pair: Pair) -> None:
    tune, arm = (problems_of(Cell(kind, *_ALL), pair) for kind in ("tune", "arm"))
    assert len(tune) == len(arm) == TINY.num_problems
    assert not {prompt.id for prompt in tune} & {prompt.id for prompt in arm}


_ALL = ("stories", "cpu", "exact", "all", 1, 1e-3)


def test_every_arm_of_this_version_is_a_configuration(pair: Pair) -> None:
    for arm in claims_lm_rules.ARMS:
        for loss in claims_lm_rules.LOSSES:
            cell = Cell("arm", "stories", "cpu", claims_lm_rules.loss_of(arm, loss), arm, 1, 1e-5)
            design.config_of(cell, pair, "cpu")


# --- verdicts from made-up cells ------------------------------------------------------------------

SCALE = SCALES["cpu"]
LAST = len(SCALE.seeds)
RATES = {"exact": SCALE.grid[1], "sampled": SCALE.grid[1], "own": SCALE.grid[2]}


def record(cell: Cell, accuracy: float) -> dict[str, Any]:
    """A finished cell with that accuracy in every problem."""
    wobble = 0.002 * ((cell.seed * 7 + len(cell.arm)) % 3 - 1)
    kl = 1 + abs(cell.rate - SCALE.grid[1]) - accuracy
    problems = {name: [kl + wobble] * 5 for name in claims_lm_rules.METRICS}
    problems |= {"mean": [accuracy + wobble] * 5, "pass": [accuracy] * 5}
    if (cell.kind, cell.loss) == ("tune", "own"):
        problems["mean"] = [0.3 - abs(cell.rate - SCALE.grid[2])] * 5
    return {
        "key": f"{cell.name}/size/cpu/pair",
        "source": "s",
        "environment": "e",
        **asdict(cell),
        **{name: values[0] for name, values in problems.items()},
        "problems": problems,
        "train_s": 2.0,
        "measure_s": 1.0,
        "tokens_trained": 10,
        "kl_kept": 0.5,
    }


def records(**accuracy: float) -> list[dict[str, Any]]:
    work = [*tuning_cells(SCALE, "stories"), *cells(SCALE, "stories", RATES)]
    return [record(c, accuracy.get(c.arm.replace("-", "_"), 0.4)) for c in work]


def results_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    pairs = {"pair": {"teacher": FACTS, "student": FACTS}}
    return {"pairs": pairs, "environments": {}, "cells": found}


def test_verdicts_follow_the_rules() -> None:
    found = records(start=0.1, gap_20=0.5, random_10=0.2, stored=0.3)
    exact, sampled = tables(found)
    assert (exact.loss, sampled.loss) == ("exact", "sampled")
    verdicts = {name: one["verdict"] for name, one in judge(exact).items()}
    assert verdicts["D1"] == verdicts["D4"] == verdicts["D5"] == "supported"
    assert verdicts["F1"] == "contradicted here"
    assert verdicts["O1"] == "supported"
    assert verdicts["T1"] is verdicts["I1"] is None  # their arms are no part of this size
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
    there = {"F1": {"coins": "supported"}, "D1": {"coins": "supported"}, "T1": {"coins": "x"}}
    monkeypatch.setattr(claims_lm_published, "embedded", lambda: there)
    judged = {"s": judge(tables(records(start=0.1, gap_20=0.5, stored=0.3))[0])}
    lines = claims_lm_published.against(judged).splitlines()
    rows = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| ")}
    assert "**contradicted** in `s`" in rows["F1"]
    assert "**differs from the paper**; **differs from the embedded tasks** in some" in rows["F1"]
    assert "14 of 17 pairs" in rows["F1"]  # the number of the paper
    assert "agrees with the paper; agrees with the embedded tasks" in rows["D1"]
    assert "differs" not in rows["T1"]  # was not run here
    assert "not in the results" in rows["D5"]
    assert set(rows) >= set(claims_lm_rules.CLAIMS)


def test_words_for_verdicts_that_differ() -> None:
    words = claims_lm_published.in_words
    yes, no, undecided = "supported", "contradicted here", "not supported"
    assert words([], [yes]) == "not run here"
    assert "differs" not in words([yes, undecided], [yes])
    nothing = words([undecided, "cannot tell"], [no])
    assert nothing == (
        "undecided here, neither for nor against the paper; says nothing about the embedded tasks' "
        "verdicts"
    )
    assert words([yes], [undecided]) == "agrees with the paper; the embedded tasks do not decide it"
    assert "in some settings" in words([yes], [yes, no])
    assert "differs from the paper** in one setting" in words([yes, no], [])


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
