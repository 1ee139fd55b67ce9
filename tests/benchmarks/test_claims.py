"""The claims benchmark: arms that are paired, cells that are keyed, resumed and repeated."""

from __future__ import annotations

import ast
import json
import multiprocessing.dummy
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from claims_records import BRIEF, RATE, RATES, level, record

import claims
import claims_design
from claims_arms import ARMS, BASELINES, TUNED, loss_of, random_arm
from claims_design import (
    FULL,
    LIMIT_CORE_MINUTES,
    QUICK,
    SETTINGS,
    TUNING_SEEDS,
    Cell,
    Design,
    cells,
    config_of,
    losses_of,
    tuning_cells,
)
from claims_file import differing, end_line
from claims_probe import probe
from claims_work import asked, do, fresh, problems_of, stepping
from tutelage.config.evaluation import EvaluationConfig
from tutelage.config.parse import changed_keys, to_table
from tutelage.data.tasks import Task
from tutelage.data.tasks.coins import CoinsTask
from tutelage.data.tasks.ledger import LedgerTask
from tutelage.models.load import load_model
from tutelage.train.loop import train

# --- arms are paired ------------------------------------------------------------------------------


@pytest.mark.parametrize("design", [FULL, QUICK], ids=lambda d: d.name)
def test_arms_of_a_setting_and_seed_differ_in_the_method_alone(design: Design) -> None:
    seeds = design.seeds[:1]
    work = [c for c in cells(design, RATES) if c.kind == "arm" and c.seed in seeds]
    assert len(set(work)) == len(work)
    reference = {
        (c.setting, c.learning_rate): to_table(config_of(c)) for c in work if c.arm == "all"
    }
    methods = ("selection", "objective", "weighting", "rollouts")
    for cell in work:
        assert config_of(cell).optimizer.learning_rate == cell.learning_rate
        keys = changed_keys(reference[cell.setting, cell.learning_rate], to_table(config_of(cell)))
        assert all(key.split(".")[0] in methods for key in keys)


