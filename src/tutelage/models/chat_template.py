"""Chat templates: programs that come with models, rendered in a process with limits.

transformers renders them in jinja2's sandbox, which keeps them from everything but the time and
the memory of this process. Here they get ten seconds, 256 MiB and a length, in a process that
starts with the first chat prompt, is reused, and ends with the interpreter.
"""

from __future__ import annotations

import atexit
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from tutelage.errors import DataError, ModelError, RunError
from tutelage.grading.child import Child

TIME_LIMIT_S = 10.0
"""Seconds for one conversation; it normally takes less than a thousandth of one."""
MAX_CHARACTERS = 1 << 20
"""Characters that a template may write besides four times those of its messages."""

_OTHER_WORDS = ("word", "text")
"""What a message is replaced with, to see whether a template reads it."""
_PROGRAM = Path(__file__).with_name("_template_worker.py")


class Renderer:
    """One process, started when it is needed and replaced when it was killed."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._parents: Child | None = None
        self._lock = threading.Lock()
        self.date: datetime | None = None
        """What templates take for the present; None for the clock's."""

    def reply(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """What the process answers; None if it ran out of time or died."""
        with self._lock, ExitStack() as on_error:
            child = self._child if self._child and self._child.is_alive else Child(_PROGRAM)
            self._child = None
            # After an interrupt its answer must not be taken for that to another request.
            on_error.callback(child.kill)
            if not child.has_started():
                raise RunError("the process for chat templates did not start. Is memory left?")
            alarm = {"alarm_s": int(TIME_LIMIT_S) + 2}
            reply = child.request({**request, **alarm}, time.monotonic() + TIME_LIMIT_S)
            on_error.pop_all()
            self._child = child if reply else None
        return reply

    def close(self) -> None:
        """End the process."""
        with self._lock:
            child, self._child = self._child, None
        if child is not None:
            child.kill()

    def forget(self) -> None:
        """After a fork: the process is the parent's, and is kept only not to be collected."""
        self._parents, self._child = self._child, None
        self._lock = threading.Lock()


_renderer = Renderer()
atexit.register(_renderer.close)
os.register_at_fork(after_in_child=_renderer.forget)


@contextmanager
def printed_date(date: datetime | None) -> Iterator[None]:
    """Inside, templates that print the date print this one; None leaves it to the clock.

    A run, or an evaluation, that goes on after midnight keeps the prompts that it began with.
    """
    before, _renderer.date = _renderer.date, date
    try:
        yield
    finally:
        _renderer.date = before


def printed_date_of(evaluation: datetime | None) -> AbstractContextManager[None]:
    """`printed_date` of when an evaluation began, unless the run whose model it is has a date."""
    return printed_date(_renderer.date or evaluation)


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, str]],
    variables: Mapping[str, Any],
    prompt_id: str,
    model: str,
) -> str:
    """The text of a conversation, ready for the model's next turn, under limits.

    Args:
        template: Chat template, not trusted.
        messages: Turns of the conversation.
        variables: What the template sees besides: special tokens, switches.
        prompt_id: Named in errors.
        model: Named in errors.

    Raises:
        DataError: the template refuses the messages.
        ModelError: the template is no valid one, or exceeds a limit.
    """
    shown = {"tools": None, "documents": None, "add_generation_prompt": True}
    length = sum(len(text) for message in messages for text in message.values())
    length += len(json.dumps(variables))  # tools may be long
    request = {
        "template": template,
        "variables": {**shown, **variables, "messages": [dict(message) for message in messages]},
        "max_characters": MAX_CHARACTERS + 4 * length,
        "date": None if _renderer.date is None else _renderer.date.isoformat(),
    }
    stopped = {
        "fault": "template",
        "reason": f"stopped after {TIME_LIMIT_S:.0f} s or out of memory",
    }
    reply = _renderer.reply(request) or stopped
    if "text" in reply:
        text = str(reply["text"])
        if not any("\ud800" <= character <= "\udfff" for character in text):
            return text
        reply = {"fault": "template", "reason": "it writes half a surrogate pair"}
    reason = " ".join(str(reply["reason"]).split())[:200].rstrip(".")
    if reply["fault"] == "template":
        raise ModelError(
            f"the chat template of {model!r} fails at prompt {prompt_id!r}: {reason}. Use another "
            "model, or plain text prompts (data.chat = false, or --no-chat)."
        )
    raise DataError(
        f"prompt {prompt_id!r} does not fit the chat template: {reason}. "
        "Check the roles and the order of its messages."
    )


def refuse_lost_turns(
    template: str,
    messages: Sequence[Mapping[str, str]],
    variables: Mapping[str, Any],
    prompt_id: str,
    model: str,
    rendered: str,
) -> None:
    """Refuses a message that has no effect on what a template writes.

    Many templates leave out roles that they do not know. Others consume a switch in a message, or
    write it in another way: these write something else when it holds another word.

    Args:
        template: as for `render_chat`, like what follows.
        messages: turns of the conversation.
        variables: what the template sees besides.
        prompt_id: named in errors.
        model: named in errors.
        rendered: the text of the conversation.

    Raises:
        DataError: there is one.
    """
    for at in _doubtful_turns(rendered, messages):
        turn = messages[at]
        word = next(word for word in _OTHER_WORDS if word != turn["content"].strip())
        others = (*messages[:at], {**turn, "content": word}, *messages[at + 1 :])
        try:
            is_lost = render_chat(template, others, variables, prompt_id, model) == rendered
        except (DataError, ModelError):  # a template that refuses other words reads them
            is_lost = False
        if is_lost:
            raise DataError(
                f"prompt {prompt_id!r} has a message of the role {turn['role']!r}, which the chat "
                f"template of {model!r} leaves out. Use a role that it knows."
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
