"""An environment of verifiers: sums with a calculator, in a harness that needs no other program.

`taskset.style` says what follows a turn: `tool` runs the calls that it has; `user` adds another
question of a user; `refuse` also ends at a denied turn, and gives a reward that cannot be computed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import verifiers.v1 as vf

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "The sum of two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


class SumData(vf.TaskData):
    total: int
    style: str


class SumTask(vf.Task[SumData]):
    @vf.reward
    async def is_right(self, trace: vf.Trace) -> float:
        if self.data.style == "refuse":
            raise LookupError("no such sum")
        return float(str(self.data.total) in trace.last_reply)

    @vf.metric
    async def num_turns(self, trace: vf.Trace) -> float:
        return float(trace.num_turns)


class SumConfig(vf.TasksetConfig):
    num_tasks: int = 12
    style: str = "user"


class SumTaskset(vf.Taskset[SumTask, SumConfig]):
    def load(self) -> Iterator[SumTask]:
        for i in range(self.config.num_tasks):
            data = SumData(prompt=f"{i} + {i} = ?", total=2 * i, style=self.config.style)
            yield SumTask(data, self.config.task)


class Loop(vf.Harness[vf.HarnessConfig]):
    """Asks for turns until there is nothing left to answer, three at most."""

    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(self, ctx: Any, trace: Any, runtime: Any, *rest: Any, **_: Any) -> Any:
        endpoint, secret, _, data = rest[:4]
        tools = {"tools": [ADD]} if data.style == "tool" else {}
        messages = [{"role": "user", "content": data.prompt}]
        async with httpx.AsyncClient(timeout=60) as client:
            for turn in range(3):
                reply = await client.post(
                    f"{endpoint}/chat/completions",
                    headers={"Authorization": f"Bearer {secret}"},
                    json={"model": ctx.model, "messages": messages, **tools},
                )
                if reply.status_code != 200 and data.style == "refuse":
                    break
                if reply.status_code != 200:
                    raise RuntimeError(reply.text)
                message = reply.json()["choices"][0]["message"]
                answers = _answers(message, turn, data.style)
                if not answers:
                    break
                messages += [message, *answers]
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


def _answers(message: dict[str, Any], turn: int, style: str) -> list[dict[str, Any]]:
    if style != "tool":
        return [{"role": "user", "content": f"{turn} + 1 = ?"}]
    calls = message.get("tool_calls") or []
    return [{"role": "tool", "tool_call_id": c["id"], "content": _run(c)} for c in calls]


def _run(call: dict[str, Any]) -> str:
    try:
        arguments = json.loads(call["function"]["arguments"])
        return str(arguments["a"] + arguments["b"])
    except (ValueError, KeyError, TypeError) as error:
        return f"error: {error!r}"


__all__ = ["Loop", "SumTaskset"]
