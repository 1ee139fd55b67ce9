"""The claims on a real language model: cells that can be continued and are what they depend on."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from claims_lm_records import FACTS, RATES, SCALE, record

import claims_lm
import claims_lm_design as design
import claims_lm_rules
from claims_choices import COMPARED_RULES
from claims_lm_design import SCALES, Cell, Pair, cells, tuning_cells
from claims_lm_work import do, problems_of
from tests.tiny import save_tiny_model

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
    for made in (one, two):
        assert made.pop("train_s") >= 0
        assert made.pop("measure_s") >= 0
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