def test_every_arm_has_all_seeds_and_few_are_repeated_at_other_rates() -> None:
    work = [c for c in cells(FULL, RATES) if c.kind == "arm"]
    assert set(FULL.arms) == set(SETTINGS)
    seeds: dict[tuple[str, str], set[int]] = {}
    for cell in work:
        if cell.learning_rate == RATE:
            seeds.setdefault((cell.setting, cell.arm), set()).add(cell.seed)
    assert all(found == {*FULL.seeds} for found in seeds.values())
    assert len(FULL.seeds) >= 5
    for setting, arms in FULL.sensitivity_arms.items():
        assert set(arms) <= set(FULL.arms[setting])
        rates = {c.learning_rate for c in work if c.setting == setting and c.arm in arms}
        assert rates == {RATE / 2, RATE, 2 * RATE}
    tuning, num_pairs = {c.seed for c in tuning_cells(FULL)}, 0
    for controls in FULL.controls:
        assert not {*FULL.seeds} & {*tuning, *controls.seeds}
        assert set(controls.arms) <= {*FULL.arms[controls.setting]}
        num_pairs += len(controls.arms) * (controls.num_cells // (2 * len(FULL.seeds)))
    assert num_pairs >= 40


def test_names_of_arms_tell_their_loss_and_control() -> None:
    assert [loss_of(arm) for arm in ("all", "all+sampled", "start")] == [
        "exact",
        "sampled",
        "exact",
    ]
    assert all(arm.name.endswith("+sampled") <= (arm.loss == "sampled") for arm in ARMS.values())
    assert random_arm("soft_or-20+sampled") == "random-20+sampled"
    assert random_arm("q3-10") == "random-10"
    assert random_arm("opsa-20") == "random-20+sampled"  # an arm of the sampled loss's rate
    assert [random_arm(arm) for arm in ("random-10", "all", "eopd", "stored", "start")] == [
        None
    ] * 5
    for setting, arms in FULL.arms.items():
        assert {TUNED[loss] for loss in losses_of(arms)} <= {*arms}, setting


def test_the_models_of_every_setting_are_in_the_package() -> None:
    names = {name for s in SETTINGS.values() for name in (s.student, s.task.teacher)}
    assets = claims_design.PACKAGE / "assets"
    assert not [name for name in names if not (assets / name / "model.safetensors").exists()]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of two small steps."""
    for name, setting in claims_design.SETTINGS.items():
        brief = replace(setting, prompts_per_step=4, num_steps=2)
        monkeypatch.setitem(claims_design.SETTINGS, name, brief)


@pytest.mark.usefixtures("short")
def test_arms_start_alike_and_the_same_cell_gives_the_same_numbers() -> None:
    cell = Cell("arm", "overconfident", "all", 7, RATE, 2)
    records = {arm: do(replace(cell, arm=arm)) for arm in ("all", "random-10", "stored+sampled")}
    first = ("training_reverse_kl_first", "q3_share_first", "q3_kl_first")
    for name in first:  # `all` measures while it learns, the others before: rounding differs
        assert [r[name] for r in records.values()] == pytest.approx(
            [records["all"][name]] * 3, 1e-5
        )
    assert len({r["weights"] for r in records.values()}) == 3
    assert records["random-10"]["tokens_trained"] < records["all"]["tokens_trained"] / 5
    assert do(cell) == records["all"]
    faster = do(replace(cell, learning_rate=2 * RATE))
    assert faster["training_reverse_kl_first"] == records["all"]["training_reverse_kl_first"]
    assert faster["weights"] != records["all"]["weights"]


@pytest.mark.parametrize("arm", ["all", "soft_or-20+sampled", "stored"])
def test_a_cell_takes_the_steps_that_train_takes(
    arm: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Four steps of the library, by its own loop, and those of the harness: the same numbers."""
    brief = replace(claims_design.SETTINGS["scarce"], prompts_per_step=4)
    monkeypatch.setitem(claims_design.SETTINGS, "scarce", brief)
    cell = Cell("arm", "scarce", arm, 7, 1e-3, 2)
    quiet = EvaluationConfig(num_problems=0)
    config = replace(config_of(cell), out=str(tmp_path), evaluation=quiet, checkpoint_every=0)
    folder = train(config, "run", log=lambda _: None).folder
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    names = ("loss", "grad_norm", "reverse_kl_nats", "num_kept")
    expected = [[json.loads(line)[name] for name in names] for line in lines]
    components = fresh(cell)
    with stepping(components, config_of(cell)) as take:
        records = [take(step) for step in (1, 2, 3, 4)]
    found = [[one[name] for name in names] for one in records]
    assert found == expected
    trained = load_model(str(folder / "student"))
    pairs = zip(trained.parameters(), components.student.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    assert all(weight.grad is None for weight in components.student.parameters())


def test_a_student_whose_masters_or_sampler_are_anothers_takes_no_step() -> None:
    cell = Cell("arm", "scarce", "all", 7, 1e-3, 2)
    whole, other = fresh(cell), fresh(cell)
    for changes in ({"masters": other.masters}, {"sampler": other.sampler}):
        mixed, config = replace(whole, **changes), config_of(cell)
        with pytest.raises(ValueError, match="another student"), stepping(mixed, config):
            pass


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("loss", ["", "+sampled"])
def test_live_rollouts_are_the_trained_students_and_stored_ones_the_initial_ones(loss: str) -> None:
    """With one step the two are the same; afterwards the student that samples has changed."""
    live, stored = (
        Cell("arm", "overconfident", f"{arm}{loss}", 7, 1e-2, 2) for arm in ("all", "stored")
    )
    assert do(live)["weights"] != do(stored)["weights"]
    claims_design.SETTINGS["overconfident"] = replace(
        claims_design.SETTINGS["overconfident"], num_steps=1
    )
    assert do(live)["weights"] == do(stored)["weights"]


@pytest.mark.slow
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("arm", [arm for arm in FULL.arms["overconfident"] if arm not in BASELINES])
def test_every_arm_trains_and_repeats(arm: str) -> None:
    cell = Cell("arm", "overconfident", arm, 7, RATE, 2, 2)
    found = do(cell)
    assert found["tokens_trained"] > 0
    assert do(cell) == found


@pytest.mark.usefixtures("short")
def test_baselines_are_measured_untrained_and_the_start_has_all_choices() -> None:
    cell = Cell("arm", "overconfident", "start", 7, RATE, 3, 2)
    start, teacher = do(cell), do(replace(cell, arm="teacher"))
    assert start["weights"] != teacher["weights"]
    assert max(teacher["problems"]["reverse_kl"]) < 1e-6 < start["reverse_kl"]
    assert "tokens_trained" not in start
    assert "choices" not in teacher
    rules, overlap = start["choices"]["rules"], start["choices"]["overlap"]
    assert overlap["entropy"]["entropy"] == 1.0 > overlap["random"]["divergence"]
    assert rules["divergence"]["kl_kept"] > rules["random"]["kl_kept"]
    kept, counts = zip(*rules["divergence"]["texts"].values(), strict=True)
    assert sum(counts) == start["choices"]["num_tokens"]
    assert sum(kept) / sum(counts) == pytest.approx(rules["divergence"]["tokens_kept"])


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
    lines = [json.dumps(record(cell, level)) for cell in work]
    path = tmp_path / "cells.jsonl"
    path.write_text("\n".join(lines) + "\n" + lines[0][: len(lines[0]) // 2], encoding="utf-8")
    assert set(claims.finished(path)) == {cell.key for cell in work}
    assert set(claims.complete(work, path, num_workers=0)) == {cell.key for cell in work}
    path.write_text(lines[0] + "\n" + lines[1][:-20], encoding="utf-8")
    assert set(claims.finished(path)) == {work[0].key}
    end_line(path)
    with path.open("a", encoding="utf-8") as file:  # what continues begins a line of its own
        file.write(lines[2] + "\n")
    assert set(claims.finished(path)) == {work[0].key, work[2].key}


def test_every_setting_takes_the_rate_of_the_lowest_divergence_and_the_smaller_of_equals() -> None:
    """In `collapsed` that of the lowest forward KL at which every seed keeps its accuracy."""
    best = {("overconfident", "all+sampled"): {2e-3: 0.2, 4e-3: 0.2}}
    both = ("all", "all+sampled")
    design = replace(FULL, arms=dict.fromkeys(("overconfident", "collapsed"), both))
    records = {}
    for c in tuning_cells(design):
        kl = best.get((c.setting, c.arm), {8e-3: 0.3}).get(c.learning_rate, 0.5)
        is_harmed = c.arm == "all" and c.learning_rate > 1e-3
        figures = {"reverse_kl": kl, "forward_kl": 1 - 100 * c.learning_rate}
        is_harmed &= c.seed == TUNING_SEEDS[-1] or c.setting != "collapsed"
        records[c.key] = figures | {"mean": 0.79 if is_harmed else 1.0}
    tuning = claims.tuned(records, design)
    assert claims.chosen_rates(tuning) == {
        "overconfident": {"exact": 8e-3, "sampled": 2e-3},
        "collapsed": {"exact": 1e-3, "sampled": 8e-3},
    }
    assert claims.chosen_rates(tuning, 2.0)["overconfident"]["exact"] == 1.6e-2


@pytest.mark.parametrize("task", [LedgerTask(), CoinsTask()], ids=lambda task: task.name)
def test_no_problem_is_asked_twice_nor_are_rates_tuned_on_it(task: Task) -> None:
    judged, tuned = (problems_of(task, FULL.num_problems, flag) for flag in (False, True))
    assert len({asked(p) for p in judged}) == len(judged) == len(tuned) == FULL.num_problems
    assert not {asked(p) for p in judged} & {asked(p) for p in tuned}
    assert len({p.id for p in (*judged, *tuned)}) == 2 * FULL.num_problems


def test_a_task_of_too_few_problems_is_refused() -> None:
    with pytest.raises(ValueError, match=r"coins holds out 75 such problems, not 76"):
        problems_of(CoinsTask(), 76, False)


def test_a_cell_of_another_source_is_not_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = cells(QUICK, RATES)[-1]
    path = tmp_path / "cells.jsonl"
    path.write_text(json.dumps(record(cell, level)) + "\n", encoding="utf-8")
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
    assert {"claims_work.py", "claims_probe.py", "claims_choices.py"} <= {f.name for f in code}
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
    made = {cell.key: record(cell, level) for cell in work}
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
    again = record(cell, level)
    published = {k: v for k, v in again.items() if k not in claims.NOT_PUBLISHED}
    assert Cell(**{name: published[name] for name in asdict(cell)}) == cell
    assert differing({**published, "cpu_s": 9.0}, again, claims.TIMES) == []
    other = {**published, "digest": "e", "pass": -1.0}
    assert differing(other, again, claims.TIMES) == ["digest", "pass"]


# --- what it takes --------------------------------------------------------------------------------


def seconds_of(kind: str, setting: str, seconds: float) -> dict[str, object]:
    return {"kind": kind, "setting": setting, "cpu_s": seconds}


def test_the_estimate_takes_recorded_times_of_the_same_setting_or_goes_by_rollouts() -> None:
    recorded = [
        seconds_of("arm", "scarce", 1.0),
        seconds_of("arm", "scarce", 3.0),
        seconds_of("tune", "scarce", 8.0),
        seconds_of("bias", "", 30.0),
    ]
    scarce = Cell("arm", "scarce", "all", 1, RATE, 1)
    of = [scarce, replace(scarce, kind="control"), replace(scarce, kind="tune")]
    assert minutes(of, recorded) == pytest.approx((2 + 2 + 8) / 60)
    share = SETTINGS["collapsed"].num_rollouts / SETTINGS["scarce"].num_rollouts
    assert minutes([replace(scarce, setting="collapsed")], recorded) == pytest.approx(
        share * 2 / 60
    )
    assert minutes([Cell("bias", "", "", 1, 0.0, 0)], recorded) == 0.5
    assert minutes(of, []) == 0.0


def minutes(work: Iterable[Cell], recorded: list[dict[str, object]]) -> float:
    return claims.estimated_minutes([*work], recorded)


def test_the_full_design_fits_its_limit() -> None:
    path = claims.results_file(FULL)
    recorded = json.loads(path.read_text(encoding="utf-8"))["cells"]
    work = [*tuning_cells(FULL), *cells(FULL, RATES)]
    assert 30 < claims.estimated_minutes(work, recorded) < 0.85 * LIMIT_CORE_MINUTES
    assert len(BRIEF.seeds) < len(FULL.seeds)
