"""Columns of records beside prompt and answer: tools, media, and what is left out."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from tutelage.data.types import Prompt
from tutelage.errors import DataError

_MEDIA = re.compile(
    r"(?:image|video|audio|picture)s?(?:_(?:url|path|file|bytes)s?)?|pixel_values|multi_?modal_data",
    re.IGNORECASE,
)
_UNREAD = (
    *("system", "system_prompt", "context", "input", "instruction", "documents", "history"),
    *("functions", "chat_template_kwargs", "system_message", "system_instruction", "developer"),
    *("available_tools", "tool", "choices", "options", "passage", "hint"),
)
"""Columns that other programs make part of the prompt."""
LAST_ANSWER = "the assistant's turn at the end of the conversation is left out"
CHAT_AS_TEXT = (
    "a conversation written as JSON text is taken as it stands, without the chat template"
)


def refuse_media(record: dict[str, Any], where: str) -> None:
    """Raise DataError for a record with pictures, sound or film.

    Nothing, a flag that is off and a count of 0 say that it has none.
    """
    for key, value in record.items():
        if value and _MEDIA.fullmatch(str(key)):
            raise DataError(
                f"{where}: {key!r} is not text, got {type(value).__name__}, and only text is read. "
                "Remove the record, or the column if its prompts do without."
            )


def unread(record: dict[str, Any], read: Collection[str]) -> Iterator[str]:
    """A note for each column that other programs would make part of the prompt."""
    for key in _UNREAD:
        if key not in read and record.get(key):
            yield f"the column {key!r} is not part of the prompt"


def tools_of(record: dict[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    """The tools of a record: a list of objects, or that list as JSON text.

    Raises:
        DataError: it is something else.
    """
    given = record.get("tools")
    value = given
    if isinstance(given, str) and given.strip():
        try:
            value = json.loads(given)
        except (ValueError, RecursionError):
            value = given
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        shown = repr(given)
        raise DataError(
            f"{where}: 'tools' must be a list of objects, got "
            f"{shown if len(shown) <= 60 else shown[:57] + '...'}. Correct or remove it."
        )
    return tuple(_without_nothing(tool) for tool in value)


def _without_nothing(value: Any) -> Any:
    """Parquet gives every object all keys that any object of the column has, empty ones as None."""
    if isinstance(value, dict):
        return {key: _without_nothing(v) for key, v in value.items() if v is not None}
    return [_without_nothing(v) for v in value] if isinstance(value, list) else value


def text_of_parts(parts: list[Any], where: str) -> str:
    """The content of a message that is given as a list of text parts.

    Raises:
        DataError: a part is no text.
    """
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type") if isinstance(part, dict) else "text"
        if not isinstance(text, str) or kind not in (None, "text"):
            raise DataError(
                f"{where}: a part of a message is not text, got type {kind!r}, and only text is "
                "read. Remove the record."
            )
        texts.append(text)
    return "".join(texts)


def notes_of(prompts: Iterable[Prompt]) -> list[str]:
    """One line for each thing that was left out of some prompts' records, with their number."""
    counts = Counter(note for prompt in prompts for note in prompt.notes)
    return [f"{note} ({count} prompts)" for note, count in counts.items()]
