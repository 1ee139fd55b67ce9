"""Prompt files with all their faults, data sets, and the task made of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tutelage.data.formats as formats_module
from tutelage.data.prompts import (
    FileTask,
    PromptFormat,
    find_file,
    fitting_grader,
    load_completions,
    load_prompts,
)
from tutelage.data.tasks import Task
from tutelage.data.types import Prompt
from tutelage.errors import ConfigError, DataError, MissingExtraError


def write(folder: Path, *lines: object, name: str = "p.jsonl") -> Path:
    path = folder / name
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


# --- reading --------------------------------------------------------------------------------------


def test_every_kind_of_record(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2"}]
    path = write(
        tmp_path,
        {"prompt": "a", "answer": "1", "id": "x"},
        "",
        {"problem": "b", "answer": 2},
        {"question": "c", "id": 7},
        {"prompt": turns, "answer": 0.5},
        {"messages": turns, "answer": None},
    )
    assert load_prompts(path) == [
        Prompt("x", "a", "1"),
        Prompt("p/2", "b", "2"),
        Prompt("7", "c", None),
        Prompt("p/4", tuple(turns), "0.5"),
        Prompt("p/5", tuple(turns), None),
    ]


def test_chat_wrapping_suffix_and_columns(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}]
    path = write(tmp_path, {"q": "a", "gold": "1", "prompt": "no"}, {"q": turns})
    prompt_format = PromptFormat("q", "gold", chat=True, suffix="\nThink.")
    first, second = load_prompts(path, prompt_format)
    assert first.content == ({"role": "user", "content": "a\nThink."},)
    assert first.answer == "1"
    assert second.content == ({"role": "user", "content": "hi\nThink."},)


def test_a_byte_order_mark_and_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\nnot reached')
    assert [p.content for p in load_prompts(path, limit=2)] == ["a", "b"]
    with pytest.raises(ConfigError, match="limit must be at least 1, got 0"):
        load_prompts(path, limit=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ('["a"]', "line 2: must be a JSON object, got"),
        ({"text": "a"}, r"line 2: needs one of the keys 'prompt', .*got 'text'"),
        ({}, "line 2: .*got no keys"),
        ({"prompt": ""}, "line 2: 'prompt' is empty"),
        ({"prompt": " \n"}, "line 2: 'prompt' is empty"),
        ({"prompt": 5}, "line 2: 'prompt' must be text or a list of messages, got 5"),
        ({"prompt": []}, "line 2: 'prompt' must be text or a list of messages"),
        ({"prompt": ["hi"]}, "line 2: 'prompt': a message must be"),
        ({"prompt": [{"role": "user"}]}, "line 2: 'prompt': a message must be"),
        ({"prompt": [{"role": "user", "content": None}]}, "line 2: .*'content' of a message"),
        ('{"prompt": "\\ud800"}', "line 2: 'prompt' is not valid text"),
        ('{"prompt": "b", "id": "\\ud800"}', "line 2: 'id' is not valid text"),
        ('{"prompt": "b", "answer": "\\udfff"}', "line 2: 'answer' is not valid text"),
        ('{"prompt": [{"role": "\\ud800", "content": "b"}]}', "line 2: 'prompt' is not valid"),
        (
            '{"prompt": [{"role": "user", "content": "b", "name": "\\ud800"}]}',
            "line 2: 'prompt' is not valid text",
        ),
        ({"prompt": "b", "answer": ["1"]}, "line 2: 'answer' must be text or a number"),
        ({"prompt": "b", "answer": True}, "line 2: 'answer' must be text or a number"),
        ('{"prompt": "b", "answer": NaN}', "line 2: 'answer' must be text or a number, got nan"),
        ('{"prompt": "b", "answer": 1e999}', "line 2: 'answer' must be .* number, got inf"),
        ('{"prompt": "b", "answer": ' + "9" * 5000 + "}", "line 2: not JSON"),
        ('{"prompt": "b"} {"prompt": "c"}', "line 2: not JSON"),
        ('{"prompt": "b\0"}', "line 2: not JSON"),
        ("\0\0\0", "line 2: not JSON"),
        ("\ufeff{}", "line 2: not JSON"),
        ('{"prompt": "' + "b" * 10**6, "line 2: not JSON"),
        ('{"a":' * 100_000, "line 2: not JSON"),
        ({f"key{i}": i for i in range(9999)}, "line 2: .*got 'key0', .* and 9990 more"),
        ({"k" * 10**6: 1}, "line 2: .*got 'kkk"),
        ('[{"prompt": "b"}]', "line 2: must be a JSON object"),
        ({"prompt": "b", "id": {}}, "line 2: 'id' must be text or a number"),
        ({"prompt": "b", "id": "x"}, "line 2: id 'x' was used before"),
    ],
)
def test_faults_name_file_and_line(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path, {"prompt": "a", "id": "x"}, line)
    with pytest.raises(DataError, match=message) as caught:
        load_prompts(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        load_prompts(path)


def test_a_line_of_ten_megabytes_and_characters_that_look_like_ends_of_lines(
    tmp_path: Path,
) -> None:
    texts = ["b" * 10**7, "a\u2028b\x85c\x0bd", "a\0b", "a\rb"]
    path = write(tmp_path, *({"prompt": text} for text in texts))
    assert [p.content for p in load_prompts(path)] == texts


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_what_is_no_file_is_told_so(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.mkdir()
    with pytest.raises(DataError, match="does not exist, looked for"):
        load_prompts(path)
    path.rmdir()
    path.symlink_to(name)
    with pytest.raises(DataError, match="does not exist, looked for"):
        load_prompts(path)


@pytest.mark.skipif(not Path("/proc/self/mem").is_file(), reason="needs Linux")
def test_a_file_that_cannot_be_read() -> None:
    """Its first byte is an input/output error, for root too."""
    with pytest.raises(DataError, match="/proc/self/mem cannot be read: Input/output error"):
        load_prompts("/proc/self/mem")


def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_prompts("x" * 5000 + ".jsonl")


def test_completions_that_are_no_text(tmp_path: Path) -> None:
    path = write(tmp_path, '{"prompt": "a", "completion": "\\ud800"}')
    with pytest.raises(DataError, match="line 1: 'completion' is not valid text"):
        load_completions(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no prompts"):
        load_prompts(write(tmp_path, "", ""))


def test_bare_names_are_looked_for_in_the_data_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, here = tmp_path / "shared", tmp_path / "here"
    for folder in (shared, here / "data"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("TUTELAGE_DATA", str(shared))
    expected = (here / "q.jsonl", shared / "q.jsonl", here / "data" / "q.jsonl")
    with pytest.raises(DataError) as caught:
        load_prompts("q.jsonl")
    assert ", ".join(map(str, expected)) in str(caught.value)
    for path in reversed(expected):  # nearer places win
        write(path.parent, {"prompt": "a"}, name="q.jsonl")
        assert find_file("q.jsonl").absolute() == path
    with pytest.raises(DataError, match=r"'sub/q\.jsonl' does not exist"):
        find_file("sub/q.jsonl")


# --- data sets ------------------------------------------------------------------------------------


def test_a_data_set_is_read_like_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"question": "1+1", "answer": "#### 2"}] * 2)
    asked: list[Any] = []

    def fake(*arguments: Any, **options: Any) -> datasets.Dataset:
        asked.append((arguments, options))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", fake)
    prompts = load_prompts("openai/gsm8k", split="test", subset="main")
    assert prompts[1] == Prompt("openai/gsm8k/2", "1+1", "2")
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]


def test_a_data_set_that_cannot_be_read_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.setattr(formats_module, "is_hub_reachable", lambda: False)
    with pytest.raises(DataError, match=r"'a/b' is not in the cache .* hub cannot be reached"):
        load_prompts("a/b")
    monkeypatch.setattr(formats_module, "is_hub_reachable", lambda: True)
    with pytest.raises(DataError, match="cannot read split 'train' of the data set 'a/b': no net"):
        load_prompts("a/b")


def test_data_sets_without_their_package_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats_module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install 'datasets'"):
        load_prompts("a/b")


# --- the task -------------------------------------------------------------------------------------

POOL = tuple(Prompt(str(i), f"prompt {i}", str(i)) for i in range(10))


@given(st.integers(1, 12), st.integers(0, 3), st.integers(0, 5))
def test_epochs_give_every_training_prompt_once(size: int, seed: int, held_out: int) -> None:
    task = FileTask("t", POOL, num_held_out=held_out)
    steps = [task.prompts(step, size, seed) for step in range(30)]
    stream = [prompt for step in steps for prompt in step]
    length = len(POOL) - held_out
    for start in range(0, len(stream) - length, length):
        assert len({p.id for p in stream[start : start + length]}) == length
    assert FileTask("t", POOL, num_held_out=held_out).prompts(7, size, seed) == steps[7]
    assert not {p.id for p in stream} & {p.id for p in task.held_out(99)}


def test_epochs_and_seeds_differ() -> None:
    task = FileTask("t", POOL)
    orders = {
        tuple(p.id for p in task.prompts(step, 10, seed))
        for step, seed in [(0, 0), (1, 0), (0, 1), (1, 1)]
    }
    assert len(orders) == 4


def test_prompts_do_not_depend_on_what_was_asked_before() -> None:
    task = FileTask("t", POOL)
    later = task.prompts(5, 3, 0)
    task.prompts(0, 7, 1)
    assert task.prompts(5, 3, 0) == later


def test_the_held_out_part_is_fixed_and_shuffled_by_seed_only() -> None:
    task = FileTask("t", POOL, num_held_out=4)
    fixed = task.held_out(4)
    assert task.held_out(2) == fixed[:2]
    assert len(task.held_out(99)) == 4
    assert Counter(p.id for p in task.held_out(4, seed=1)) == Counter(p.id for p in fixed)
    assert any(task.held_out(4, seed=s) != fixed for s in range(1, 5))
    other = FileTask("t", POOL, num_held_out=4, split_seed=1).held_out(4)
    assert {p.id for p in other} != {p.id for p in fixed}


def test_training_never_repeats_a_held_out_text_under_another_id() -> None:
    twin = Prompt("twin", POOL[3].content, "3")
    task = FileTask("t", (*POOL, twin), held_out_prompts=(POOL[3],))
    stream = [p.id for p in task.prompts(0, 30, 0)]
    assert set(stream) == {p.id for p in POOL} - {"3"}
    assert task.held_out(5) == [POOL[3]]


@pytest.mark.parametrize(
    ("grader", "text", "verdict", "if_cut_off"),
    [
        ("none", "7", None, None),
        ("number", "it is 7.0", True, False),
        ("number", "it is 8", False, False),
        ("number", r"\boxed{7} and so", True, True),
        ("number", "#### 7\nand so", True, True),
        ("number", "#### 7", True, False),  # it may go on: 72
        ("math", r"\boxed{7} and so", True, True),
        ("math", "The answer is 7.\nTo check", True, True),
        ("math", "The answer is 7", True, False),
        ("math", "so it is 7", False, False),
        ("exact", " 7\n", True, False),
        ("exact", "7.0", False, False),
    ],
)
def test_graders(grader: Any, text: str, verdict: bool | None, if_cut_off: bool | None) -> None:
    """One rule for all: a completion that was cut off counts if it had marked its answer."""
    task: Task = FileTask("t", POOL, grader=grader)
    assert task.grade(POOL[7], text) is verdict
    assert task.grade(POOL[7], text, True) is if_cut_off
    assert task.grade(Prompt("x", "no answer"), text) is None


@pytest.mark.parametrize(
    ("answers", "grader"),
    [
        (("7", "1,234.5", "-3/4", r"\frac{1}{2}", "48+24\n#### 72", None), "number"),
        (("7", r"\sqrt{2}"), "math"),
        (("(1,2)",), "math"),
        (("yes",), "math"),
    ],
)
def test_the_grader_that_fits_the_reference_answers(answers: Any, grader: str) -> None:
    assert fitting_grader(Prompt("p", "q", answer) for answer in answers) == grader


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"grader": "vibes"}, ConfigError, "data.grader must be one of .*got 'vibes'"),
        ({"num_held_out": -1}, ConfigError, "num_held_out must be at least 0, got -1"),
        ({"num_held_out": 10}, DataError, "no training prompts left of 10"),
        ({"num_held_out": 11}, DataError, "no training prompts left"),
        ({"held_out_prompts": POOL}, DataError, "no training prompts left"),
        ({"num_held_out": 1, "held_out_prompts": POOL[:1]}, ConfigError, "one of the two"),
    ],
)
def test_impossible_tasks_are_refused(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        FileTask("t", POOL, **options)
