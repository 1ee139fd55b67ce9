"""Conversations of the scripted agent."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tutelage.data.types import Outcome, Prompt, ToolCall, Turn
from tutelage.envs.environment import Environment
from tutelage.envs.shopping.agent import solve
from tutelage.envs.shopping.query import Query


@dataclass(frozen=True)
class Demonstration:
    calls: tuple[ToolCall, ...]
    num_errors: int
    text: str
    outcome: Outcome


def demonstrate(environment: Environment, prompt: Prompt, query: Query) -> Demonstration:
    """Let the agent answer a prompt, of which it gets the constraints, in a new environment."""
    environment.start(prompt, 0)
    calls: list[ToolCall] = []
    num_errors = 0
    plan = solve(query)
    asked: list[ToolCall] = next(plan)
    while True:
        calls += asked
        reply = environment.act(Turn("", tuple(asked)))
        num_errors += reply.num_errors
        try:
            asked = plan.send([json.loads(message["content"]) for message in reply.messages])
        except StopIteration as end:
            text = str(end.value)
            break
    assert environment.act(Turn(text)).is_done
    return Demonstration(tuple(calls), num_errors, text, environment.score())
