"""Calls of tools: strict, and never an exception whatever the model generated."""

from __future__ import annotations

import pytest

from tutelage.data.types import ToolCall
from tutelage.models.tool_format import ToolFormat, parse_calls, render_calls

FORMATS: tuple[ToolFormat, ...] = ("hermes", "llama3", "json")
CALLS = (ToolCall("look_up", {"item": "café; {\n", "n": [1, {"a": None}]}), ToolCall("sum", {}))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_rendered_calls_are_parsed_to_the_same(format: ToolFormat, count: int) -> None:
    assert parse_calls(format, render_calls(format, CALLS[:count])) == CALLS[:count]
