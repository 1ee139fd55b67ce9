"""The protocol of environments, of which every rollout has one of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from tutelage.data.tasks import Task
from tutelage.data.types import Message, Outcome, Prompt, Turn


@dataclass(frozen=True)
class Opening:
    """How a conversation begins."""

    messages: tuple[Message, ...]
    """The first messages of the conversation."""
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of the tools, ``{"type": "function", "function": {...}}``."""


@dataclass(frozen=True)
class Reply:
    """What the environment answers to a turn."""

    messages: tuple[Message, ...] = ()
    """One for every call, in their order; or what a user says next."""
    is_done: bool = False
    """The conversation is over; then there are no messages."""
    num_errors: int = 0
    """Calls that were answered with an error."""


class Environment(Protocol):
    """The world of one conversation; nothing in it is shared with another one."""

    def start(self, prompt: Prompt, seed: int) -> Opening:
        """Begin; the same prompt and seed give the same world and opening."""

    def act(self, turn: Turn) -> Reply:
        """Carry out the calls of a turn; a turn without calls usually ends the conversation."""

    def score(self) -> Outcome:
        """The score of what was done so far; called once, at the end."""


def opened(environment: Environment, prompt: Prompt) -> Prompt:
    """A prompt with the first messages and the tools of its environment."""
    opening = environment.start(prompt, 0)
    return replace(prompt, content=opening.messages, tools=opening.tools)


@runtime_checkable
class AgentTask(Task, Protocol):
    """A task whose prompts are answered in conversations with an environment."""

    def environment(self) -> Environment:
        """A new environment, for one conversation."""
