"""Environments of the library verifiers as data, as configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from tutelage.config.bounds import STRICT, require, require_counts, require_least
from tutelage.config.conversations import ConversationData


@dataclass(frozen=True)
class VerifiersData(ConversationData):
    """Conversations that an environment of the library verifiers runs, in a process of its own."""

    __pydantic_config__ = STRICT
    kind: Literal["verifiers"] = "verifiers"
    environment: str = field(kw_only=True)
    """Name of an installed taskset of verifiers, or path of a Python file that exports one."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """The library's own table of an environment (`taskset`, `agent`, `retries`, ...); agents run
    on this machine where it names no runtime."""
    python: str | None = None
    """Interpreter of an environment that has verifiers; None for this one's (extra verifiers)."""
    renderer: dict[str, Any] | None = None
    """The library's table of a renderer, such as {name = "qwen3"}; None takes the one that it
    has for the student's name, else its default one, which has no tools."""
    num_tasks: int = 0
    """Tasks of the taskset that are used, its first ones; 0 takes all, which needs an end."""
    num_held_out: int = 64
    """Tasks kept out of training for evaluation."""
    success_reward: float = 1.0
    """Reward from which on a conversation is a success."""
    num_concurrent: int = 64
    """Rollouts that run at the same time."""
    timeout_s: float = 600.0
    """Seconds without a request or a finished rollout, after which the environment has failed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        hint = "Name an installed taskset, or a Python file."
        require(bool(self.environment.strip()), "data.environment", "a name", "''", hint)
        require_least("data.", self.__dict__, num_tasks=0, num_held_out=0)
        require_counts("data.", self.__dict__, num_concurrent=1)
        seconds = self.timeout_s
        is_usable = 0 < seconds <= 86400
        require(is_usable, "data.timeout_s", "in (0, 86400]", seconds, "600 is usual.")
        taskset, hint = self.arguments.get("taskset", {}), "data.environment names the taskset."
        is_right = isinstance(taskset, dict) and "id" not in taskset
        require(is_right, "data.arguments", "without an id of a taskset", self.arguments, hint)
        hint = "Its renderer reads calls, see data.renderer."
        is_auto = self.tool_format == "auto"
        require(is_auto, "data.tool_format", "auto with verifiers", self.tool_format, hint)
        hint = "State it for the harness, in data.arguments."
        is_default, seconds = self.tool_timeout_s == 10.0, self.tool_timeout_s
        require(is_default, "data.tool_timeout_s", "10 with verifiers", seconds, hint)
        is_stated = self.enable_thinking is not None and "enable_thinking" in (self.renderer or {})
        where, hint = "data.renderer", "State it once."
        require(not is_stated, where, "without enable_thinking", self.renderer, hint)
