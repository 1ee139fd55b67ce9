"""A program that runs environments of the library verifiers, started by `envs/verifiers.py`.

It runs under an interpreter that has verifiers, which need not have this package: it imports
nothing of it. It reads one JSON object a line from its standard input and answers in JSON lines:

    {"version": {}}      -> {"version": v}
    {"open": {...}}      -> {"num_tasks": n}
    {"tasks": {...}}     -> {"tasks": [text, ...]}
    {"rollouts": {...}}  -> {"began": {...}} for each trace, {"rollout": {...}} for each rollout, as
                            they begin and end, then {"num_rollouts": n}

Where one fails, the answer is {"error": text}. It ends at the end of its input.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import verifiers.v1 as vf
from renderers.base import MODEL_RENDERER_MAP
from verifiers import __version__
from verifiers.v1.types import content_text
from verifiers.v1.utils.loaders import resolve_env_config

KEY_VARIABLE = "TUTELAGE_ENDPOINT_API_KEY"
"""Environment variable with the key of the endpoint; verifiers hides such names from tools."""


class Worker:
    """One environment and its tasks; `send` writes a line."""

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        self.send = send
        self.stack = AsyncExitStack()
        self.is_serving = False

    def open(
        self, environment: str, arguments: dict[str, Any], max_turns: int, max_tasks: int
    ) -> dict[str, Any]:
        """Load an environment; its agents run on this machine unless the arguments say where."""
        name = Path(environment)
        if name.suffix == ".py":
            sys.path.insert(0, str(name.parent))
            environment = name.stem
        taskset = {**arguments.get("taskset", {}), "id": environment}
        config = resolve_env_config({**arguments, "taskset": taskset})
        self.agents = [agent for _, agent in config if isinstance(agent, vf.AgentConfig)]
        for agent in self.agents:
            if "runtime" not in agent.model_fields_set:
                agent.runtime = vf.SubprocessConfig()
            agent.max_turns = min(agent.max_turns or max_turns, max_turns)
        self.stated = [agent.max_output_tokens for agent in self.agents]
        self.env = vf.load_environment(config)
        taskset = self.env.taskset
        if not taskset.bounded and not max_tasks:
            raise ValueError("the taskset is infinite: state how many of its tasks are used")
        self.tasks = list(itertools.islice(taskset, max_tasks or None))
        return {"num_tasks": len(self.tasks)}

    def list_tasks(self, start: int, stop: int) -> dict[str, Any]:
        """What is known of tasks before they run."""
        return {"tasks": [_text(task.data) for task in self.tasks[start:stop]]}

    async def run(
        self,
        url: str,
        tokenizer: str,
        student: str,
        renderer: dict[str, Any] | None,
        enable_thinking: bool | None,
        max_output_tokens: int,
        num_concurrent: int,
        rollouts: list[dict[str, Any]],
    ) -> AsyncIterator[dict[str, Any]]:
        """Run rollouts, `num_concurrent` at the same time; what became of each, as they end."""
        if not self.is_serving:
            await self.stack.enter_async_context(self.env.serving())
            self.is_serving = True
        renderer = renderer or {"name": MODEL_RENDERER_MAP.get(student, "default")}
        if enable_thinking is not None:
            renderer = {**renderer, "enable_thinking": enable_thinking}
        limit = asyncio.Semaphore(num_concurrent)
        client = vf.TrainClientConfig(
            base_url=f"{url}/v1",
            api_key_var=KEY_VARIABLE,
            renderer=renderer,
            renderer_model_name=tokenizer,
        )
        ctx = vf.ModelContext(model="student", client=client)
        for agent, stated in zip(self.agents, self.stated, strict=True):
            agent.max_output_tokens = min(stated or max_output_tokens, max_output_tokens)

        async def one(name: str, task: int) -> dict[str, Any]:
            def began(trace: vf.Trace) -> None:
                self.send({"began": {"name": name, "session": trace.id}})

            slot = self.env.slots(self.tasks[task])[0]
            async with limit:
                episode = await self.env.run_slot(slot, ctx, on_trace=began)
            return {"rollout": {"name": name, **_episode(episode)}}

        running = [asyncio.ensure_future(one(**rollout)) for rollout in rollouts]
        for ended in asyncio.as_completed(running):
            yield await ended
        yield {"num_rollouts": len(running)}

    async def answer(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Answer one request."""
        ((kind, values),) = request.items()
        if kind == "version":
            yield {"version": __version__}
        elif kind == "open":
            yield self.open(**values)
        elif kind == "tasks":
            yield self.list_tasks(**values)
        else:
            async for reply in self.run(**values):
                yield reply


def _text(data: Any) -> str:
    """What opens a task; nothing where a user of the environment does."""
    messages = data.prompt if isinstance(data.prompt, list) else []
    texts = [content_text(message.content) for message in messages]
    if isinstance(data.prompt, str):
        texts.append(data.prompt)
    return "\n\n".join(text for text in (data.system_prompt, *texts) if text)


def _episode(episode: Any) -> dict[str, Any]:
    errors = [_one_line(error) for error in episode.errors]
    traces = [_trace(trace) for trace in episode.traces if trace.agent.trainable]
    return {"error": "" if episode.ok or not errors else errors[-1], "traces": traces}


def _trace(trace: Any) -> dict[str, Any]:
    error = trace.last_error
    return {
        "error": _one_line(error) if error is not None and not trace.ok else "",
        "is_truncated": bool(trace.is_truncated or trace.is_timeout),
        "stop": trace.stop_condition or "",
        "reward": float(trace.reward),
        "rewards": {name: r.value for name, r in trace.rewards.items() if r is not None},
        "metrics": {name: float(x) for name, x in trace.metrics.items() if x is not None},
        "branches": [_branch(branch) for branch in trace.branches if branch.trainable],
    }


def _branch(branch: Any) -> dict[str, Any]:
    return {
        "token_ids": branch.token_ids,
        "sampled_mask": branch.sampled_mask,
        "logprobs": branch.logprobs,
        "messages": [_message(node) for node in branch.nodes],
    }


def _message(node: Any) -> dict[str, Any]:
    message = node.message
    calls = message.tool_calls or [] if message.role == "assistant" else []
    return {
        "role": message.role,
        "content": content_text(message.content) if message.content else "",
        "is_sampled": node.sampled,
        "num_calls": len(calls),
    }


def _one_line(error: Any) -> str:
    return f"{error.type}: {' '.join(error.message.split())}"[:400]


async def main() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what an environment prints is not an answer

    def send(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value, allow_nan=False) + "\n")
        answers.flush()

    worker, loop = Worker(send), asyncio.get_running_loop()
    send({"ready": True})
    async with worker.stack:
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            try:
                async for reply in worker.answer(json.loads(line)):
                    send(reply)
            except Exception as error:
                text = " ".join(str(error).split())
                send({"error": f"{type(error).__name__}: {text}"[:400]})


if __name__ == "__main__":
    asyncio.run(main())
