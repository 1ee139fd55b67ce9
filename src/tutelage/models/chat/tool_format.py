"""Calls of tools in what a model generated, and how they are written.

Three formats: ``hermes`` (Hermes, Qwen: ``<tool_call>`` and ``</tool_call>`` around the JSON of
each call, anywhere in the answer), ``llama3`` (the whole answer is one call, or several with ``;``
or a line break between them) and ``json`` (the whole answer is one call, or a list of them).

What the model generated is not trusted: a call that is not valid is a call with an error for the
model to read, never an exception.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias

from tutelage.data.types import ToolCall
from tutelage.errors import DataError, ModelError
from tutelage.grading.answer import after_thoughts, ends_of_marks
from tutelage.models.chat.template import render_chat, template_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ToolFormat: TypeAlias = Literal["hermes", "llama3", "json"]

MAX_DEPTH = 20
"""Objects and lists inside one another in a call."""
MAX_DIGITS = 18
"""Digits of a whole number: more do not fit 64 bits."""
CALL_TOKENS = ("<tool_call>", "</tool_call>")
"""What marks a call in Hermes' format; some tokenizers count them among their control tokens."""
_MARK = re.compile("|".join(CALL_TOKENS))
_TAG = "<|python_tag|>"
_KEYS = {"hermes": "arguments", "llama3": "parameters", "json": "arguments"}
"""What the arguments are called."""
_ATTEMPT = re.compile(r"""\[?\s*\{\s*["']?(type|name|function|arguments|parameters)\b""")
"""How text begins that was meant to be a call, though it is no valid JSON."""
_JSON_START = re.compile(r"(?:\s|;|<\|python_tag\|>)*[{\[]")
_SPACES = re.compile(r"\s*")


class _Invalid(ValueError):
    """A text that is no call; the model reads why."""


def parse_calls(format: ToolFormat, text: str, thought: str = "") -> tuple[ToolCall, ...]:
    """The calls in a turn of the model, in their order.

    Only what follows a closed thought counts; inside a thought that never ends there are no calls.
    JSON is strict: no key twice, no NaN, no infinity, whole numbers of at most `MAX_DIGITS` digits.

    Args:
        format: how the model writes calls.
        text: what it generated, decoded.
        thought: the mark of a thought that its prompt or header opened; "" without one.

    Returns:
        The calls; one that is not valid has an `error` and no name. Empty for text without a call.
    """
    whole = thought + text
    answer = after_thoughts(_without_json(whole))
    if answer is None:
        return ()
    return _PARSERS[format](whole[len(whole) - len(answer) :])


def render_calls(format: ToolFormat, calls: Sequence[ToolCall]) -> str:
    """Calls as a model writes them: `parse_calls` gives them back."""
    key = _KEYS[format]
    texts = [
        json.dumps({"name": call.name, key: call.arguments}, ensure_ascii=False) for call in calls
    ]
    if format == "hermes":
        first, last = CALL_TOKENS
        return "\n".join(f"{first}\n{text}\n{last}" for text in texts)
    if format == "llama3":
        return "; ".join(texts)
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]" if texts else ""


def format_of(
    tokenizer: PreTrainedTokenizerBase, wanted: ToolFormat | Literal["auto"]
) -> ToolFormat:
    """The format that is asked for; ``auto`` is that of the chat template."""
    return detect_format(tokenizer) if wanted == "auto" else wanted


def detect_format(tokenizer: PreTrainedTokenizerBase) -> ToolFormat:
    """The format in which a chat template writes a call of the model; ``json`` if it writes none.

    Raises:
        ModelError: there is no chat template, or it writes calls in another way.
    """
    call = ToolCall("look_up", {"item": "x"})
    function = {"name": call.name, "arguments": call.arguments}
    calls = [{"id": "000000000", "type": "function", "function": function}]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    template = template_of(tokenizer, (), "tools")
    try:
        text = render_chat(tokenizer, template, messages, {}, "tools")
    except DataError:  # a template that takes no calls
        return "json"
    formats: tuple[ToolFormat, ...] = ("hermes", "llama3", "json")
    for format in formats:
        if _dense(render_calls(format, [call])) in _dense(text):
            return format
    if call.name in text:
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path!r} writes calls of tools in a format "
            "that is not known here. Name one of hermes, llama3, json in data.tool_format."
        )
    return "json"


def _without_json(text: str) -> str:
    """A text of the same length, where no argument of a call has what looks like a thought."""
    starts = {0, *ends_of_marks(text), *(mark.end() for mark in _MARK.finditer(text))}
    parts: list[str] = []
    done = 0
    for start in sorted(starts):
        while start >= done and (found := _JSON_START.match(text, start)):
            try:
                _, end = _read(text, found.end() - 1)
            except _Invalid:
                break
            parts += [text[done:start], " " * (end - start)]
            start = done = end
    return "".join([*parts, text[done:]])


def _dense(text: str) -> str:
    return "".join(text.split())


# --- the formats ----------------------------------------------------------------------------------


