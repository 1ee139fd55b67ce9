"""Calls of tools: strict, and never an exception whatever the model generated."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.data.types import ToolCall
from tutelage.errors import ModelError
from tutelage.models.chat.tool_format import (
    MAX_DEPTH,
    MAX_DIGITS,
    ToolFormat,
    detect_format,
    parse_calls,
    render_calls,
)
from tutelage.models.tokenizers import decode

FORMATS: tuple[ToolFormat, ...] = ("hermes", "llama3", "json")
KEYS = {"hermes": "arguments", "llama3": "parameters", "json": "arguments"}
TEMPLATES = Path(__file__).with_name("templates")
LOOK_UP = ToolCall("look_up", {"item": "café"})
SUM = ToolCall("sum", {"numbers": [1, -2.5], "is_exact": True, "unit": None})


def wrapped(format: ToolFormat, body: str) -> str:
    """The text of a call whose JSON is this."""
    return f"<tool_call>\n{body}\n</tool_call>" if format == "hermes" else body


# --- what models write ----------------------------------------------------------------------------

HERMES = '<tool_call>\n{"name": "look_up", "arguments": {"item": "café"}}\n</tool_call>'
LLAMA = '{"name": "look_up", "parameters": {"item": "café"}}'
LLAMA_SUM = '{"name": "sum", "parameters": {"numbers": [1, -2.5], "is_exact": true, "unit": null}}'
JSON = '{"name": "look_up", "arguments": {"item": "café"}}'
JSON_SUM = '{"name": "sum", "arguments": {"numbers": [1, -2.5], "is_exact": true, "unit": null}}'

WRITTEN: list[tuple[ToolFormat, str, tuple[ToolCall, ...]]] = [
    ("hermes", HERMES, (LOOK_UP,)),
    ("hermes", f"I look it up.\n{HERMES}\n", (LOOK_UP,)),
    ("hermes", f"{HERMES}\n{HERMES}", (LOOK_UP, LOOK_UP)),
    ("hermes", f"{HERMES}<tool_call>{JSON_SUM}</tool_call> done", (LOOK_UP, SUM)),
    ("hermes", f"<tool_call>\r\n\t{JSON}  </tool_call>", (LOOK_UP,)),
    ("hermes", "The answer is 4.", ()),
    ("hermes", JSON, ()),
    ("hermes", "", ()),
    (
        "hermes",
        wrapped("hermes", '{"name": "f", "arguments": {"q": "</tool_call> <tool_call>"}}'),
        (ToolCall("f", {"q": "</tool_call> <tool_call>"}),),
    ),
    ("llama3", LLAMA, (LOOK_UP,)),
    ("llama3", f" <|python_tag|> {LLAMA}\n", (LOOK_UP,)),
    ("llama3", f"{LLAMA}; {LLAMA_SUM}", (LOOK_UP, SUM)),
    ("llama3", f"<|python_tag|>{LLAMA}\n{LLAMA_SUM};", (LOOK_UP, SUM)),
    ("llama3", LLAMA.replace('{"name"', '{"type": "function", "name"'), (LOOK_UP,)),
    ("llama3", f"Here is the call: {LLAMA}", ()),
    ("llama3", '{"days": [{"name": "Monday"}]}', ()),
    ("llama3", "The answer is 4.", ()),
    ("llama3", "", ()),
    ("json", JSON, (LOOK_UP,)),
    ("json", f"\n{JSON} ", (LOOK_UP,)),
    ("json", f"[{JSON}, {JSON_SUM}]", (LOOK_UP, SUM)),
    ("json", '{"days": [{"name": "Monday", "arguments": 3}]}', ()),
    ("json", '[{"day": 1}]', ()),
    ("json", '{"days": [', ()),
    ("json", "[]", ()),
    ("json", "4", ()),
    ("json", "{x} is the answer", ()),
    ("json", "", ()),
]


@pytest.mark.parametrize(("format", "text", "wanted"), WRITTEN)
def test_calls_as_models_write_them(
    format: ToolFormat, text: str, wanted: tuple[ToolCall, ...]
) -> None:
    assert parse_calls(format, text) == wanted


def test_the_text_of_the_published_formats() -> None:
    assert render_calls("hermes", [LOOK_UP]) == HERMES
    assert render_calls("hermes", [LOOK_UP, LOOK_UP]) == f"{HERMES}\n{HERMES}"
    assert render_calls("llama3", [LOOK_UP, SUM]) == f"{LLAMA}; {LLAMA_SUM}"
    assert render_calls("json", [LOOK_UP]) == JSON
    assert render_calls("json", [LOOK_UP, SUM]) == f"[{JSON}, {JSON_SUM}]"
    assert [render_calls(format, []) for format in FORMATS] == ["", "", ""]


THOUGHTS: list[tuple[str, str, bool]] = [
    ("", "<think>\nSo.\n</think>\n\n{}", True),
    ("", "<think>\nSo {}.\n</think>\n\nNo call.", False),
    ("", "<think>\nSo.\n{}", False),
    ("<think>\n", "So.\n</think>\n\n{}", True),
    ("<think>\n", "So.\n{}", False),
    ("<think>\n\n</think>\n\n", "{}", True),
]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("thought", "text", "is_call"), THOUGHTS)
def test_only_what_follows_a_closed_thought_counts(
    format: ToolFormat, thought: str, text: str, is_call: bool
) -> None:
    text = text.replace("{}", render_calls(format, [LOOK_UP]))
    assert parse_calls(format, text, thought) == ((LOOK_UP,) if is_call else ())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mark", ["<think>", "</think>", "[THINK]", "<|channel|>analysis"])
def test_a_mark_of_a_thought_in_an_argument_is_none(format: ToolFormat, mark: str) -> None:
    calls = (ToolCall("f", {"a": f"{mark} {{"}), ToolCall("g", {mark: 1}))
    text = render_calls(format, calls)
    for before in ("", "<think>\nSo.\n</think>\n\n", "So. </think>"):
        assert parse_calls(format, before + text) == calls
    assert parse_calls(format, f"{text}<think>") == ()
    assert parse_calls(format, f"<think>{text}") == ()


# --- what is no valid call ------------------------------------------------------------------------

DEEP = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
"""One too many inside the call and its arguments."""
MALFORMED = {
    "no end": ('{"name": "f", "KEY": {"a": 1', "no valid JSON"),
    "single quotes": ("{'name': 'f', 'KEY': {}}", "no valid JSON"),
    "a comma too many": ('{"name": "f", "KEY": {"a": 1,}}', "no valid JSON"),
    "a line break in a text": ('{"name": "f", "KEY": {"a": "x\ny"}}', "no valid JSON"),
    "a comment": ('{"name": "f", /* */ "KEY": {}}', "no valid JSON"),
    "no name": ('{"KEY": {}}', '"name" must be the name of a tool, got none'),
    "empty name": ('{"name": "", "KEY": {}}', '"name" .* an empty text'),
    "number for a name": ('{"name": 3, "KEY": {}}', '"name" .* a number'),
    "no arguments": ('{"name": "f"}', 'must be a JSON object, got none'),
    "text for arguments": ('{"name": "f", "KEY": "{}"}', "must be a JSON object, got a text"),
    "list for arguments": ('{"name": "f", "KEY": [1]}', "must be a JSON object, got a list"),
    "another key": ('{"name": "f", "KEY": {}, "more": 1}', "got 'more'"),
    "a key twice": ('{"name": "f", "name": "g", "KEY": {}}', "the key 'name' is there twice"),
    "an argument twice": ('{"name": "f", "KEY": {"a": 1, "a": 2}}', "the key 'a' is there twice"),
    "NaN": ('{"name": "f", "KEY": {"a": NaN}}', "NaN is no JSON"),
    "infinity": ('{"name": "f", "KEY": {"a": -Infinity}}', "-Infinity is no JSON"),
    "large number": ('{"name": "f", "KEY": {"a": 1e999}}', "the number 1e999 is too large"),
    "many digits": ('{"name": "f", "KEY": {"a": DIGITS}}', "more than 18 digits"),
    "half a pair": ('{"name": "f", "KEY": {"a": "\\ud800"}}', "half a surrogate pair"),
    "half a pair in a key": ('{"name": "f", "KEY": {"\\udc00": 1}}', "half a surrogate pair"),
    "half a pair in the name": ('{"name": "\\ud800", "KEY": {}}', "half a surrogate pair"),
    "deep": ('{"name": "f", "KEY": {"a": DEEP}}', "inside one another"),
    "very deep": ('{"name": "f", "KEY": {"a": ' + "[" * 50_000, "inside one another"),
    "very deep objects": ('{"name": "f", "KEY": ' + '{"a":' * 30_000, "inside one another"),
}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("body", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_call_is_an_error_that_the_model_reads(
    format: ToolFormat, body: str, message: str
) -> None:
    for name, text in (("KEY", KEYS[format]), ("DEEP", DEEP), ("DIGITS", "9" * 5000)):
        body = body.replace(name, text)
    found = parse_calls(format, wrapped(format, body))
    assert len(found) == 1
    assert (found[0].name, found[0].arguments) == ("", {})
    with pytest.raises(ValueError, match=message):
        raise ValueError(found[0].error)
    assert "\n" not in found[0].error
    assert len(found[0].error) < 200


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_just_allowed(format: ToolFormat) -> None:
    for value in (
        "9" * MAX_DIGITS,
        "-" + "9" * MAX_DIGITS,
        "1e308",
        DEEP[1:-1],
        DEEP[1:-1].replace("[]", "[1]"),
        '"\\ud83d\\ude00"',
    ):
        body = f'{{"name": "f", "{KEYS[format]}": {{"a": {value}}}}}'
        assert parse_calls(format, wrapped(format, body)) == (
            ToolCall("f", {"a": json.loads(value)}),
        )


MISPLACED: list[tuple[ToolFormat, str, list[str]]] = [
    ("hermes", f"<tool_call>{JSON}", ["", "</tool_call> is missing"]),
    ("hermes", f"<tool_call>{JSON} and more</tool_call>", ["", "</tool_call> is missing"]),
    ("hermes", f"{JSON}\n</tool_call>", ["", "</tool_call> without <tool_call>"]),
    ("hermes", "<tool_call>", ["", "no valid JSON"]),
    ("hermes", f"<tool_call>\n[{JSON}]\n</tool_call>", ["", "must be a JSON object, got a list"]),
    ("hermes", f"<tool_call>\nx\n</tool_call>{HERMES}", ["", "no valid JSON", "look_up", ""]),
    ("hermes", f"<tool_call>{HERMES}", ["", "no valid JSON", "look_up", ""]),
    ("hermes", f"{HERMES}</tool_call>", ["look_up", "", "", "without <tool_call>"]),
    ("llama3", f"{LLAMA}; and then", ["look_up", "", "", "no valid JSON"]),
    ("llama3", f"{LLAMA};; {LLAMA}", ["look_up", "", "", "no valid JSON"]),
    ("llama3", f"{LLAMA}; [1]", ["look_up", "", "", "must be a JSON object, got a list"]),
    ("llama3", '<|python_tag|>look_up.call(item="x")', ["", "no valid JSON"]),
    ("llama3", '<|python_tag|>{"days": 3}', ["", '"name" must be']),
    ("llama3", LLAMA.replace("parameters", "arguments"), ["", '"parameters" must be']),
    ("json", f"{JSON} {JSON}", ["", "text follows the call"]),
    ("json", f"{JSON} is my call", ["", "text follows the call"]),
    ("json", f"[{JSON}, 3]", ["look_up", "", "", "must be a JSON object, got a number"]),
    ("json", f"[{JSON}, ", ["", "no valid JSON"]),
]


@pytest.mark.parametrize(("format", "text", "wanted"), MISPLACED)
def test_calls_beside_what_is_none(format: ToolFormat, text: str, wanted: list[str]) -> None:
    found = [part for call in parse_calls(format, text) for part in (call.name, call.error)]
    assert len(found) == len(wanted)
    assert all(
        want in got and bool(want) == bool(got) for want, got in zip(wanted, found, strict=True)
    )


# --- whatever the model generates -----------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**17), 10**17) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
CALLS = st.lists(
    st.builds(ToolCall, st.text(min_size=1), st.dictionaries(st.text(), VALUES, max_size=3)),
    max_size=4,
)


@settings(max_examples=60)
@given(CALLS, st.sampled_from(FORMATS))
def test_rendered_calls_are_parsed_to_the_same(calls: list[ToolCall], format: ToolFormat) -> None:
    assert parse_calls(format, render_calls(format, calls)) == tuple(calls)


PIECES = (
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "{", "}", "[", "]", '"', ":", ",", ";"),
    *('"name"', '"arguments"', '"parameters"', "{}", '"look_up"', "\\", "\\ud800", "\n", " ", "é"),
    *("NaN", "1e999", "9" * 30, "<think>", "</think>", "null", "\x00", "\u2028", "x"),
)


def damaged(seed: int) -> Iterator[tuple[ToolFormat, str]]:
    """Texts of pieces of calls, and calls that a few edits have damaged."""
    rng = random.Random(seed)
    format = rng.choice(FORMATS)
    yield format, "".join(rng.choice(PIECES) for _ in range(rng.randrange(30)))
    text = list(render_calls(format, [LOOK_UP, SUM][: rng.randint(1, 2)]))
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text))
        text[at : at + rng.randrange(4)] = rng.choice(PIECES)
    yield format, "".join(text)


def check_damaged(num_texts: int) -> None:
    num_errors = 0
    for seed in range(num_texts // 2):
        for format, text in damaged(seed):
            for call in parse_calls(format, text):
                assert bool(call.name) != bool(call.error)
                assert "\n" not in call.error
                json.dumps(call.arguments, allow_nan=False, ensure_ascii=False).encode()
                num_errors += bool(call.error)
    assert num_errors > num_texts / 4  # the texts come near to calls


def test_damaged_calls() -> None:
    check_damaged(2_000)


@pytest.mark.slow
def test_many_damaged_calls() -> None:
    check_damaged(100_000)


# --- the template's format ------------------------------------------------------------------------

OTHER = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}"
    "[{{ c.function.name }}({{ c.function.arguments | tojson }})]{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("name", "wanted"), [("qwen2_5", "hermes"), ("qwen3", "hermes"), ("llama3", "llama3")]
)
def test_the_format_of_a_template_is_found(
    make_tokenizer: Callable[..., Any], name: str, wanted: str
) -> None:
    text = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    assert detect_format(make_tokenizer(chat_template=text)) == wanted


def test_spaces_around_the_calls_of_a_template_do_not_matter(
    make_tokenizer: Callable[..., Any],
) -> None:
    text = OTHER.replace("[{{", "<tool_call>{{ c.function | tojson }}</tool_call>{#").replace(
        "]{%", "#}{%"
    )
    assert detect_format(make_tokenizer(chat_template=text)) == "hermes"


def test_a_template_without_calls_has_plain_json(make_tokenizer: Callable[..., Any]) -> None:
    assert detect_format(make_tokenizer()) == "json"
    refusing = "{% for m in messages %}{{ raise_exception('no') if m.tool_calls }}{% endfor %}"
    assert detect_format(make_tokenizer(chat_template=refusing)) == "json"


def test_an_unknown_format_is_refused(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(chat_template=OTHER)
    tokenizer.name_or_path = "folder"
    with pytest.raises(ModelError, match="template of 'folder' writes calls of tools in a format"):
        detect_format(tokenizer)
    with pytest.raises(ModelError, match="no chat template"):
        detect_format(make_tokenizer(chat_template=None))


def test_marks_of_calls_stay_in_decoded_text(make_tokenizer: Callable[..., Any]) -> None:
    """Also where a tokenizer has them among its control tokens."""
    letters = '"' + "abcdefghijklmnopqrstuvwxyz_ {}:,\n"
    tokenizer = make_tokenizer(letters=letters, extra=("<tool_call>", "</tool_call>"))
    text = render_calls("hermes", [ToolCall("look_up", {"item": "tea"})])
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert parse_calls("hermes", decode(tokenizer, [*ids, tokenizer.eos_token_id])) == (
        ToolCall("look_up", {"item": "tea"}),
    )
