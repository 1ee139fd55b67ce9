"""Two processes (gloo) take the same steps as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from rank import CASES, two_steps
from safetensors.torch import load_file
from stepping import distance

from ranks import run_script

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    """Folder with what both ranks saw."""
    out = tmp_path_factory.mktemp("ranks")
    run_script(HERE / "rank.py", (tiny_models, out), 2)
    return out


def seen_by(folder: Path, rank: int, case: str) -> dict[str, Any]:
    seen: dict[str, Any] = json.loads((folder / f"rank{rank}" / f"{case}.json").read_text())
    weights = load_file(folder / f"rank{rank}" / f"{case}.safetensors")
    return seen | {"weights": weights}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def known() -> dict[str, dict[str, Any]]:
    """What a single process has seen, by case."""
    return {}


@pytest.fixture
def one(tiny_models: Path, case: str, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a single process sees."""
    if case not in known:
        known[case] = two_steps(case, tiny_models, Accelerator(cpu=True))
    return known[case]


def test_two_ranks_keep_the_same_rows_and_learn_the_same_weights(
    two_ranks: Path, one: dict[str, Any], case: str
) -> None:
    both = [seen_by(two_ranks, rank, case) for rank in (0, 1)]
    shares = [rank["completions"] for rank in both]
    whole = {i: list(ids) for i, ids in one["completions"].items()}
    assert shares[0] | shares[1] == whole
    assert len(shares[0]) == len(shares[1]) == len(whole) / 2
    assert case == "repeated" or len({len(ids) for ids in whole.values()}) > 1  # ragged
    assert len(set(map(str, whole.values()))) == len(whole)  # no two alike, repeated prompts or not
    names = list(one["weights"])
    limit = 1e-6 if case == "recorded" else 1e-9
    for rank in both:
        assert rank["chosen"] == one["chosen"]
        found, expected = ([x["weights"][n] for n in names] for x in (rank, one))
        assert distance(found, expected) <= limit
    assert all(torch.equal(both[0]["weights"][n], both[1]["weights"][n]) for n in names)


def test_equal_scores_go_to_the_first_tokens_of_the_first_completions(tiny_models: Path) -> None:
    """Of a batch of ties, document order decides: not length, by which micro-batches are cut."""
    chosen = two_steps("ties", tiny_models, Accelerator(cpu=True))["chosen"]
    assert chosen[0] == list(range(len(chosen[0])))
    assert chosen[1] != list(range(len(chosen[1])))  # one step on, no two scores are equal


def test_both_ranks_report_the_numbers_of_the_whole_batch(
    two_ranks: Path, one: dict[str, Any], case: str
) -> None:
    limit = 1e-5 if case == "recorded" else 1e-9
    for rank in (0, 1):
        seen = seen_by(two_ranks, rank, case)["metrics"]
        for row, row_of_one in zip(seen, one["metrics"], strict=True):
            found, expected = flat(row), flat(row_of_one)
            for numbers in (found, expected):  # rounding itself, which depends on the batch's shape
                assert numbers.pop("max_relative_hidden_gap", 0.0) < 1e-5
            assert found == pytest.approx(expected, rel=limit)


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """A nested table as one level of dotted keys, without what is None."""
    found: dict[str, float] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[f"{prefix}{key}"] = value
    return found


def test_a_rank_that_keeps_nothing_is_among_the_cases(two_ranks: Path) -> None:
    assert [len(rows) for rows in seen_by(two_ranks, 0, "one")["chosen"]] == [1, 1]
