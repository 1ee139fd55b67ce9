"""Benchmarks of agents: problems that are conversations with generated worlds."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from tutelage.config.conversations import (
    LedgerToolsData,
    ShoppingData,
    TravelData,
)
from tutelage.data.formats import find_file
from tutelage.data.suites import AGENT_BENCHMARKS
from tutelage.data.tasks import Task
from tutelage.envs.environment import AgentTask
from tutelage.envs.shopping import OfficialShoppingTask
from tutelage.errors import ConfigError
from tutelage.evaluation.benchmark import Benchmark
from tutelage.evaluation.request import EvaluationRequest
from tutelage.evaluation.scores import voting_of
from tutelage.rollout.request import Agent
from tutelage.setup.inputs import build_task

_NUM_PROBLEMS = 40
"""Problems of a level; the published shopping queries are 50, 50 and 20."""
_NUM_OFFICIAL_PROBLEMS = 120
_MAX_NEW_TOKENS = 8192
_LIMITS: dict[str, Any] = {"max_turns": 64, "max_inserted_tokens": 32768}


def agent_benchmark(name: str, request: EvaluationRequest) -> Benchmark:
    """A benchmark of `AGENT_BENCHMARKS`; its worlds are generated and never those of training."""
    data = replace(_data_of(name), enable_thinking=request.thinking)
    is_official = name == "shopping-official"
    task: Task = _official() if is_official else build_task(data)
    default = _NUM_OFFICIAL_PROBLEMS if is_official else _NUM_PROBLEMS
    prompts = tuple(task.held_out(request.num_problems or default))
    length = request.max_new_tokens or _MAX_NEW_TOKENS
    agent = Agent(task.environment, data) if isinstance(task, AgentTask) else None
    voting = voting_of(task.name)
    return Benchmark(name, prompts, task.grade, length, task.name, voting, agent=agent)


def _data_of(name: str) -> LedgerToolsData | ShoppingData | TravelData:
    domain, level = AGENT_BENCHMARKS[name]
    if domain == "ledger_tools":
        return LedgerToolsData()
    if domain.startswith("shopping"):
        return ShoppingData(level=level or 1, **_LIMITS)
    return TravelData(level=level, **_LIMITS)


def _official() -> OfficialShoppingTask:
    """Queries in $TUTELAGE_DATA or ./data, and beside them a folder with their cases."""
    queries = find_file("deepplanning_shopping.jsonl")
    return OfficialShoppingTask(queries.parent / queries.stem, queries)


def limits_of(benchmark: Benchmark) -> dict[str, Any]:
    """What decides the rows of conversations besides the sampling; empty for single answers."""
    return {} if benchmark.agent is None else {"conversations": asdict(benchmark.agent.limits)}


def fitted(benchmark: Benchmark, room: int, is_length_given: bool = False) -> Benchmark:
    """A benchmark whose completions or conversations fit into so many tokens behind the prompt.

    Where the room is smaller than a conversation's limits of generated and inserted tokens
    together, each is cut in the same proportion.

    Args:
        benchmark: its problems and limits.
        room: tokens of the model's context behind the longest prompt.
        is_length_given: what a conversation may generate was asked for, and is kept.

    Raises:
        ConfigError: what was asked for leaves no room for answers of tools.
    """
    generated = benchmark.max_new_tokens
    if benchmark.agent is None:
        return replace(benchmark, max_new_tokens=min(generated, room))
    limits = benchmark.agent.limits
    whole = generated + limits.max_inserted_tokens
    if whole <= room:
        return benchmark
    if not is_length_given:
        generated = max(1, generated * room // whole)
    if generated >= room:
        raise ConfigError(
            f"{benchmark.name} needs room for answers of tools, but the model's context has "
            f"{room} tokens behind the longest prompt and max_new_tokens is {generated}. "
            "Lower --max-new-tokens, or choose another model."
        )
    limits = replace(limits, max_inserted_tokens=room - generated)
    agent = replace(benchmark.agent, limits=limits)
    return replace(benchmark, max_new_tokens=generated, agent=agent)


def cuts(before: Benchmark, after: Benchmark) -> str:
    """In words, which limits the model's context has cut; "" if none."""
    pairs = [("max_new_tokens", before.max_new_tokens, after.max_new_tokens)]
    if before.agent is not None and after.agent is not None:
        old, new = before.agent.limits, after.agent.limits
        pairs.append(("max_inserted_tokens", old.max_inserted_tokens, new.max_inserted_tokens))
    return ", ".join(f"{name} from {old} to {new}" for name, old, new in pairs if old != new)
