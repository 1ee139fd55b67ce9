"""Measurements that several processes share: the logs of one process, and what each of them did."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ranks import run_script
from tiny_runs import metrics_of
from tutelage.setup.run_folder import EVALUATION_LOGS
from tutelage.train.loop import train

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from measuring_rank import case_config  # noqa: E402

LOGS = (*EVALUATION_LOGS, "tokens.jsonl")
EVALUATION_SEED = [424242]


def lines_of(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_close(one: Any, other: Any, name: str) -> None:
    """The same values in the same order; numbers to rounding, ranks of nearly equal ones aside."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one.keys() - {"seconds", "rank", "kept"}:
            assert_close(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), name
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_close(a, b, f"{name}[{i}]")
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=2e-3, abs=1e-5), name
    else:
        assert one == other, name


def assert_same_logs(one: Path, several: Path) -> None:
    for name in LOGS:
        alone, shared = lines_of(one, name), lines_of(several, name)
        assert len(alone) == len(shared), name
        for i, (a, b) in enumerate(zip(alone, shared, strict=True)):
            if a["step"] == 0:  # the same weights: the same numbers, to the last bit
                assert {**a, "seconds": 0} == {**b, "seconds": 0}, (name, i)
            assert_close(a, b, f"{name}[{i}]")


@pytest.fixture(scope="module")
def measured(
    tiny_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """A folder with the runs of two processes, and what each of them noted."""
    out = tmp_path_factory.mktemp("measured")
    run_script(HERE / "measuring_rank.py", (tiny_models, out), 2)
    return out, [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", ["shared", "few", "stopped"])
def test_logs_of_two_processes_are_those_of_one(
    measured: tuple[Path, list[dict[str, Any]]], tiny_models: Path, tmp_path: Path, case: str
) -> None:
    train(case_config(tiny_models, tmp_path, case), log=lambda _: None)
    assert_same_logs(tmp_path / case, measured[0] / case)
    assert len(metrics_of(measured[0] / case)) == 1


@pytest.mark.parametrize(("case", "num_problems"), [("shared", 3), ("few", 1)])
def test_each_process_measures_its_share_only(
    measured: tuple[Path, list[dict[str, Any]]], case: str, num_problems: int
) -> None:
    """Twice the student and once the teacher are evaluated; the panel is drawn twice."""
    ids = [f"ledger1-held_out-0-{i}" for i in range(num_problems)]
    for rank, notes in enumerate(measured[1]):
        asked = [prompts for seed, prompts in notes[case]["sampled"] if seed == EVALUATION_SEED]
        assert asked == [ids[rank::2]] * 3
        panels = [prompts for seed, prompts in notes[case]["sampled"] if seed[1:] == [777]]
        assert panels == [ids[rank::2]] * 2
    first, second = (notes[case]["num_passes"] for notes in measured[1])
    assert first == second > 0  # a teacher that they hold together is read by both as often


def test_a_signal_to_one_process_ends_the_evaluation_in_all(
    measured: tuple[Path, list[dict[str, Any]]],
) -> None:
    """Nothing of it is logged, and the next start repeats it."""
    first, second = (notes["stopped"] for notes in measured[1])
    assert first == second == [False, 0, [], True]


def test_what_ends_the_work_of_one_process_ends_that_of_all(
    measured: tuple[Path, list[dict[str, Any]]],
) -> None:
    first, second = (notes["endings"] for notes in measured[1])
    assert second == {
        "refused": "ConfigError: no such thing.",
        "failed": "ValueError: a\nb",
        "signalled": "StoppedError: ",
        "done": "went on",
    }
    assert first == {
        **second,
        "refused": "RunError: no such thing.",
        "failed": "RunError: process 1 failed: ValueError: a",
    }
