"""What stands beside the prompt in a record is rendered, refused or said; nothing is dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tutelage.data.columns import CHAT_AS_TEXT, LAST_ANSWER, notes_of
from tutelage.data.prompts import FileTask, PromptFormat, load_prompts
from tutelage.data.types import Prompt
from tutelage.errors import DataError

USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"a": None, "b": [1]}}}


def load(folder: Path, *records: dict[str, Any], **options: Any) -> list[Prompt]:
    path = folder / "p.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return load_prompts(path, PromptFormat(**options))


@pytest.mark.parametrize("key", ["messages", "prompt"])
def test_a_conversation_ends_before_the_answer_and_it_is_said_once(
    tmp_path: Path, key: str
) -> None:
    again = {"role": "user", "content": "and 3+3?"}
    found = load(
        tmp_path,
        {key: [USER, ANSWER]},
        {key: [USER, ANSWER, again, ANSWER]},
        {key: [USER, ANSWER, again]},
        suffix="!",
    )
    assert [len(prompt.content) for prompt in found] == [1, 3, 3]
    assert found[0].content == ({"role": "user", "content": "2+2?!"},)
    assert notes_of(found) == [f"{LAST_ANSWER} (2 prompts)"]


def test_a_conversation_of_the_assistant_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no turn but the assistant's"):
        load(tmp_path, {"messages": [ANSWER]})


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "what is this?", "images": ["a.png"]},
        {"prompt": "what is this?", "image": {"bytes": "x"}},
        {"prompt": "what is this?", "videos": ["a.mp4"]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, 5]}]},
    ],
)
def test_what_is_not_text_is_refused_in_one_line(tmp_path: Path, record: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"line 1.*is not text.*Remove the record") as caught:
        load(tmp_path, record)
    assert "\n" not in str(caught.value)


def test_empty_media_columns_are_no_media(tmp_path: Path) -> None:
    none = {"images": [], "image": None, "video": False, "audios": 0, "Picture": ""}
    assert load(tmp_path, {"prompt": "hi", **none})[0].notes == ()


def test_text_parts_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    found = load(tmp_path, {"messages": [{"role": "user", "content": parts}, ANSWER]})
    assert found[0].content == (USER,)


@pytest.mark.parametrize("given", [[TOOL], json.dumps([TOOL])])
def test_tools_go_with_the_prompt(tmp_path: Path, given: Any) -> None:
    found = load(tmp_path, {"messages": [USER], "tools": given}, {"messages": [USER], "tools": []})
    parameters = {"b": [1]}  # without the empty keys that parquet adds
    assert found[0].tools == (
        {"type": "function", "function": {"name": "add", "parameters": parameters}},
    )
    assert found[1].tools == ()
    # The same words with tools are another prompt: neither is taken for the other's held-out twin.
    assert len(FileTask("t", tuple(found), num_held_out=1).training) == 1


@pytest.mark.parametrize("given", ["no json", [5], {"name": "add"}])
def test_tools_of_another_form_are_refused(tmp_path: Path, given: Any) -> None:
    with pytest.raises(DataError, match="'tools' must be a list of objects"):
        load(tmp_path, {"messages": [USER], "tools": given})


def test_tools_need_a_chat(tmp_path: Path) -> None:
    record = {"prompt": "2+2?", "tools": [TOOL]}
    with pytest.raises(DataError, match="'tools' need a chat"):
        load(tmp_path, record)
    assert load(tmp_path, record, chat=True)[0].tools


def test_columns_that_change_the_meaning_elsewhere_are_said(tmp_path: Path) -> None:
    record = {"prompt": "2+2?", "system": "be brief", "input": "", "subject": "sums"}
    assert notes_of(load(tmp_path, record, record)) == [
        "the column 'system' is not part of the prompt (2 prompts)"
    ]
    named = load(tmp_path, {"instruction": "2+2?"}, prompt_column="instruction")
    assert notes_of(named) == []


@pytest.mark.parametrize("role", ["assistant", "Assistant", "model", "gpt", "ai", "bot"])
def test_an_answer_at_the_end_has_many_names(tmp_path: Path, role: str) -> None:
    found = load(tmp_path, {"messages": [USER, {"role": role, "content": "four"}]})
    assert found[0].content == (USER,)
    assert found[0].notes


@pytest.mark.parametrize("column", ["image_url", "Image", "VIDEOS", "multi_modal_data"])
def test_media_have_many_names(tmp_path: Path, column: str) -> None:
    with pytest.raises(DataError, match=f"'{column}' is not text"):
        load(tmp_path, {"prompt": "2+2?", column: "a.png"})
    assert load(tmp_path, {"prompt": "2+2?", column: ""})


@pytest.mark.parametrize("column", ["choices", "system_message", "available_tools", "passage"])
def test_other_columns_that_belong_to_a_prompt_are_said(tmp_path: Path, column: str) -> None:
    assert column in load(tmp_path, {"prompt": "2+2?", column: ["a"]})[0].notes[0]


def test_a_conversation_as_json_text_is_a_conversation(tmp_path: Path) -> None:
    turns = [USER, {"role": "assistant", "content": "four"}]
    records = {"prompt": json.dumps(turns)}, {"prompt": "[1, 2] is a list"}
    found = load(tmp_path, *records, chat=True)
    assert [prompt.content for prompt in found] == [
        (USER,),
        ({"role": "user", "content": "[1, 2] is a list"},),
    ]
    texts = load(tmp_path, *records, chat=False)
    assert [prompt.content for prompt in texts] == [record["prompt"] for record in records]
    assert [prompt.notes for prompt in texts] == [(CHAT_AS_TEXT,), ()]
