"""Where a teacher reads what it is told beyond the prompt."""

from __future__ import annotations

import pytest

from tutelage.data.formats import PromptFormat, to_prompt
from tutelage.data.privileged import privileged
from tutelage.data.types import Prompt
from tutelage.errors import DataError

CHAT = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "Which base?"},
    {"role": "user", "content": "Ten."},
)


def test_in_a_chat_it_follows_the_last_message_of_the_user_after_a_blank_line() -> None:
    told = privileged(Prompt("a", CHAT, "2"), "It is {answer}.", ("answer",))
    assert told.content == (*CHAT[:3], {"role": "user", "content": "Ten.\n\nIt is 2."})
    assert CHAT[3]["content"] == "Ten."


def test_before_plain_text_it_stands_directly() -> None:
    prompt = Prompt("a", "1+1=", "2", fields=(("way", "{add}"), ("answer", "two")))
    assert privileged(prompt, "{way}{{{answer}}} ", ("way", "answer")).content == "{add}{two} 1+1="


def test_a_chat_without_a_user_is_refused() -> None:
    with pytest.raises(DataError, match="'a' has no message of a user"):
        privileged(Prompt("a", CHAT[:1], "2"), "{answer}", ("answer",))


def test_a_column_comes_before_the_reference_answer() -> None:
    record = {"question": "q", "answer": "1+1=2\n#### 2", "steps": 1}
    read = to_prompt(record, "line 1", "x/1", PromptFormat(fields=("answer", "steps")))
    assert (read.answer, dict(read.fields)) == ("2", {"answer": "1+1=2\n#### 2", "steps": "1"})
    boxed = {"problem": "q", "solution": r"so \boxed{3}"}
    read = to_prompt(boxed, "line 1", "x/1", PromptFormat(fields=("answer", "solution")))
    assert dict(read.fields) == {"answer": "3", "solution": boxed["solution"]}


@pytest.mark.parametrize("value", [None, ""])
def test_nothing_in_a_column_is_a_missing_field(value: str | None) -> None:
    record = {"prompt": "q", "way": value}
    with pytest.raises(DataError, match=r"'x/1' lacks the field 'way'.*it has 'prompt'"):
        to_prompt(record, "line 1", "x/1", PromptFormat(fields=("way",)))


def test_a_column_that_is_read_is_not_reported_as_left_out() -> None:
    record = {"prompt": "q", "hint": "h", "context": "c"}
    assert len(to_prompt(record, "line 1", "x/1", PromptFormat()).notes) == 2
    (note,) = to_prompt(record, "line 1", "x/1", PromptFormat(fields=("hint",))).notes
    assert "'context'" in note
