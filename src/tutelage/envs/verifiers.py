"""Environments of the library verifiers, each in a process of its own, and their tasks."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tutelage.data.prompts import FileTask
from tutelage.data.types import Prompt
from tutelage.errors import ConfigError, RunError
from tutelage.grading import child

KEY_VARIABLE = "TUTELAGE_ENDPOINT_API_KEY"
"""Environment variable of the worker with the endpoint's key."""

TESTED_VERSION = "0.4"
"""First two numbers of the versions of verifiers whose traces and calls are known."""
_PROGRAM = Path(__file__).with_name("verifiers_worker.py")
_LISTED = 512
"""Tasks that are asked for at once."""
_LAST_BYTES = 4096
_NO_LIMIT_S = 1e6
"""A wait that the sampler ends, by data.timeout_s."""
_CLEANUP_S = 10.0
"""Seconds that environments have to release what they hold."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class _Version(_Strict):
    version: str


class _Opened(_Strict):
    num_tasks: int


class TracedMessage(_Strict):
    """One message of a trace, without its tokens."""

    role: str
    content: str
    is_sampled: bool
    num_calls: int


class Branch(_Strict):
    """A path through a trace: its ids, which of them were sampled, and the messages of it."""

    token_ids: list[int]
    sampled_mask: list[bool]
    logprobs: list[float]
    """As long as `token_ids`; 0 where an id was not sampled."""
    messages: list[TracedMessage]


class Trace(_Strict):
    """What verifiers recorded of one agent of a rollout."""

    error: str
    """Why it failed; "" where it did not."""
    is_truncated: bool
    stop: str
    reward: float
    rewards: dict[str, float]
    """The terms of the reward, weighted."""
    metrics: dict[str, float]
    branches: list[Branch]


class TracedRollout(_Strict):
    """What became of one rollout."""

    name: str
    error: str
    traces: list[Trace]
    """Those of agents that are trained."""


class Began(_Strict):
    """A trace of a rollout has begun; `session` names it in every request for a turn."""

    name: str
    session: str


class _Ended(_Strict):
    rollout: TracedRollout


class _Begun(_Strict):
    began: Began


class _Tasks(_Strict):
    tasks: list[str]


@dataclass(frozen=True)
class Loading:
    """Which environment a worker loads, and how."""

    environment: str
    """Name of an installed taskset, or path of a Python file that exports one."""
    arguments: dict[str, Any]
    """The library's own table of an environment, but for `taskset.id`."""
    python: str | None
    """Interpreter that has verifiers; None for this process's."""
    max_turns: int
    max_tasks: int
    """Tasks that are used; 0 takes all."""
    limit_s: float
    """Seconds without a reply of the worker, after which it has failed."""


class Worker:
    """A process that runs rollouts of one environment; it starts when it is first needed."""

    def __init__(self, loading: Loading) -> None:
        self.loading = loading
        self.key = secrets.token_hex(16)
        """Key of the endpoint, in every request of the worker."""
        self._process: _Process | None = None
        self._num_tasks = 0

    def tasks(self) -> list[str]:
        """The text that opens each task, as far as the environment states it.

        Raises:
            ConfigError: the environment cannot be loaded.
        """
        process = self._started()
        found: list[str] = []
        while len(found) < self._num_tasks:
            span = {"start": len(found), "stop": len(found) + _LISTED}
            tasks = _parsed(process.ask({"tasks": span}), _Tasks).tasks
            if not tasks:
                raise RunError(
                    f"data.environment {self.loading.environment!r} listed {len(found)} of its "
                    f"{self._num_tasks} tasks. Check its taskset."
                )
            found += tasks
        return found

    def run(self, order: dict[str, Any]) -> Iterator[Began | TracedRollout]:
        """Start the process, and give what begins and ends of the rollouts of an order.

        The iterator belongs to this process: after `stop` it ends with an error, in any thread.

        Raises:
            RunError: the worker failed.
        """
        return _replies(self._started(), order)

    def stop(self) -> None:
        """End the process at once, also while another thread waits for it."""
        if self._process is not None:
            self._process.stop()

    def close(self) -> None:
        """End the process, which may clean up first; the next call starts another one."""
        process, self._process = self._process, None
        if process is not None:
            process.finish(_CLEANUP_S)
            process.kill()

    def _started(self) -> _Process:
        if self._process is None or not self._process.is_alive:
            self._process = _Process(self.loading, self.key)
            weakref.finalize(self, self._process.kill)  # also where a run ends before its time
            self._process.refuse_other_versions()
            reply = self._process.ask({"open": self._opening()}, ConfigError)
            self._num_tasks = _parsed(reply, _Opened).num_tasks
        return self._process

    def _opening(self) -> dict[str, Any]:
        loading, name = self.loading, self.loading.environment
        is_file = name.endswith(".py")
        return {
            "environment": str(Path(name).resolve()) if is_file else name,
            "arguments": loading.arguments,
            "max_turns": loading.max_turns,
            "max_tasks": loading.max_tasks,
        }


def _replies(process: _Process, order: dict[str, Any]) -> Iterator[Began | TracedRollout]:
    reply = process.ask({"rollouts": order}, limit_s=_NO_LIMIT_S)
    while "num_rollouts" not in reply:
        if "began" in reply:
            yield _parsed(reply, _Begun).began
        else:
            yield _parsed(reply, _Ended).rollout
        reply = process.next_reply()


