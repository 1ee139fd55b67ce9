"""Conversations with a model on a server: messages go there, and calls of tools come back.

A server gives no ids: its chat template renders all messages again in every turn, its parser finds
the calls, and limits count the tokens that it reports.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from tutelage.data.types import Prompt, Rollout, ToolCall, Turn
from tutelage.errors import ModelError
from tutelage.evaluation.benchmark import Progress
from tutelage.evaluation.server import ChatReply, Server, seed_of
from tutelage.models.chat.tool_format import parse_calls, render_calls
from tutelage.rollout.dialogue import Dialogue, answer_turns, open_dialogues
from tutelage.rollout.http_client import RefusedRequest, Strict, in_thread, parse
from tutelage.rollout.request import Agent

_TOO_LONG = re.compile(r"context|too long|maximum.*(length|tokens)", re.IGNORECASE)
"""How servers say that a conversation is longer than what the model reads."""


class _Function(Strict):
    name: str
    arguments: str


class _Call(Strict):
    id: str
    type: Literal["function"]
    function: _Function

    def read(self) -> ToolCall:
        """The call; with an error for the model to read where its arguments are none."""
        name, arguments = json.dumps(self.function.name), self.function.arguments or "{}"
        calls = parse_calls("json", f'{{"name": {name}, "arguments": {arguments}}}')
        return calls[0] if len(calls) == 1 else ToolCall("", {}, "the arguments are not JSON")


def converse(
    server: Server, agent: Agent, prompts: Sequence[Prompt], max_new_tokens: int, progress: Progress
) -> list[Rollout]:
    """All samples of some problems, each a conversation with an environment of its own, in order.

    Raises:
        ModelError: an answer could not be had.
        RunError: an environment does not start.
    """
    asked = [(p, s) for p in prompts for s in range(server.sampling.num_samples)]
    keys = [seed_of(server.seed, prompt.id, sample) for prompt, sample in asked]
    opened = open_dialogues(agent, [prompt for prompt, _ in asked], keys)
    talks = [
        _Talk(server, agent, *pair, max_new_tokens, dialogue, list(opening.messages))
        for pair, (dialogue, opening) in zip(asked, opened, strict=True)
    ]
    return server.client.each([talk.run for talk in talks], progress)


@dataclass
class _Talk:
    """One conversation under way."""

    server: Server
    agent: Agent
    prompt: Prompt
    sample: int
    max_new_tokens: int
    dialogue: Dialogue
    messages: list[dict[str, Any]]
    """Everything so far, as the server takes it."""
    text: str = ""
    num_generated: int = 0
    num_prompt: int = 0
    """Tokens that the model read first."""

    async def run(self) -> Rollout:
        """All turns, and the record."""
        dialogue, seconds = self.dialogue, self.agent.limits.tool_timeout_s
        while True:
            reply = await self._reply()
            turn = None if reply is None else self._turn(reply)
            if reply is None or turn is None:
                dialogue.cut_off()
                break
            (answer,) = await in_thread(answer_turns, [dialogue], [turn], seconds)
            if answer is None or not answer.messages:
                break
            calls = reply.choices[0].message.tool_calls or []
            names = [{"tool_call_id": call["id"]} for call in calls]
            names += [{}] * (len(answer.messages) - len(calls))
            said = {"role": "assistant", "content": self.text} | (
                {"tool_calls": calls} if calls else {}
            )
            pairs = zip(answer.messages, names, strict=False)
            self.messages += [said, *({**message, **name} for message, name in pairs)]
        found = await in_thread(dialogue.record, seconds)
        return Rollout(
            self.prompt,
            self.sample,
            prompt_ids=(),
            completion_ids=(),
            is_truncated=dialogue.is_truncated,
            text=self.text,
            conversation=found,
            num_reported_tokens=self.num_generated,
        )

    def _turn(self, reply: ChatReply) -> Turn | None:
        """What the model generated; None where it was cut off."""
        choice = reply.choices[0]
        raw, content = choice.message.tool_calls or [], choice.message.content
        text = content if isinstance(content, str) else ""
        self.text = text if raw else self.server.answer_of(choice)
        turn = Turn(self.text, tuple(_call(one).read() for one in raw))
        shown = [self.text, render_calls("hermes", turn.calls)]
        self.dialogue.add_turn("\n".join(filter(None, shown)))
        return None if choice.finish_reason == "length" else turn

    async def _reply(self) -> ChatReply | None:
        """The model's next turn; None where a limit is reached or the server takes no more."""
        limits, number = self.agent.limits, self.dialogue.num_turns
        left = self.max_new_tokens - self.num_generated
        if number >= limits.max_turns or left <= 0:
            return None
        most = min(left, limits.max_turn_tokens or left)
        name = f"{self.prompt.id}/turn {number}" if number else self.prompt.id
        body = self.server.body_of(name, self.sample, most) | {"messages": self.messages}
        if self.dialogue.tools:
            body["tools"] = list(self.dialogue.tools)
        try:
            reply = await self.server.ask_chat(body, partial(self._accepted, most))
        except RefusedRequest as error:
            if number and _TOO_LONG.search(error.reason):
                return None
            raise
        usage = reply.usage
        if usage is None or usage.prompt_tokens is None:
            raise ModelError(
                "the server does not report usage.prompt_tokens and usage.completion_tokens, which "
                "the limits of conversations count. Use a server that does, such as vLLM."
            )
        self.num_prompt = self.num_prompt or usage.prompt_tokens
        num_inserted = usage.prompt_tokens - self.num_prompt - self.num_generated
        self.num_generated += usage.completion_tokens
        return reply if num_inserted <= limits.max_inserted_tokens else None

    def _accepted(self, most: int, content: bytes) -> ChatReply:
        reply = parse(content, ChatReply)
        self.server.refuse_other(reply, most)
        for one in reply.choices[0].message.tool_calls or []:
            _call(one)
        return reply


def _call(one: Any) -> _Call:
    return parse(json.dumps(one).encode(), _Call)
