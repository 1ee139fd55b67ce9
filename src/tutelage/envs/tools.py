"""Tools with checked arguments, and environments that consist of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tutelage.data.types import Message, ToolCall, Turn
from tutelage.envs.environment import Reply
from tutelage.envs.guard import Failure, attempt


class Arguments(BaseModel):
    """Arguments of a tool: each has its type exactly, and there are no others."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


A = TypeVar("A", bound=Arguments)


class ToolError(Exception):
    """A call that a tool cannot carry out; the model reads the message."""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str
    arguments: type[Arguments]
    run: Callable[[Any], Any]
    """From checked arguments to a JSON value, or to text that the model reads as it is."""

    @property
    def schema(self) -> dict[str, Any]:
        """The tool as chat templates render it."""
        found = self.arguments.model_json_schema()
        properties = {
            name: {key: value for key, value in _plain(spec).items() if key != "title"}
            for name, spec in found.get("properties", {}).items()
        }
        parameters = {
            "type": "object",
            "properties": properties,
            "required": found.get("required", []),
        }
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


def _plain(spec: dict[str, Any]) -> dict[str, Any]:
    """An optional argument is described by its type alone."""
    kinds = [kind for kind in spec.get("anyOf", []) if kind.get("type") != "null"]
    if len(kinds) != 1:
        return spec
    rest = {k: v for k, v in spec.items() if k not in ("anyOf", "default") or v is not None}
    rest.pop("anyOf", None)
    return {**kinds[0], **rest}


@dataclass(frozen=True)
class Answer:
    """What a call gave."""

    content: str
    is_error: bool = False


def call_tool(tools: Sequence[Tool], call: ToolCall) -> Answer:
    """Carry out one call; whatever goes wrong is an answer, never an exception."""
    if call.error:
        return _error(call.error)
    tool = next((tool for tool in tools if tool.name == call.name), None)
    if tool is None:
        known = ", ".join(tool.name for tool in tools)
        return _error(f"there is no tool {call.name!r}; the tools are {known}")
    try:
        arguments = tool.arguments.model_validate(call.arguments)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "arguments"
        return _error(f"{call.name}: {where}: {first['msg']}")
    found = attempt(lambda: _run(tool, arguments))
    if isinstance(found, Failure):
        return _error(f"{call.name} failed: {found.reason}")
    return found


def _run(tool: Tool, arguments: Arguments) -> Answer:
    try:
        found = tool.run(arguments)
    except ToolError as error:
        return _error(f"{tool.name}: {error}")
    return Answer(found if isinstance(found, str) else json.dumps(found, ensure_ascii=False))


def reply_to(tools: Sequence[Tool], turn: Turn) -> Reply:
    """The answers to all calls of a turn; a turn without any ends the conversation."""
    if not turn.calls:
        return Reply(is_done=True)
    answers = [call_tool(tools, call) for call in turn.calls]
    messages: list[Message] = [
        {"role": "tool", "name": call.name, "content": answer.content}
        for call, answer in zip(turn.calls, answers, strict=True)
    ]
    return Reply(tuple(messages), num_errors=sum(answer.is_error for answer in answers))


def _error(text: str) -> Answer:
    return Answer(json.dumps({"error": text[:400]}, ensure_ascii=False), is_error=True)
