"""Conversations with a model on a server: calls, answers and limits, by messages alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from reliability.server import EvilServer, Exchange
from tutelage.config.conversations import LedgerToolsData
from tutelage.config.sampling import SamplingConfig
from tutelage.data.types import Outcome, Prompt, Rollout, Turn
from tutelage.envs.environment import Opening, Reply
from tutelage.errors import ModelError
from tutelage.evaluation.server import Server
from tutelage.evaluation.server_conversation import converse
from tutelage.rollout.http_client import Limits
from tutelage.rollout.request import Agent

TOOLS = ({"type": "function", "function": {"name": "double", "parameters": {"type": "object"}}},)
PROMPTS = [Prompt("p2", "2"), Prompt("p3", "3")]


@dataclass
class Doubles:
    """Doubles numbers by calls; a turn without calls ends it and is compared with what it said."""

    said: list[str] = field(default_factory=list)
    is_right: bool = False

    def start(self, prompt: Prompt, seed: int) -> Opening:
        return Opening(({"role": "user", "content": f"double {prompt.content} twice"},), TOOLS)

    def act(self, turn: Turn) -> Reply:
        if not turn.calls:
            self.is_right = turn.text == self.said[-1]
            return Reply(is_done=True)
        answers = []
        for call in turn.calls:
            number = call.arguments.get("x")
            text = call.error or (str(2 * number) if isinstance(number, int) else "no number")
            answers.append({"role": "tool", "name": call.name, "content": text})
            self.said.append(text)
        return Reply(tuple(answers), num_errors=sum(bool(call.error) for call in turn.calls))

    def score(self) -> Outcome:
        return Outcome(float(self.is_right), self.is_right)


def call(number: int, arguments: str) -> dict[str, Any]:
    function = {"name": "double", "arguments": arguments}
    return {"id": f"call{number}", "type": "function", "function": function}


def reply(exchange: Exchange, message: dict[str, Any], reason: str = "stop") -> dict[str, Any]:
    """A turn of 5 tokens, behind a prompt of 10 tokens and 20 for each later message."""
    found = exchange.good()
    found["choices"][0] |= {"finish_reason": reason, "message": {"role": "assistant"} | message}
    num_later = len(exchange.body["messages"]) - 1
    found["usage"] = {"prompt_tokens": 10 + 20 * num_later, "completion_tokens": 5}
    return found


def model(exchange: Exchange) -> None:
    """Doubles what the user says, then the answer, and says it."""
    messages = exchange.body["messages"]
    answers = [message["content"] for message in messages if message["role"] == "tool"]
    if len(answers) == 2:
        exchange.send_json(reply(exchange, {"content": answers[-1]}))
        return
    number = answers[-1] if answers else messages[0]["content"].split()[1]
    calls = [call(len(answers), json.dumps({"x": int(number)}))]
    exchange.send_json(reply(exchange, {"content": None, "tool_calls": calls}, "tool_calls"))


def run(answer: Any, max_new_tokens: int = 100, **limits: Any) -> tuple[list[Rollout], EvilServer]:
    server = EvilServer(lambda body: answer)
    agent = Agent(Doubles, LedgerToolsData(**limits))
    with server.running() as url:
        quick = Limits(num_tries=2, first_delay_s=0.01)
        client = Server(url, SamplingConfig(num_samples=2), "m", seed=3, limits=quick)
        return converse(client, agent, PROMPTS, max_new_tokens, lambda _: None), server


def test_calls_are_carried_out_and_answers_go_back() -> None:
    rollouts, server = run(model)
    assert [(r.prompt.id, r.sample, r.text, r.is_truncated, r.num_tokens) for r in rollouts] == [
        ("p2", 0, "8", False, 15),
        ("p2", 1, "8", False, 15),
        ("p3", 0, "12", False, 15),
        ("p3", 1, "12", False, 15),
    ]
    for rollout in rollouts:
        talk = rollout.conversation
        assert talk is not None
        assert talk.outcome.is_success
        assert (talk.num_turns, talk.num_tool_calls, talk.num_tool_errors) == (3, 2, 0)
        roles = [message["role"] for message in talk.messages]
        assert roles == ["assistant", "tool", "assistant", "tool", "assistant"]
    bodies = [body for _, body, _ in server.seen]
    assert len({body["seed"] for body in bodies}) == 12
    assert all(body["tools"] == list(TOOLS) for body in bodies)
    last = max(bodies, key=lambda body: len(body["messages"]))["messages"]
    assert [m.get("tool_call_id") for m in last if m["role"] == "tool"] == ["call0", "call1"]
    assert [len(m["tool_calls"]) for m in last if m["role"] == "assistant"] == [1, 1]
    assert run(model)[0] == rollouts


def test_arguments_that_are_no_json_are_an_error_for_the_model() -> None:
    def wrong(exchange: Exchange) -> None:
        if len(exchange.body["messages"]) > 1:
            exchange.send_json(reply(exchange, {"content": "done"}))
            return
        calls = [call(i, text) for i, text in enumerate(('{"x": ', "[2]", "", '{"x": 4}'))]
        exchange.send_json(reply(exchange, {"content": "", "tool_calls": calls}, "tool_calls"))

    for rollout in run(wrong)[0]:
        assert rollout.conversation is not None
        assert rollout.conversation.num_tool_calls == 4
        assert rollout.conversation.num_tool_errors == 2
        answers = [m["content"] for m in rollout.conversation.messages if m["role"] == "tool"]
        assert answers[2:] == ["no number", "8"]


@pytest.mark.parametrize(
    ("limits", "num_turns"),
    [
        ({"max_turns": 2}, 2),
        ({"max_new_tokens": 10}, 2),
        ({"max_inserted_tokens": 34}, 1),  # 20 + 20 - 5 in the second turn
        ({"max_inserted_tokens": 35}, 2),
        ({"max_inserted_tokens": 70}, 3),
    ],
)
def test_limits_cut_a_conversation_off(limits: dict[str, int], num_turns: int) -> None:
    for rollout in run(model, **limits)[0]:
        assert rollout.conversation is not None
        assert rollout.conversation.num_turns == num_turns
        assert rollout.is_truncated == (num_turns < 3)
        assert rollout.conversation.outcome.is_success == (num_turns == 3)


def test_turns_state_what_is_left_and_one_cut_off_ends_it() -> None:
    def cut(exchange: Exchange) -> None:
        exchange.send_json(reply(exchange, {"content": "2, I"}, "length"))

    rollouts, server = run(cut, max_turn_tokens=7)
    assert all(r.is_truncated and r.text == "2, I" for r in rollouts)
    assert {body["max_tokens"] for _, body, _ in server.seen} == {7}
    assert {body["max_tokens"] for _, body, _ in run(model, 15)[1].seen} == {15, 10, 5}


def test_a_server_that_can_read_no_more_ends_a_conversation() -> None:
    def full(exchange: Exchange) -> None:
        if len(exchange.body["messages"]) > 3:
            exchange.send('{"error": "maximum context length is 60"}', "400 Bad Request")
        else:
            model(exchange)

    rollouts, _ = run(full)
    assert all(r.is_truncated and r.conversation.num_turns == 2 for r in rollouts if r.conversation)

    def refuses(exchange: Exchange) -> None:
        exchange.send('{"error": "no tools with this context"}', "400 Bad Request")

    with pytest.raises(ModelError, match="no tools with this context"):
        run(refuses)


def test_replies_that_cannot_be_counted_or_called_are_errors() -> None:
    def uncounted(exchange: Exchange) -> None:
        found = reply(exchange, {"content": "4"})
        found["usage"] = {"completion_tokens": 5}
        exchange.send_json(found)

    with pytest.raises(ModelError, match=r"does not report usage\.prompt_tokens"):
        run(uncounted)

    def nameless(exchange: Exchange) -> None:
        calls = [{"id": "x", "type": "function", "function": {"arguments": "{}"}}]
        exchange.send_json(reply(exchange, {"content": "", "tool_calls": calls}, "tool_calls"))

    with pytest.raises(ModelError, match=r"no usable reply in 2 tries: .*function\.name"):
        run(nameless)
