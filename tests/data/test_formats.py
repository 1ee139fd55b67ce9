"""Other people's data: verl's parquet, TRL's prompts, the hub's benchmarks, and their faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from tutelage.data.prompts import FileTask, PromptFormat, load_prompts
from tutelage.data.suites import AGENT_BENCHMARKS, BENCHMARKS, BOXED, SETS, SUITES, find_suite
from tutelage.data.types import Prompt
from tutelage.errors import ConfigError, DataError

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{}"
    '\n\nRemember to put your answer on its own line after "Answer:".'
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def verl(text: str, gold: Any, index: int = 0) -> dict[str, Any]:
    """A row as verl's data preparation writes it."""
    return {
        "data_source": "math_dapo",
        "prompt": [user(text)],
        "ability": "MATH",
        "reward_model": {"style": "rule", "ground_truth": gold},
        "extra_info": {"index": index},
    }


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that TUTELAGE_DATA names."""
    monkeypatch.setenv("TUTELAGE_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- formats --------------------------------------------------------------------------------------


def test_verl_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "train.parquet", [verl("1+1", "2"), verl("2+2", "4", 1)])
    assert load_prompts(path, PromptFormat(suffix=" Go.")) == [
        Prompt("train/1", (user("1+1 Go."),), "2"),
        Prompt("train/2", (user("2+2 Go."),), "4"),
    ]


def test_a_parquet_file_of_several_row_groups_is_read_wholly(tmp_path: Path) -> None:
    rows = [verl(f"{i}+1", str(i + 1), i) for i in range(3000)]
    prompts = load_prompts(write_parquet(tmp_path / "x.parquet", rows, row_group_size=700))
    assert [p.answer for p in prompts] == [str(i + 1) for i in range(3000)]
    assert len({p.id for p in prompts}) == 3000


def test_trl_prompts_as_text_and_as_messages(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, user("hi")]
    rows = [{"prompt": [{**turn, "name": None} for turn in turns]}]
    path = write_parquet(tmp_path / "trl.parquet", rows)
    assert load_prompts(path)[0].content == tuple(turns)
    text = write_parquet(tmp_path / "text.parquet", [{"prompt": "hi", "solution": "none boxed"}])
    assert load_prompts(text) == [Prompt("text/1", "hi", None)]


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        ({"answer": "She has 3 + 4 = <<3+4=7>>7.\n#### 1,007"}, "1,007"),
        ({"answer": "7", "solution": r"\boxed{8}"}, "7"),
        ({"final_answer": [r"\frac{1}{2}"]}, r"\frac{1}{2}"),
        ({"solution": r"first \boxed{1}, then \boxed{\frac{1}{2}}."}, r"\frac{1}{2}"),
        ({"solution": r"unfinished \boxed{\frac{1}{2}"}, None),
        ({"solution": "no box"}, None),
        ({"reward_model": {"ground_truth": 5}}, "5"),
        ({"reward_model": {"style": "rule"}}, None),
        ({"reward_model": {"ground_truth": ["x"]}}, "x"),
    ],
)
def test_where_the_answer_stands(tmp_path: Path, record: dict[str, Any], answer: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"problem": "p"} | record))
    assert load_prompts(path)[0].answer == answer


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": []}, "row 3: 'prompt' must be text or a list of messages"),
        ({"prompt": [{"role": "user", "content": None}]}, "row 3: .*'content' of a message must"),
        ({"prompt": [{"role": None, "content": "x"}]}, "row 3: .*'role' of a message must be"),
        ({"prompt": None}, "row 3: needs one of the keys"),
        (
            {"reward_model": {"style": "rule", "ground_truth": ["a", "b"]}},
            "row 3: 'reward_model.ground_truth' must be text or a number",
        ),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = verl("1+1", ["2"])
    path = write_parquet(tmp_path / "x.parquet", [good, good, good | row])
    with pytest.raises(DataError, match=message) as raised:
        load_prompts(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": [1, 2]}, "row 1: 'prompt' must be text or a list of messages, got 1"),
        ({"prompt": [b"x"]}, "row 1: 'prompt' must be text or a list of messages, got b'x'"),
        ({"prompt": [[1, 2]]}, "row 1: 'prompt': a message must be"),
        ({"prompt": [[{"role": 1, "content": "x"}]]}, "row 1: 'prompt': 'role' of a message"),
        ({"prompt": pa.nulls(3)}, "row 1: needs one of the keys"),
        ({"prompt": pa.array([], pa.string())}, "holds no prompts"),
        ({"x": ["a"]}, "row 1: needs one of the keys .*got 'x'"),
        ({"prompt": ["a"], "answer": [True]}, "row 1: 'answer' must be text or a number"),
        ({"prompt": ["a"], "answer": [float("nan")]}, "row 1: 'answer' must be .*got nan"),
        (
            {"prompt": ["a"], "answer": pa.array([1], pa.decimal128(5, 2))},
            "row 1: 'answer' must be text or a number",
        ),
    ],
)
def test_columns_of_other_types_are_named(tmp_path: Path, columns: Any, message: str) -> None:
    parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=message) as raised:
        load_prompts(tmp_path / "x.parquet")
    assert "\n" not in str(raised.value)


def test_a_damaged_parquet_file_is_one_line(tmp_path: Path) -> None:
    """Each cut and each overwritten stretch is refused or leaves as many prompts."""
    path = write_parquet(tmp_path / "x.parquet", [verl(f"{i}?", str(i)) for i in range(300)])
    content, expected = path.read_bytes(), load_prompts(path)
    refusals = []
    damaged = [content[: len(content) * i // 8] for i in range(8)]
    damaged += [
        content[:at] + b"\xff" * 24 + content[at + 24 :]
        for at in range(0, len(content) - 24, len(content) // 24)
    ]
    for text in damaged:
        path.write_bytes(text)
        try:
            prompts = load_prompts(path)
        except DataError as error:
            refusals.append(str(error))
        else:
            assert len(prompts) == len(expected)
    assert len(refusals) >= 12
    assert not any("\n" in line for line in refusals)
    path.write_text("not parquet")
    with pytest.raises(DataError, match="row 1 or after: not readable as parquet"):
        load_prompts(path)


# --- named sets -----------------------------------------------------------------------------------


def test_dapo_loses_its_own_instructions_and_its_repeats(data: Path) -> None:
    rows = [verl(DAPO.format(text), gold) for text, gold in [("1+1", "2"), ("2+2", "4")] * 3]
    write_parquet(data / "dapo-math-17k.parquet", rows)
    prompts = load_prompts("dapo-math-17k")
    assert [(p.content, p.answer) for p in prompts] == [
        ((user("1+1" + BOXED),), "2"),
        ((user("2+2" + BOXED),), "4"),
    ]


def test_a_named_set_takes_its_suffix_unless_another_is_given(data: Path) -> None:
    line = json.dumps({"question": "1+1", "answer": "It is.\n#### 2"})
    (data / "gsm8k_test.jsonl").write_text(line)
    assert load_prompts("gsm8k")[0] == Prompt("gsm8k_test/1", "1+1" + BOXED, "2")
    own = load_prompts("gsm8k", PromptFormat(chat=True, suffix=" Hm."))
    assert own[0].content == (user("1+1 Hm."),)
    assert load_prompts("gsm8k", PromptFormat(suffix=""))[0].content == "1+1"


def test_a_missing_set_says_in_one_line_where_to_get_it(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"aime25 is not here.*math-ai/aime25.*JSON lines") as error:
        load_prompts("aime25")
    assert "\n" not in str(error.value)


def test_suites() -> None:
    known = {*BENCHMARKS, *AGENT_BENCHMARKS}
    assert all(set(suite.benchmarks) <= known for suite in SUITES.values())
    tip, eopd = SUITES["tip"], SUITES["eopd"]
    assert (tip.num_samples, tip.temperature, tip.top_p) == (16, 1.0, 1.0)
    assert (eopd.num_samples, eopd.temperature, eopd.top_p) == (8, 1.0, 0.8)
    assert len(eopd.benchmarks) == 6
    assert find_suite("gsm8k, math500,gsm8k").benchmarks == ("gsm8k", "math500")
    with pytest.raises(ConfigError, match="'gsm9k' is unknown"):
        find_suite("gsm8k,gsm9k")
    assert all(named.suffix == BOXED for named in SETS.values())


# --- long prompts ---------------------------------------------------------------------------------


def test_long_prompts_are_left_out_and_counted_before_the_split() -> None:
    pool = tuple(Prompt(str(i), "x" * i) for i in range(1, 21))
    task = FileTask("t", pool, num_held_out=3).without(lambda p: len(p.content) > 12)
    assert task.num_dropped == 8
    seen = {p.id for p in [*task.prompts(0, 9, 0), *task.held_out(9)]}
    assert seen == {str(i) for i in range(1, 13)}
    with pytest.raises(DataError, match="no training prompts left"):
        task.without(lambda p: True)
