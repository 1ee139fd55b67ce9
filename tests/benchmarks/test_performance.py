"""The benchmark of the objective and the page of all results: exactness, goals, missing parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import performance_page
import step_arms
from objective import CASES, begun, write_case
from objective_contestants import (
    CONTESTANTS,
    NEEDS,
    OURS,
    Inputs,
    all_tokens,
    gradient_errors,
    make_inputs,
)
from operators import Operators
from performance_page import (
    goal_table,
    goals,
    memory_table,
    packing_table,
    page,
    rollout_goals,
    rollout_table,
)
from rollout import check_lengths
from step import check_alike

INPUTS = make_inputs(256, 96, 16)


def doubled(x: Inputs) -> Tensor:
    """A contestant whose gradient is wrong and whose value is right."""
    total = all_tokens(x)
    assert x.student.grad is not None
    x.student.grad.mul_(2)
    return total


def test_contestants_that_need_nothing_else_compute_the_reverse_kl() -> None:
    runs = {name: run for name, run in CONTESTANTS.items() if name not in NEEDS}
    errors = gradient_errors(INPUTS, runs)
    assert errors.keys() == runs.keys() - {"bare_products", "torch_products", "eopd"}
    assert set(OURS) - {"eopd"} < errors.keys()
    assert max(errors.values()) <= 1e-5


def test_a_contestant_with_a_wrong_gradient_is_seen() -> None:
    assert gradient_errors(INPUTS, {"doubled": doubled})["doubled"] == pytest.approx(1.0, rel=1e-3)


def case(rows: int, **seconds: float) -> dict[str, Any]:
    return {
        "rows": rows,
        "vocab_size": 96,
        "width": 16,
        "gradient_bytes": rows << 20,
        "results": {
            name: {
                "seconds": value,
                "extra_bytes": (rows << 20) + (100 << 20) * (2 if rows == 4096 else 1),
                "error": 1e-6,
                "profile_s": {"products": value, "passes": 0.0},
            }
            for name, value in seconds.items()
        },
    }


RECORD = {
    "date": "2026-01-02T00:00:00",
    "commit": "abc",
    "versions": {"torch": "2"},
    "machine": {"cpu": "some"},
    "trl_tile": [64, 128],
    "liger_chunk": 256,
    "cases": [
        case(512, bare_products=1.0, all_tokens=1.3, soft_or_50=1.3, trl=5.2),
        case(4096, bare_products=8.0, all_tokens=9.0),
    ],
}


def test_goals_are_ratios_of_what_was_measured_and_unknown_where_nothing_was() -> None:
    found = {line: (limit, reached) for line, limit, reached in goals(RECORD["cases"])}
    assert found["all tokens / bare products, time"] == (1.2, 1.3)
    assert found["all tokens / trl, time"] == (0.3, 0.25)
    assert found["soft_or_50 / all tokens, time"] == (1.1, 1.0)
    assert found["all tokens / liger, time"] == (0.6, None)
    memory = found["extra memory without gradients, N = 4096 / 512, V = 96"]
    assert memory == (1.15, 2.0)


def test_the_page_tells_misses_and_leaves_out_parts_without_results(tmp_path: Path) -> None:
    (tmp_path / "objective-2026-01-02.json").write_text(json.dumps(RECORD))
    plain = dict.fromkeys(("step_s", "rollout_s", "teacher_s", "student_s", "tokens", "loss"), 10.0)
    plain |= {"step_vs_trl": 1.0, "per_token_vs_trl": 1.0, "peak_vs_trl": 1.0}
    arms = {
        "tutelage": plain | {"step_vs_trl": 0.7, "peak_bytes": 3 << 30},
        "tutelage-offload": plain | {"peak_vs_trl": 0.5, "peak_bytes": 2 << 30},
        "trl": plain | {"peak_bytes": 4 << 30},
    }
    seen = {"tutelage": {"products_s": 3.0, "attention_s": 1.0, "other_operators_s": 9.0}}
    least = {"while_teacher_reads_bytes": 2 << 30, "while_student_learns_bytes": 1 << 30}
    found = {"arms": arms, "profiled_step": seen, "needed_memory": {"bytes": least}}
    step = {"date": "2026-01-02", "results": {"smollm2": found}}
    (tmp_path / "step-smollm2-2026-01-01.json").write_text(json.dumps({"old": {"x": 1}}))
    (tmp_path / "step-smollm2-2026-01-02.json").write_text(json.dumps(step))
    (tmp_path / "step-quick-2026-01-03.json").write_text(json.dumps({"quick": 1}))
    text = page(tmp_path, tmp_path)
    assert "| all tokens / bare products, time | ≤ 1.2 | 1.30 | **no** |" in text
    assert "| all tokens / trl, time | ≤ 0.3 | 0.25 | yes |" in text
    assert "| all tokens / liger, time | ≤ 0.6 | not measured |  |" in text
    assert "in chunks of 256 rows" in text
    assert "| smollm2: step / TRL, time | ≤ 0.8 | 0.70 | yes |" in text
    assert "/ TRL's leanest, peak memory | ≤ 0.6 | 0.50 | yes |" in text
    assert "| 10 | 10.00 | 3,072 MiB | 0.70 | 1.00 | 1.00 |" in text
    assert "attention alone take **0.40** of the time of TRL's fastest step" in text
    assert "need 2,048 MiB during the teacher forward (all of it in memory)" in text
    assert "**0.50** of TRL's leanest" in text
    assert "old" not in text
    assert "quick" not in text
    assert "## The whole step" in text
    assert "## Rollouts" not in text
    image = (tmp_path / "performance-objective.svg").read_bytes()
    assert page(tmp_path, tmp_path) == text
    assert (tmp_path / "performance-objective.svg").read_bytes() == image


def test_rollouts_have_a_row_for_each_workload_and_contestant() -> None:
    results = {
        name: {"tokens_per_s": 1234.5, "mean_length": 48.04} for name in ("ours", "generate")
    }
    seen = {"products_us_per_token": 7.0, "attention_us_per_token": 2.0}
    work = {
        "batch_size": 8,
        "lengths": "ragged",
        "results": results,
        "times_generate": {"ours": 2.0},
        "profiled_batch": {"ours": seen | {"other_operators_us_per_token": 12.4}},
    }
    text = rollout_table({"workloads": [work]})
    assert "| 8 | ragged | ours | 1,234 | 2.00 | 48.0 | 7 | 2 | 12 |" in text
    assert "| 8 | ragged | generate | 1,234 | 1.00 | 48.0 |  |  |  |" in text


def test_packing_and_memory_have_a_row_for_each_way_and_configuration() -> None:
    packing = {
        "summary": {"padded_tokens_per_s": 100.0, "neighbours_tokens_per_s": 250.0},
        "losses": {"padded": 1.5, "neighbours": 1.5},
        "tokens_with_padding": {"padded": 40, "neighbours": 20},
        "tokens": 18,
    }
    assert "| by length | 250 | 18 | 20 | 1.500000 |" in packing_table(packing)
    phases = {"load": {"x": 5}, "learn": {"x": 3, "y": 4}}
    found = {"planned": 3 << 20, "measured": 4 << 20, "ratio": 0.75, "phases": phases}
    assert "| wide | 3 MiB | 4 MiB | 0.75 | learn |" in memory_table({"results": {"wide": found}})


def test_goals_of_tokens_a_second_are_met_from_above() -> None:
    works = [
        {"batch_size": 8, "lengths": "natural", "times_generate": {"ours": 1.9}},
        {"batch_size": 8, "lengths": "ragged", "times_generate": {"ours": 1.9}},
    ]
    record = {"arguments": {"model": "package:tutelage/x"}, "workloads": works}
    text = goal_table(rollout_goals(record), is_more_better=True)
    assert "natural lengths: tokens/s / generate | ≥ 2.0 | 1.90 | **no** |" in text
    assert "ragged lengths: tokens/s / generate | ≥ 1.5 | 1.90 | yes |" in text


def test_a_file_grows_by_cases_of_one_commit_and_is_begun_anew_for_another(tmp_path: Path) -> None:
    out, record = tmp_path / "objective.json", RECORD | {"cases": []}
    sizes = [(c.rows, c.vocab_size, c.width) for c in CASES[:2]]
    for rows, vocab_size, width in (*sizes, sizes[0]):
        write_case(out, record, {"rows": rows, "vocab_size": vocab_size, "width": width})
        record |= begun(out, record)
    assert [case["rows"] for case in json.loads(out.read_text())["cases"]] == [1024, 512]
    assert begun(out, record | {"commit": "def"}) == {}
    assert begun(tmp_path / "none.json", record) == {}


@pytest.mark.parametrize(("key", "value"), [("tokens", 64.0), ("loss", 2.0)])
def test_arms_that_do_not_do_the_same_work_are_not_compared(key: str, value: float) -> None:
    trl = {"tokens": 100.0, "loss": 1.0}
    check_alike({"tutelage": trl | {"tokens": 110.0, "loss": 0.9}, "trl": trl})
    with pytest.raises(SystemExit, match=f"{key} of tutelage"):
        check_alike({"tutelage": trl | {key: value}, "trl": trl})


def test_contestants_with_other_lengths_are_not_compared() -> None:
    lengths = [8, 12] * 50
    check_lengths({"ours": lengths, "generate": [9, 12] * 50})
    with pytest.raises(RuntimeError, match="longer than those of generate"):
        check_lengths({"ours": lengths, "generate": [4, 8] * 50})


def test_no_results_give_no_figures(tmp_path: Path) -> None:
    assert page(tmp_path, tmp_path) == performance_page.INTRO


def test_operators_are_told_apart_and_only_those_after_the_beginning_count() -> None:
    a, b = torch.ones(400, 400), torch.ones(8, 200, 200)
    quiet = Operators()
    quiet.begin()
    assert quiet.end() == {"products_s": 0.0, "attention_s": 0.0, "other_operators_s": 0.0}
    for name, work in (
        ("products_s", lambda: a @ a),
        ("attention_s", lambda: torch.bmm(b, b)),
        ("other_operators_s", lambda: a.exp()),
    ):
        operators = Operators()
        operators.begin()
        for _ in range(5):
            work()
        spent = operators.end(times=2)
        assert max(spent, key=spent.__getitem__) == name


@pytest.mark.parametrize("arm", ["tutelage", "trl"])
def test_the_profiler_sees_the_timed_steps_and_no_more(
    arm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = torch.ones(400, 400), torch.ones(8, 200, 200)

    def steps(*arguments: Any) -> dict[str, Any]:
        after_step = arguments[-1]
        for number in range(3):
            a.exp() if number == 0 else a @ a
            after_step()
        torch.bmm(b, b)  # as the student is saved
        return {}

    monkeypatch.setattr(step_arms, "ours" if arm == "tutelage" else arm, steps)
    operators = Operators()
    step_arms.run_arm("embedded", arm, Path("/"), 2, operators)
    spent = operators.end()
    assert spent["products_s"] > 0.0
    assert spent["attention_s"] == 0.0