class _Process(child.Child):
    """The worker's process; each failure of it is one line."""

    def __init__(self, loading: Loading, key: str) -> None:
        python = interpreter(loading.python)
        self._loading = loading
        self._python = python or sys.executable
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        variables = {k: v for k, v in os.environ.items() if k not in _WITHHELD}
        self._error = ""
        name = loading.environment
        if name.endswith(".py"):  # servers of tools import the module again
            variables["PYTHONPATH"] = str(Path(name).resolve().parent)
        super().__init__(_PROGRAM, python, {**variables, KEY_VARIABLE: key}, self._errors)
        if not self.has_started():
            raise ConfigError(
                f"data.python {self._python} does not run verifiers: "
                f"{self._last_error()}. Name an interpreter that has verifiers {TESTED_VERSION}."
            )

    def refuse_other_versions(self) -> None:
        """Refuse a version of verifiers that is not tested.

        Raises:
            ConfigError: the interpreter has one.
        """
        version = _parsed(self.ask({"version": {}}), _Version).version
        if not version.startswith(f"{TESTED_VERSION}."):
            self.kill()
            raise ConfigError(
                f"data.python {self._python} has verifiers {_cut(version)!r}, which is not tested. "
                f"Name an interpreter that has verifiers {TESTED_VERSION}."
            )

    def ask(
        self,
        request: dict[str, Any],
        kind: type[Exception] = RunError,
        limit_s: float | None = None,
    ) -> dict[str, Any]:
        """The first reply to a request."""
        seconds = max(self._loading.limit_s, child.START_LIMIT_S) if limit_s is None else limit_s
        return self._accepted(self.request(request, time.monotonic() + seconds), kind)

    def next_reply(self) -> dict[str, Any]:
        """A further reply to the same request."""
        return self._accepted(self._receive(time.monotonic() + _NO_LIMIT_S), RunError)

    def kill(self) -> None:
        """End the process and close what belongs to it."""
        super().kill()
        if not self._errors.closed:
            self._error = self._last_error()
            self._errors.close()

    def _accepted(self, reply: dict[str, Any] | None, kind: type[Exception]) -> dict[str, Any]:
        what = f"data.environment {self._loading.environment!r}"
        if reply is None:
            self.kill()
            raise RunError(
                f"the process of {what} ended or did not answer: {self._last_error()}. Nothing of "
                "this step was kept; run the command again to continue."
            )
        if "error" in reply:
            self.kill()
            raise kind(f"{what} failed: {_cut(str(reply['error']))}. Check it and its arguments.")
        return reply

    def _last_error(self) -> str:
        if self._errors.closed:
            return self._error
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - _LAST_BYTES))
        lines = self._errors.read().decode("utf-8", "replace").split("\n")
        return _cut(next((line for line in reversed(lines) if line.strip()), "no message"))


_WITHHELD = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "TUTELAGE_API_KEY", KEY_VARIABLE)
"""Environment variables that the worker does not get: those of our interpreter, and our keys."""


def interpreter(python: str | None) -> str | None:
    """The path of a stated interpreter.

    Raises:
        ConfigError: there is none.
    """
    found = None if python is None else shutil.which(python)
    if python is not None and found is None:
        raise ConfigError(
            f"data.python {python!r} is no program. Name the interpreter of an environment that "
            "has verifiers, such as .venv-peers/verifiers/bin/python."
        )
    return found if found is None else os.path.abspath(found)


def _cut(text: str) -> str:
    shown = "".join(char if char.isprintable() else " " for char in text)
    return " ".join(shown.split())[:300].rstrip(".")


def _parsed(reply: dict[str, Any], schema: type[Any]) -> Any:
    try:
        return schema.model_validate(reply)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise RunError(
            f"the worker of verifiers gave a reply that cannot be used: {where}: {first['msg']}. "
            "Use the version of verifiers that is stated in the documentation."
        ) from None


class VerifiersTask:
    """The tasks of an environment: shuffled epochs for training, a fixed held-out part.

    A prompt has the text that opens a task, for logs; the ids that the model gets are the
    environment's. Its id is the number of the task in the environment.
    """

    def __init__(self, name: str, worker: Worker, num_held_out: int) -> None:
        self.name = name
        self.worker = worker
        texts = enumerate(worker.tasks())
        self._prompts = [Prompt(str(i), text or f"task {i}") for i, text in texts]
        numbers = tuple(Prompt(prompt.id, prompt.id) for prompt in self._prompts)
        self._order = FileTask(name, numbers, num_held_out=num_held_out)

    def prompts(self, step: int, num_prompts: int, seed: int) -> list[Prompt]:
        """Training tasks of one step."""
        return self._named(self._order.prompts(step, num_prompts, seed))

    def held_out(self, num_prompts: int, seed: int = 0) -> list[Prompt]:
        """Held-out tasks, which training never gives."""
        return self._named(self._order.held_out(num_prompts, seed))

    def grade(self, prompt: Prompt, text: str, is_truncated: bool = False) -> bool | None:
        """None: the environment scores conversations, and a text alone cannot be graded."""
        return None

    def _named(self, numbers: Sequence[Prompt]) -> list[Prompt]:
        return [self._prompts[int(number.id)] for number in numbers]


def order(
    names: Sequence[str], prompts: Sequence[Prompt], settings: dict[str, Any]
) -> dict[str, Any]:
    """An order for a worker: rollouts by their names, each of a prompt of `VerifiersTask`."""
    rollouts = [
        {"name": name, "task": int(prompt.id)} for name, prompt in zip(names, prompts, strict=True)
    ]
    return {**settings, "rollouts": rollouts}
