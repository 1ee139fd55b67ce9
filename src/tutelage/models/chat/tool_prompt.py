"""How a model is told of its tools: by its chat template, else in the system message."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tutelage.data.types import Message, Prompt, ToolCall
from tutelage.models.chat.template import render_chat, template_of
from tutelage.models.chat.tool_format import ToolFormat, render_calls

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXAMPLES = (ToolCall("first_tool", {"argument": "value"}), ToolCall("second_tool", {}))


def renders_tools(tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict[str, Any]]) -> bool:
    """Whether a tokenizer's chat template writes tools into the prompt."""
    messages: list[Message] = [{"role": "user", "content": "x"}]
    template = template_of(tokenizer, tools, "tools")
    plain = render_chat(tokenizer, template, messages, {}, "tools")
    return plain != render_chat(tokenizer, template, messages, {"tools": list(tools)}, "tools")


def with_tools(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, tool_format: ToolFormat
) -> Prompt:
    """A prompt whose tools the model is told of.

    A chat template that leaves tools out gets them as text: their schemas and the way to call them
    are added to the system message, which is made if there is none.

    Args:
        tokenizer: the model's.
        prompt: chat messages, and perhaps tools.
        tool_format: how the model is to write calls.
    """
    if not prompt.tools or isinstance(prompt.content, str):
        return prompt
    if renders_tools(tokenizer, prompt.tools):
        return prompt
    text = _described(prompt.tools, tool_format)
    first, *others = prompt.content
    if first["role"] == "system":
        system: Message = {**first, "content": f"{first['content']}\n\n{text}"}
        return replace(prompt, content=(system, *others), tools=())
    return replace(prompt, content=({"role": "system", "content": text}, first, *others), tools=())


def _described(tools: Sequence[dict[str, Any]], tool_format: ToolFormat) -> str:
    schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    one, two = (render_calls(tool_format, _EXAMPLES[:count]) for count in (1, 2))
    return (
        f"You can call these tools, given as JSON schemas:\n{schemas}\n\n"
        f"To call one, answer with nothing but the call:\n{one}\n"
        f"To call several at the same time:\n{two}\n"
        "Each call is answered by a message of the role tool. A turn without a call is your final "
        "answer."
    )
