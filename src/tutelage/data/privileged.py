"""Prompts that tell a teacher more than they tell the student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tutelage.data.types import Prompt
from tutelage.errors import DataError

_BETWEEN = "\n\n"
"""Stands between a user's message and what the teacher reads beyond it."""


def privileged(prompt: Prompt, template: str, names: Sequence[str]) -> Prompt:
    """The prompt with what its teacher reads beyond it.

    In a chat that follows the last message of the user after a blank line; it stands directly
    before a prompt of plain text, which the completion goes on from.

    Args:
        prompt: with the fields that are named.
        template: of `str.format`, over those fields.
        names: of the fields in it.

    Raises:
        DataError: the prompt lacks a field, or a chat has no message of a user.
    """
    known = dict(prompt.fields)
    if prompt.answer is not None:
        known.setdefault("answer", prompt.answer)
    missing = next((name for name in names if name not in known), None)
    if missing is not None:
        there = ", ".join(map(repr, known)) or "none"
        raise DataError(
            f"prompt {prompt.id!r} lacks the field {missing!r} that teacher.context names; it has "
            f"{there}. Name another."
        )
    context = template.format_map(known)
    if isinstance(prompt.content, str):
        return replace(prompt, content=context + prompt.content)
    messages = [dict(message) for message in prompt.content]
    last = next((m for m in reversed(messages) if m["role"] == "user"), None)
    if last is None:
        raise DataError(
            f"prompt {prompt.id!r} has no message of a user for teacher.context to follow. Add "
            "one, or remove the record."
        )
    last["content"] += _BETWEEN + context
    return replace(prompt, content=tuple(messages))
