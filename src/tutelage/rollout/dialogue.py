"""A conversation as messages: its environment, what was said, and what went wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from tutelage.data.types import Conversation, Message, Outcome, Prompt, ToolCall, Turn
from tutelage.envs.environment import Environment, Opening, Reply
from tutelage.envs.guard import Failure, attempt_all
from tutelage.errors import RunError
from tutelage.rollout.request import Agent


@dataclass
class Dialogue:
    """One conversation under way."""

    environment: Environment
    tools: Sequence[dict[str, object]]
    messages: list[Message] = field(default_factory=list)
    num_turns: int = 0
    num_calls: int = 0
    num_errors: int = 0
    is_truncated: bool = False
    lost: str = ""
    """Why its environment answers no more; "" while it does."""

    def add_turn(self, text: str) -> None:
        """Note what the model generated in a turn."""
        self.num_turns += 1
        self.messages.append({"role": "assistant", "content": text})

    def take(self, turn: Turn, reply: Reply | Failure | None) -> Reply:
        """Note what the environment answered to a turn; None where it answers no more.

        Returns:
            What the model reads; no messages where the conversation is over.
        """
        self.num_calls += len(turn.calls)
        if isinstance(reply, Failure):
            if reply.is_timeout:  # its thread may still change it
                self.lost = reply.reason
            reply = _failed_reply(turn, reply.reason)
        elif reply is None:
            reply = _failed_reply(turn, self.lost)
        self.num_errors += reply.num_errors
        if reply.is_done:
            return Reply(is_done=True)
        messages = tuple(map(_written, reply.messages))
        self.messages += messages
        return Reply(messages)

    def cut_off(self) -> None:
        """End at a limit; answers that the model did not get are no part of the conversation."""
        self.is_truncated = True
        while self.messages and self.messages[-1]["role"] != "assistant":
            self.messages.pop()

    def record(self, seconds: float) -> Conversation:
        """The record of a conversation that is over, with its score, for which it has a time."""
        found: Outcome | Failure
        if self.lost:
            found = Failure(self.lost)
        else:
            (found,) = attempt_all([self.environment.score], seconds)
        if isinstance(found, Failure):
            found = Outcome(0.0, False, {"environment_error": found.reason})
        return Conversation(
            tuple(self.messages), self.num_turns, self.num_calls, self.num_errors, found
        )


def open_dialogues(
    agent: Agent, prompts: Sequence[Prompt], keys: Sequence[int]
) -> list[tuple[Dialogue, Opening]]:
    """One conversation a prompt, with an environment of its own.

    Args:
        agent: environments and limits.
        prompts: one for every conversation.
        keys: seeds of their environments.

    Raises:
        RunError: an environment cannot begin.
    """
    environments = [agent.environment() for _ in prompts]
    openings: list[Opening | Failure] = attempt_all(
        [
            partial(environment.start, prompt, key)
            for environment, prompt, key in zip(environments, prompts, keys, strict=True)
        ],
        agent.limits.tool_timeout_s,
    )
    found = []
    for prompt, environment, opening in zip(prompts, environments, openings, strict=True):
        if isinstance(opening, Failure):
            raise RunError(
                f"the environment of prompt {prompt.id!r} does not start: {opening.reason}. "
                "Mend the environment, or raise data.tool_timeout_s if it is slow."
            )
        found.append((Dialogue(environment, opening.tools), opening))
    return found


def answer_turns(
    dialogues: Sequence[Dialogue], turns: Sequence[Turn | None], seconds: float
) -> list[Reply | None]:
    """What the environments answer; None where there is no turn."""
    asked: list[int] = []
    calls: list[Callable[[], Reply]] = []
    for i, (dialogue, turn) in enumerate(zip(dialogues, turns, strict=True)):
        if turn is not None and not dialogue.lost:
            asked.append(i)
            calls.append(partial(dialogue.environment.act, turn))
    replies: dict[int, Reply | Failure] = dict(zip(asked, attempt_all(calls, seconds), strict=True))
    return [
        None if turn is None else dialogue.take(turn, replies.get(i))
        for i, (dialogue, turn) in enumerate(zip(dialogues, turns, strict=True))
    ]


def _failed_reply(turn: Turn, reason: str) -> Reply:
    """What the model reads of an environment that failed or hung; a final answer ends it."""
    error = json.dumps({"error": f"the tools do not answer: {reason}"}, ensure_ascii=False)
    messages = [_tool_message(call, error) for call in turn.calls]
    return Reply(tuple(messages), is_done=not messages, num_errors=len(messages))


def _written(message: Message) -> Message:
    """A message that can be saved: half a surrogate pair is written out."""
    return {k: v.encode("utf-8", "backslashreplace").decode("utf-8") for k, v in message.items()}


def _tool_message(call: ToolCall, content: str) -> Message:
    return {"role": "tool", "name": call.name, "content": content}
