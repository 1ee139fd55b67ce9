"""Public data sets as JSONL files: read wholly, and graded by their own reference answers.

TUTELAGE_DATA names the folder that holds gsm8k_train.jsonl, math_train12k.jsonl and
dapo_math_17k.jsonl; without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tutelage.data.prompts import FileTask, load_prompts
from tutelage.data.types import Prompt
from tutelage.grading.number import grade_number

FOLDER = os.environ.get("TUTELAGE_DATA", "")
FILES = {"gsm8k_train.jsonl": 7471, "math_train12k.jsonl": 11884, "dapo_math_17k.jsonl": 16163}

pytestmark = pytest.mark.skipif(
    not FOLDER or not all((Path(FOLDER) / name).is_file() for name in FILES),
    reason=f"TUTELAGE_DATA does not name a folder with {', '.join(FILES)}",
)


@pytest.fixture(scope="module")
def gsm8k() -> list[Prompt]:
    return load_prompts("gsm8k_train.jsonl")


@pytest.mark.parametrize(("name", "num_rows"), FILES.items())
def test_a_file_is_read_wholly(name: str, num_rows: int) -> None:
    prompts = load_prompts(name)
    with (Path(FOLDER) / name).open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    assert len(prompts) == len(records) == num_rows
    assert len({prompt.id for prompt in prompts}) == num_rows
    for prompt, record in zip(prompts, records, strict=True):
        expected = (record["id"], record["problem"], record["answer"])
        assert (prompt.id, prompt.content, prompt.answer) == expected


@pytest.mark.parametrize("form", ["{}", "#### {}", "So it is \\boxed{{{}}}.", "The answer is {}."])
def test_every_gold_grades_itself(gsm8k: list[Prompt], form: str) -> None:
    task = FileTask("gsm8k", tuple(gsm8k), "number")
    refused = [p.id for p in gsm8k if not task.grade(p, form.format(p.answer))]
    assert refused == []


def test_every_gold_with_one_digit_changed_is_refused(gsm8k: list[Prompt]) -> None:
    """Every digit of every answer, each to the next one."""
    accepted, tried = [], 0
    for prompt in gsm8k:
        gold = prompt.answer or ""
        for place, digit in enumerate(gold):
            if digit.isdigit():
                wrong = f"{gold[:place]}{(int(digit) + 1) % 10}{gold[place + 1 :]}"
                accepted += [prompt.id] if grade_number(f"#### {wrong}", gold) else []
                tried += 1
    assert tried > len(gsm8k)
    assert accepted == []


def test_training_and_held_out_problems_share_no_text(gsm8k: list[Prompt]) -> None:
    task = FileTask("gsm8k", tuple(gsm8k), "number", num_held_out=500)
    held_out = {str(prompt.content) for prompt in task.held_out(500)}
    trained = {str(prompt.content) for prompt in task.prompts(0, len(gsm8k) - 500, seed=1)}
    assert len(trained) > 6900
    assert not held_out & trained
