"""Asking a server that is not trusted: growing waits, one deadline, strict replies, all or none."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tutelage.errors import ConfigError, ModelError
from tutelage.rollout.wire import BadReply, Wire, resolve, seconds_left

KEY_VARIABLE = "TUTELAGE_API_KEY"
"""Environment variable with the key of a server; there is no other way to give it."""


NEUTRAL: dict[str, Any] = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
    "stop": None,
}
"""Settings that change nothing, said in every request for a completion: what a request leaves out,
a server fills in from the model's generation_config.json or from its own defaults."""


class Strict(BaseModel):
    """A reply in which nothing is converted and nothing is filled in."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


Schema = TypeVar("Schema", bound=Strict)
Value = TypeVar("Value")


@dataclass(frozen=True)
class Limits:
    """How long and how often a server is asked."""

    deadline_s: float = 900.0
    """Seconds for one completion, all tries together."""
    num_tries: int = 5
    """Requests for one completion, at most."""
    first_delay_s: float = 0.5
    """Longest wait before the second try; it doubles with every further one."""
    max_delay_s: float = 20.0
    """Longest wait between two tries."""
    max_reply_bytes: int = 8 * 2**20
    """Size of a reply."""


class Client:
    """Sends requests to one server, several at the same time.

    Args:
        url: base URL of the server.
        limits: how long and how often it is asked.
        num_concurrent: requests under way at the same time.
    """

    def __init__(self, url: str, limits: Limits, num_concurrent: int = 16) -> None:
        self.limits = limits
        self.num_concurrent = num_concurrent
        self._wire = Wire(resolve(url), read_key(), limits.max_reply_bytes)

    def each(
        self,
        requests: Sequence[Callable[[], Value]],
        progress: Callable[[int], None] | None = None,
    ) -> list[Value]:
        """What all requests return, in order, or the first error and nothing.

        Args:
            requests: called in threads, several at the same time.
            progress: called, in this thread, with the number of requests just answered.
        """
        with ThreadPoolExecutor(self.num_concurrent) as pool:
            futures = [pool.submit(request) for request in requests]
            try:
                values = []
                for future in futures:
                    values.append(future.result())
                    if progress is not None:
                        progress(1)
                return values
            finally:
                if not all(future.done() for future in futures):  # an error, or Ctrl-C
                    self._wire.stop()
                    pool.shutdown(wait=False, cancel_futures=True)

    def ask(
        self, path: str, body: dict[str, Any] | None, accept: Callable[[bytes], Value]
    ) -> Value:
        """Ask until a reply is accepted, with growing waits, within tries and deadline."""
        end = time.monotonic() + self.limits.deadline_s
        num_tries, delay = 0, self.limits.first_delay_s
        while True:
            num_tries += 1
            try:
                return accept(self._wire.send(path, body, seconds_left(end)))
            except BadReply as error:
                is_late = time.monotonic() + delay >= end
                if num_tries >= self.limits.num_tries or is_late or self._wire.stopped.is_set():
                    raise ModelError(
                        f"the server gave no usable reply in {num_tries} tries: "
                        f"{self._wire.clean(str(error))}. Nothing of this batch was kept; run the "
                        "command again to continue."
                    ) from None
            self._wire.stopped.wait(delay * random.uniform(0.5, 1.0))
            delay = min(2 * delay, self.limits.max_delay_s)


def parse(content: bytes, schema: type[Schema]) -> Schema:
    """A reply as its schema wants it, from JSON without repeated keys or odd numbers."""
    try:
        value = json.loads(
            content.decode("utf-8"), object_pairs_hook=_once, parse_constant=_refuse_constant
        )
        return schema.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the reply"
        raise BadReply(f"a reply whose {place} does not fit: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise BadReply(f"a reply that is not JSON: {str(error)[:100]}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is repeated")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def read_key() -> str | None:
    """The key from the environment, None without one.

    Raises:
        ConfigError: it holds spaces or unprintable characters; it is not shown.
    """
    key = os.environ.get(KEY_VARIABLE)
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"{KEY_VARIABLE} holds spaces or unprintable characters. Set it anew.")
    return key or None