def _parse_hermes(answer: str) -> tuple[ToolCall, ...]:
    calls: list[ToolCall] = []
    done = 0
    for mark in _MARK.finditer(answer):
        if mark.start() < done:  # inside a text of the call before, or its end
            continue
        if mark[0] == CALL_TOKENS[1]:
            if not (calls and calls[-1].error):  # of a failed call it is the end
                calls.append(_failed(f"{mark[0]} without {CALL_TOKENS[0]}"))
            continue
        try:
            value, end = _read(answer, mark.end())
            if not answer.startswith(CALL_TOKENS[1], end):
                raise _Invalid(f"{CALL_TOKENS[1]} is missing after the JSON object")
            done = end + len(CALL_TOKENS[1])
            calls.append(_call(value, "arguments"))
        except _Invalid as error:
            calls.append(_failed(str(error)))
    return tuple(calls)


def _parse_llama3(answer: str) -> tuple[ToolCall, ...]:
    text = answer.strip()
    is_tagged = text.startswith(_TAG)
    text = text.removeprefix(_TAG).strip()
    calls: list[ToolCall] = []
    at = 0
    try:
        while at < len(text):
            value, at = _read(text, at)
            if not calls and not is_tagged and not _is_attempt(value):
                return ()
            calls.append(_call_or_error(value, "parameters"))
            if text.startswith(";", at):
                at = _after_spaces(text, at + 1)
    except _Invalid as error:
        if not calls and not is_tagged and not _ATTEMPT.match(text):
            return ()
        calls.append(_failed(str(error)))
    return tuple(calls)


def _parse_json(answer: str) -> tuple[ToolCall, ...]:
    text = answer.strip()
    try:
        value, end = _read(text, 0)
        if end < len(text):
            raise _Invalid("text follows the call; a call is the whole answer")
    except _Invalid as error:
        return (_failed(str(error)),) if _ATTEMPT.match(text) else ()
    values = value if isinstance(value, list) else [value]
    if not any(_is_attempt(value) for value in values):
        return ()
    return tuple(_call_or_error(value, "arguments") for value in values)


_PARSERS: dict[ToolFormat, Callable[[str], tuple[ToolCall, ...]]] = {
    "hermes": _parse_hermes,
    "llama3": _parse_llama3,
    "json": _parse_json,
}


# --- one call -------------------------------------------------------------------------------------


def _is_attempt(value: Any) -> bool:
    """Whether a JSON value was meant to be a call; an answer may be JSON, too."""
    return isinstance(value, dict) and not value.keys().isdisjoint(
        ("name", "arguments", "parameters")
    )


def _call_or_error(value: Any, key: str) -> ToolCall:
    try:
        return _call(value, key)
    except _Invalid as error:
        return _failed(str(error))


def _call(value: Any, key: str) -> ToolCall:
    if not isinstance(value, dict):
        raise _Invalid(f"a call must be a JSON object, got {_kind(value)}")
    name, arguments = value.get("name"), value.get(key)
    if not isinstance(name, str) or not name:
        raise _Invalid(f'"name" must be the name of a tool, got {_kind(name)}')
    if not isinstance(arguments, dict):
        raise _Invalid(f'"{key}" must be a JSON object, got {_kind(arguments)}')
    others = value.keys() - {"name", key, "type", "id"}
    if others:
        raise _Invalid(f'a call has "name" and "{key}" alone, got {min(others)[:40]!r}')
    return ToolCall(name, arguments)


def _kind(value: Any) -> str:
    if value is None:
        return "none"
    if value == "":
        return "an empty text"
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "a number")


def _failed(reason: str) -> ToolCall:
    return ToolCall("", error=f"no valid call: {' '.join(reason.split())}")


# --- strict JSON ----------------------------------------------------------------------------------


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _Invalid(f"the key {counts.most_common(1)[0][0][:40]!r} is there twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise _Invalid(f"{name} is no JSON")


def _whole_number(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_DIGITS:
        raise _Invalid(f"a whole number has more than {MAX_DIGITS} digits")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _Invalid(f"the number {digits[:20]} is too large")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_no_duplicates,
    parse_constant=_refuse_constant,
    parse_int=_whole_number,
    parse_float=_number,
)


def _read(text: str, at: int) -> tuple[Any, int]:
    """The JSON value at a place, and where what follows it begins, spaces left out."""
    start = _after_spaces(text, at)
    try:
        value, end = _DECODER.raw_decode(text, start)
    except _Invalid:
        raise
    except json.JSONDecodeError as error:
        raise _Invalid(f"no valid JSON, {error.msg} at character {error.pos - start}") from None
    except RecursionError:
        raise _Invalid(_TOO_DEEP) from None
    _refuse_unusable(value)
    return value, _after_spaces(text, end)


_TOO_DEEP = f"more than {MAX_DEPTH} objects and lists inside one another"


def _after_spaces(text: str, at: int) -> int:
    found = _SPACES.match(text, at)
    return found.end() if found else at


def _refuse_unusable(value: Any) -> None:
    """Values that JSON allows and that could not be handed on."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        texts = [v for v in level if isinstance(v, str)]
        texts += [key for v in level if isinstance(v, dict) for key in v]
        if any("\ud800" <= c <= "\udfff" for text in texts for c in text):
            raise _Invalid("a text has half a surrogate pair")
        outer = [v for v in level if isinstance(v, dict | list)]
        if not outer:
            return
        level = [inner for v in outer for inner in (v.values() if isinstance(v, dict) else v)]
    raise _Invalid(_TOO_DEEP)
