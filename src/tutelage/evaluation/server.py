"""Completions from an OpenAI-compatible server that is not trusted.

The address is resolved once and pinned, cloud metadata addresses are refused, redirects and
proxies are not followed. Every completion has a deadline that a slow drip of bytes cannot
stretch. A reply that is not exactly what was asked for is asked for again, and in the end an
error: nothing is ever filled in.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tutelage.data.types import Prompt
from tutelage.errors import ConfigError, ModelError
from tutelage.evaluation.suite import Completion
from tutelage.evaluation.wire import BadReply, Wire, resolve, seconds_left
from tutelage.models.sampling import SamplingConfig

KEY_VARIABLE = "TUTELAGE_API_KEY"
"""Environment variable with the key of a server; there is no other way to give it."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class _Message(_Strict):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    refusal: None = None
    tool_calls: list[Any] | None = Field(default=None, max_length=0)


class _ChatChoice(_Strict):
    index: int = Field(ge=0, le=0)
    message: _Message
    finish_reason: Literal["stop", "length"]


class _TextChoice(_Strict):
    index: int = Field(ge=0, le=0)
    text: str
    finish_reason: Literal["stop", "length"]


class _Usage(_Strict):
    completion_tokens: int = Field(ge=0)


class _ChatReply(_Strict):
    object: Literal["chat.completion"]
    model: str
    choices: list[_ChatChoice] = Field(min_length=1, max_length=1)
    usage: _Usage | None = None
    error: None = None


class _TextReply(_Strict):
    object: Literal["text_completion"]
    model: str
    choices: list[_TextChoice] = Field(min_length=1, max_length=1)
    usage: _Usage | None = None
    error: None = None


class _Model(_Strict):
    id: str


class _Models(_Strict):
    object: Literal["list"]
    data: list[_Model] = Field(min_length=1)


Schema = TypeVar("Schema", bound=_Strict)
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


@dataclass
class Server:
    """A model behind `http://host:port/v1`; `complete` draws several samples at the same time."""

    url: str
    sampling: SamplingConfig
    model_name: str = ""
    """Name of the model on the server; empty asks the server, which must have one only."""
    seed: int = 0
    enable_thinking: bool | None = None
    num_concurrent: int = 16
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self._wire = Wire(resolve(self.url), read_key(), self.limits.max_reply_bytes)
        self.model_name = self.model_name or self._ask("/models", None, self._only_model)

    def complete(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Completion]:
        """All samples of some problems, in order, or an error and none of them.

        Text prompts go to `/completions`, chats to `/chat/completions`.

        Raises:
            ModelError: a completion could not be had.
        """
        asked = [(p, s) for p in prompts for s in range(self.sampling.num_samples)]
        with ThreadPoolExecutor(self.num_concurrent) as pool:
            futures = [pool.submit(self._one, p, s, max_new_tokens) for p, s in asked]
            try:
                return [future.result() for future in futures]
            finally:
                if not all(future.done() for future in futures):  # an error, or Ctrl-C
                    self._wire.stop()
                    pool.shutdown(wait=False, cancel_futures=True)

    def _one(self, prompt: Prompt, sample: int, max_new_tokens: int) -> Completion:
        body: dict[str, Any] = {
            "model": self.model_name,
            "max_tokens": max_new_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": _seed(self.seed, prompt.id, sample),
            "n": 1,
            "stream": False,
        }

        def accept(content: bytes) -> Completion:
            text, reason, num_tokens = self._completion(content, prompt, max_new_tokens)
            return Completion(prompt, sample, text, reason == "length", num_tokens)

        if isinstance(prompt.content, str):
            return self._ask("/completions", body | {"prompt": prompt.content}, accept)
        body["messages"] = list(prompt.content)
        if self.enable_thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": self.enable_thinking}
        return self._ask("/chat/completions", body, accept)

    def _ask(
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

    def _completion(
        self, content: bytes, prompt: Prompt, max_new_tokens: int
    ) -> tuple[str, str, int | None]:
        """Text, reason to stop and number of tokens of a reply."""
        if isinstance(prompt.content, str):
            text = _parse(content, _TextReply)
            model, usage, said = text.model, text.usage, text.choices[0].text
            reason = text.choices[0].finish_reason
        else:
            chat = _parse(content, _ChatReply)
            model, usage, said = chat.model, chat.usage, _spoken(chat.choices[0])
            reason = chat.choices[0].finish_reason
        if model != self.model_name:
            raise BadReply(f"a reply of model {model!r} instead of {self.model_name!r}")
        if usage is not None and usage.completion_tokens > max_new_tokens:
            raise BadReply(f"{usage.completion_tokens} tokens instead of at most {max_new_tokens}")
        if not said.isascii() and any("\ud800" <= char <= "\udfff" for char in said):
            raise BadReply("text with half a surrogate pair")
        return said, reason, None if usage is None else usage.completion_tokens

    def _only_model(self, content: bytes) -> str:
        names = [model.id for model in _parse(content, _Models).data]
        if len(names) > 1:
            raise ConfigError(
                f"the server has {len(names)} models, got {', '.join(names[:5])}. "
                "Choose one with --model-name."
            )
        return names[0]


def _spoken(choice: _ChatChoice) -> str:
    """The text of a message; a thought that was cut off before its answer stays a thought."""
    message = choice.message
    if message.content is not None:
        return message.content
    if message.reasoning_content is None or choice.finish_reason != "length":
        raise BadReply("a message without content")
    return f"<think>{message.reasoning_content}"


def _parse(content: bytes, schema: type[Schema]) -> Schema:
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


def _seed(seed: int, prompt_id: str, sample: int) -> int:
    """A number for the server's generator, of 31 bits, for each sample of each problem."""
    digest = hashlib.blake2b(repr((seed, prompt_id, sample)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def read_key() -> str | None:
    """The key from the environment, None without one.

    Raises:
        ConfigError: it holds spaces or unprintable characters; it is not shown.
    """
    key = os.environ.get(KEY_VARIABLE)
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"{KEY_VARIABLE} holds spaces or unprintable characters. Set it anew.")
    return key or None
