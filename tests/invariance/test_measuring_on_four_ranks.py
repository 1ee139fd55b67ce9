"""Measurements of four processes are those of one, by the commands that a user gives."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from patience import HANG_S, wait_until
from ranks import Ended, run_ranks, started

ROOT = Path(__file__).parents[2]
LEDGER = ROOT / "configs/examples/ledger.toml"
STUDENT = "package:tutelage/assets/ledger-overconfident"
COMMAND = [sys.executable, "-m", "tutelage"]
LOGS = ("evaluation.jsonl", "evaluation_rows.jsonl", "samples.jsonl", "tokens.jsonl")

pytestmark = pytest.mark.slow


def training(out: Path, **changes: Any) -> list[str]:
    values = {
        "num_steps": 2, "prompts_per_step": 4, "evaluation.num_problems": 6,
        "evaluation.num_samples": 2, "recording.every": 1, "recording.num_prompts": 3,
        "recording.num_rollouts": 3, "device": "cpu", "out": out,
    }  # fmt: skip
    return ["train", str(LEDGER), *(f"{key}={x}" for key, x in (values | changes).items())]


def run(count: int, *arguments: object) -> list[Ended]:
    ended = run_ranks([*COMMAND, *map(str, arguments)], count, limit_s=HANG_S)
    assert [rank.code for rank in ended] == [0] * count, "\n".join(rank.said for rank in ended)
    return ended


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_numbers(value: Any) -> Any:
    """What has to be equal exactly; ranks of nearly equal tokens may differ."""
    if isinstance(value, dict):
        kept = value.keys() - {"rank", "kept", "seconds", "student_top", "teacher_top", "texts"}
        return {key: without_numbers(value[key]) for key in kept}
    if isinstance(value, list):
        return [without_numbers(one) for one in value]
    return 0.0 if isinstance(value, float) else value


def numbers_of(value: Any) -> list[float]:
    if isinstance(value, dict):
        names = sorted(value.keys() - {"rank", "kept", "seconds"})
        return [x for name in names for x in numbers_of(value[name])]
    if isinstance(value, list):
        return [x for one in value for x in numbers_of(one)]
    return [value] if isinstance(value, float) else []


def assert_same(one: Path, several: Path) -> None:
    a, b = lines_of(one), lines_of(several)
    assert without_numbers(a) == without_numbers(b)
    assert numbers_of(b) == pytest.approx(numbers_of(a), rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_a_run_of_four_processes_logs_what_one_does(tmp_path: Path, sharding: str) -> None:
    run(1, *training(tmp_path / "one"))
    ended = run(4, *training(tmp_path / "four", **{"student.sharding": sharding}))
    for name in LOGS:
        assert_same(tmp_path / "one" / name, tmp_path / "four" / name)
    shown = "" if sharding == "none" else f", {sharding}"
    assert f"4 processes, 1 host{shown} on cpu" in ended[0].said
    assert [rank.said for rank in ended[1:]] == [""] * 3


def test_a_teacher_that_processes_hold_together_measures_what_a_whole_one_does(
    tmp_path: Path,
) -> None:
    plain = {"evaluation.teacher": "false", "num_steps": 1}
    run(1, *training(tmp_path / "one", **plain))
    for sharding in ("tp", "fsdp2"):
        shared = training(tmp_path / sharding, **plain, **{"teacher.sharding": sharding})
        run(2, *shared)
        for name in LOGS:
            assert_same(tmp_path / "one" / name, tmp_path / sharding / name)


def test_eval_and_score_of_four_processes_find_what_one_does(tmp_path: Path) -> None:
    problems = [{"id": str(i), "prompt": f"a1+7;b2+{i};>", "answer": "3"} for i in range(7)]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in problems))
    for count in (1, 4):
        options = ["--device", "cpu", "--num-samples", 3, "--max-new-tokens", 40]
        folder = tmp_path / f"evaluation{count}"
        run(count, "eval", STUDENT, "--suite", path, "--out", folder, "--batch-size", 2, *options)
        out = tmp_path / f"score{count}.jsonl"
        run(count, "score", LEDGER, "device=cpu", "--num-prompts", 3, "--out", out)
    assert_same(tmp_path / "evaluation1/rows.jsonl", tmp_path / "evaluation4/rows.jsonl")
    assert_same(tmp_path / "score1.jsonl", tmp_path / "score4.jsonl")


def test_a_signal_to_one_of_four_processes_ends_a_long_evaluation(tmp_path: Path) -> None:
    """All end with the exit code of Ctrl-C; the next start evaluates all problems again."""
    out = tmp_path / "run"
    long = training(out, **{"evaluation.num_problems": 4000, "recording.every": 0})
    with started([*COMMAND, *long], 4, tmp_path) as processes:
        log = tmp_path / "rank0.log"
        wait_until(lambda: "evaluating the student: completions " in log.read_text(), processes[0])
        processes[2].send_signal(signal.SIGINT)
        codes = [process.wait(HANG_S) for process in processes]
    said = [(tmp_path / f"rank{rank}.log").read_text() for rank in range(4)]
    assert codes == [130] * 4, said
    assert not any("Traceback" in text for text in said)
    assert not (out / "evaluation_rows.jsonl").exists()
    again = subprocess.run(
        [*COMMAND, *training(out, **{"recording.every": 0}), "--allow-change",
         "evaluation.num_problems"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert len(lines_of(out / "evaluation.jsonl")) == 3  # student and teacher before, student after
