"""Chat templates, rendered by the tokenizer: the same text in every process and on any day."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateSyntaxError
from jinja2.exceptions import SecurityError

from tutelage.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OTHER_WORDS = ("word", "text")
"""What a message is replaced with, to see whether a template reads it."""
_BY_TEMPLATE = (
    TemplateSyntaxError, SecurityError, SyntaxError, AssertionError, RecursionError, MemoryError,
)  # fmt: skip
"""Errors that no other messages would mend."""

_random_lock = threading.Lock()
_date: datetime | None = None
"""What templates take for the present; None for the clock's."""


@contextmanager
def printed_date(date: datetime | None) -> Iterator[None]:
    """Inside, templates that print the date print this one; None leaves it to the clock.

    A run, or an evaluation, that goes on after midnight keeps the prompts that it began with.
    """
    global _date
    before, _date = _date, date
    try:
        yield
    finally:
        _date = before


def printed_date_of(evaluation: datetime | None) -> AbstractContextManager[None]:
    """`printed_date` of when an evaluation began, unless the run whose model it is has a date."""
    return printed_date(_date or evaluation)


def template_of(
    tokenizer: PreTrainedTokenizerBase, tools: Sequence[Mapping[str, Any]], prompt_id: str
) -> str:
    """The chat template of a tokenizer that renders these tools; it may have another one without.

    Raises:
        ModelError: it has none.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            f"prompt {prompt_id!r} is a chat, but the tokenizer {tokenizer.name_or_path!r} has no "
            "chat template. Use prompts of plain text, not of messages, and data.chat = false or "
            "--no-chat."
        )
    try:
        return str(tokenizer.get_chat_template(tools=list(tools) or None))
    except ValueError as error:  # several templates, none of them the default
        raise ModelError(
            f"the tokenizer {tokenizer.name_or_path!r} has no default chat template, got "
            f"{', '.join(tokenizer.chat_template)}. Use plain text prompts (data.chat = false, or "
            "--no-chat)."
        ) from error


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    prompt_id: str,
) -> str:
    """The text of a conversation, ready for the model's next turn.

    Args:
        tokenizer: renders it.
        template: one of its chat templates.
        messages: turns of the conversation.
        variables: what the template sees besides: switches, tools.
        prompt_id: named in errors.

    Raises:
        DataError: the template refuses the messages.
        ModelError: the template is no valid one.
    """
    try:
        with _same_choices():
            text = str(
                tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    chat_template=template,
                    add_generation_prompt=True,
                    tokenize=False,
                    strftime_now=(_date or datetime.now()).strftime,
                    **variables,
                )
            )
        text.encode()  # half a surrogate pair, which no tokenizer takes
        return text
    except _BY_TEMPLATE as error:
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path!r} fails at prompt {prompt_id!r}: "
            f"{_reason(error)}. Use another model, or plain text prompts (data.chat = false, or "
            "--no-chat)."
        ) from error
    except Exception as error:  # a template's own message, or any mistake of its expressions
        raise DataError(
            f"prompt {prompt_id!r} does not fit the chat template: {_reason(error)}. "
            "Check the roles and the order of its messages."
        ) from error


@contextmanager
def _same_choices() -> Iterator[None]:
    """Inside, the filter that picks at random picks the same, in every process and thread."""
    with _random_lock:
        state = random.getstate()
        random.seed(0)
        try:
            yield
        finally:
            random.setstate(state)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


def refuse_lost_turns(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[Mapping[str, str]],
    variables: Mapping[str, Any],
    prompt_id: str,
    rendered: str,
) -> None:
    """Refuses a message that has no effect on what a template writes.

    Many templates leave out roles that they do not know. Others consume a switch in a message, or
    write it in another way: these write something else when it holds another word.

    Args:
        tokenizer: as for `render_chat`, like what follows.
        template: one of its chat templates.
        messages: turns of the conversation.
        variables: what the template sees besides.
        prompt_id: named in errors.
        rendered: the text of the conversation.

    Raises:
        DataError: there is one.
    """
    for at in _doubtful_turns(rendered, messages):
        turn = messages[at]
        word = next(word for word in _OTHER_WORDS if word != turn["content"].strip())
        others = (*messages[:at], {**turn, "content": word}, *messages[at + 1 :])
        try:
            is_lost = render_chat(tokenizer, template, others, variables, prompt_id) == rendered
        except (DataError, ModelError):  # a template that refuses other words reads them
            is_lost = False
        if is_lost:
            raise DataError(
                f"prompt {prompt_id!r} has a message of the role {turn['role']!r}, which the chat "
                f"template of {tokenizer.name_or_path!r} leaves out. Use a role that it has."
            )


def _doubtful_turns(rendered: str, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Messages that a template may have left out.

    None where all stand in the rendered text, word by word and in their order. Of what an assistant
    said, templates leave thoughts out, and what tools returned they write in their own way: neither
    is looked for.
    """
    turns = [i for i, m in enumerate(messages) if m["role"] not in ("assistant", "model", "tool")]
    text, end = " ".join(rendered.split()), 0
    for turn in turns:
        words = " ".join(messages[turn]["content"].split())
        found = text.find(words, end)
        if found < 0:
            return turns
        end = found + len(words)
    return []
