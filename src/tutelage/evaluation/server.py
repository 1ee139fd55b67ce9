"""Completions from an OpenAI-compatible server.

Every completion has a deadline that a slow drip of bytes cannot stretch. A reply that is not what
was asked for is asked for again, and in the end an error: nothing is ever filled in. Nor may the
server fill in what a request leaves out: every request states all sampling settings.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

from pydantic import Field

from tutelage.config.sampling import SamplingConfig
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import ConfigError, DataError, ModelError
from tutelage.evaluation.benchmark import Progress
from tutelage.grading.answer import closes_unopened, opened_thought
from tutelage.rollout.http_client import (
    BadReply,
    Client,
    Limits,
    NoReply,
    RefusedRequest,
    Strict,
    parse,
)
from tutelage.rollout.request import NEUTRAL

Value = TypeVar("Value")

_UNKNOWN = re.compile(
    r"unrecogni[sz]ed|unknown|unexpected|unsupported|not (supported|permitted|allowed)|"
    r"extra_forbidden",
    re.IGNORECASE,
)
"""How servers say that a request has a field which they do not know."""


_THOUGHT_PARTS = ("thinking", "reasoning")
"""Parts of a message before its answer, which are no part of it."""
_Reason = Literal["stop", "length", "content_filter", "tool_calls", "function_call"]


class _Part(Strict):
    type: str
    text: str = ""


class _Message(Strict):
    role: Literal["assistant"]
    content: str | list[_Part] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    """The older name of `reasoning`."""
    refusal: str | None = None
    tool_calls: list[Any] | None = None
    function_call: dict[str, Any] | None = None
    """The older form of `tool_calls`."""


class _ChatChoice(Strict):
    index: int = Field(ge=0, le=0)
    message: _Message
    finish_reason: _Reason


class _TextChoice(Strict):
    index: int = Field(ge=0, le=0)
    text: str
    finish_reason: _Reason


class _Usage(Strict):
    completion_tokens: int = Field(ge=0)
    prompt_tokens: int | None = None


class ChatReply(Strict):
    object: Literal["chat.completion"]
    model: str
    choices: list[_ChatChoice] = Field(min_length=1, max_length=1)
    usage: _Usage | None = None
    error: None = None


class TextReply(Strict):
    object: Literal["text_completion"]
    model: str
    choices: list[_TextChoice] = Field(min_length=1, max_length=1)
    usage: _Usage | None = None
    error: None = None


class _Model(Strict):
    id: str


class _Models(Strict):
    object: Literal["list"]
    data: list[_Model] = Field(min_length=1)


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
    log: Callable[[str], None] | None = None
    """Receives one line for every field of the requests that the server does not know, and for
    every kind of reply that holds no answer."""

    def __post_init__(self) -> None:
        self._neutral = {"top_k": self.sampling.top_k or -1} | NEUTRAL
        self._opens_thoughts = False
        self._logged: set[str] = set()
        self.client = Client(self.url, self.limits, self.num_concurrent)
        if not self.model_name:
            try:
                self.model_name = self.client.ask("/models", None, self._only_model)
            except NoReply as error:
                raise ModelError(
                    f"the server {self.client.url} gave {error.reason}. Start it, or correct its "
                    "URL."
                ) from None

    @property
    def sent(self) -> dict[str, Any]:
        """The sampling settings that requests state; without those that the server refused."""
        chosen = {"temperature": self.sampling.temperature, "top_p": self.sampling.top_p}
        return chosen | self._neutral

    def complete(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        progress: Progress = lambda count: None,
    ) -> list[Rollout]:
        """All samples of some problems, in order, or an error and none of them.

        Text prompts go to `/completions`, chats to `/chat/completions`.

        Raises:
            ModelError: a completion could not be had.
        """
        for prompt in prompts:
            if prompt.tools:
                raise DataError(
                    f"prompt {prompt.id!r} has tools, which are not sent to a server. Evaluate the "
                    "model here, or leave the tools out."
                )
        asked = [(p, s) for p in prompts for s in range(self.sampling.num_samples)]
        drawn = self.client.each([partial(self._one, p, s, max_new_tokens) for p, s in asked])
        progress(len(drawn))
        return [self._with_thought(completion) for completion in drawn]

    def _with_thought(self, completion: Rollout) -> Rollout:
        """A server shows no prompts: that they open a thought is seen where one is closed."""
        if isinstance(completion.prompt.content, str):
            return replace(completion, thought=opened_thought(completion.prompt.content))
        return replace(completion, thought="<think>") if self._opens_thoughts else completion

    def body_of(self, prompt_id: str, sample: int, max_new_tokens: int) -> dict[str, Any]:
        """What every request states, besides the sampling settings."""
        return {
            "model": self.model_name,
            "max_tokens": max_new_tokens,
            "seed": seed_of(self.seed, prompt_id, sample),
            "n": 1,
            "stream": False,
        }

    async def _one(self, prompt: Prompt, sample: int, max_new_tokens: int) -> Rollout:
        body = self.body_of(prompt.id, sample, max_new_tokens)

        def accept(content: bytes) -> Rollout:
            text, reason, num_tokens = self._completion(content, prompt, max_new_tokens)
            if closes_unopened(text):
                self._opens_thoughts = True
            is_truncated = reason == "length"
            return Rollout(
                prompt, sample, (), (), is_truncated, text=text, num_reported_tokens=num_tokens
            )

        if isinstance(prompt.content, str):
            return await self._ask("/completions", body | {"prompt": prompt.content}, accept)
        body["messages"] = list(prompt.content)
        return await self.ask_chat(body, accept)

    async def ask_chat(self, body: dict[str, Any], accept: Callable[[bytes], Value]) -> Value:
        """Ask for an answer to the messages of a chat."""
        if self.enable_thinking is not None:
            body = body | {"chat_template_kwargs": {"enable_thinking": self.enable_thinking}}
        return await self._ask("/chat/completions", body, accept)

    async def _ask(
        self, path: str, body: dict[str, Any], accept: Callable[[bytes], Value]
    ) -> Value:
        """Ask with all sampling settings, but for those that the server does not know."""
        while True:
            sent = self.sent
            try:
                return await self.client.send(path, body | sent, accept)
            except RefusedRequest as error:
                if not self._leave_out(error, sent):
                    raise

    def _leave_out(self, error: RefusedRequest, sent: dict[str, Any]) -> bool:
        """Whether it was refused for neutral settings that are unknown; no more are sent then."""
        is_unknown = error.status in (400, 422) and _UNKNOWN.search(error.reason)
        named = set(re.findall(r"\w+", error.reason)) & (sent.keys() - {"temperature", "top_p"})
        if not is_unknown or not named:
            return False
        new = [name for name in self._neutral if name in named]
        self._neutral = {k: v for k, v in self._neutral.items() if k not in named}
        if new:
            self._log_once(f"the server does not take {', '.join(new)}: requests are sent without")
        return True

    def _completion(
        self, content: bytes, prompt: Prompt, max_new_tokens: int
    ) -> tuple[str, str, int | None]:
        """Text, reason to stop and number of tokens of a reply."""
        reply: TextReply | ChatReply
        if isinstance(prompt.content, str):
            reply = parse(content, TextReply)
        else:
            reply = parse(content, ChatReply)
        self.refuse_other(reply, max_new_tokens)
        choice, usage = reply.choices[0], reply.usage
        num_tokens = None if usage is None else usage.completion_tokens
        return self.answer_of(choice), choice.finish_reason, num_tokens

    def refuse_other(self, reply: TextReply | ChatReply, max_new_tokens: int) -> None:
        """A reply of another model, or a longer one than was asked for.

        Raises:
            BadReply: it is one.
        """
        usage = reply.usage
        if reply.model != self.model_name:
            raise BadReply(f"a reply of model {reply.model!r} instead of {self.model_name!r}")
        if usage is not None and usage.completion_tokens > max_new_tokens:
            raise BadReply(f"{usage.completion_tokens} tokens instead of at most {max_new_tokens}")

    def answer_of(self, choice: _ChatChoice | _TextChoice) -> str:
        """The text of a reply; empty where it holds no answer, which is logged once."""
        missing = _missing_answer(choice)
        if missing:
            self._log_once(f"a reply holds {missing}: such replies count as empty completions")
        return "" if missing else _text_of(choice)

    def _log_once(self, line: str) -> None:
        """Logs a line, once."""
        if self.log is not None and line not in self._logged:
            self.log(line)
        self._logged.add(line)

    def _only_model(self, content: bytes) -> str:
        names = [model.id for model in parse(content, _Models).data]
        if len(names) > 1:
            raise ConfigError(
                f"the server has {len(names)} models, got {', '.join(names[:5])}. "
                "Choose one with --model-name."
            )
        return names[0]


def _missing_answer(choice: _ChatChoice | _TextChoice) -> str:
    """What a reply holds instead of an answer; empty if it holds one."""
    if choice.finish_reason == "content_filter":
        return "what a filter left"
    if isinstance(choice, _TextChoice):
        return ""
    message = choice.message
    parts = message.content if isinstance(message.content, list) else []
    if message.refusal or any(part.type == "refusal" for part in parts):
        return "a refusal"
    if message.content or message.reasoning is not None or message.reasoning_content is not None:
        return ""
    if message.tool_calls or message.function_call:
        return "a tool call"
    is_stated = "content" in message.model_fields_set and choice.finish_reason == "stop"
    return "no content" if is_stated and message.content is None else ""


def _text_of(choice: _ChatChoice | _TextChoice) -> str:
    """The text of a reply; a thought that never came to an answer stays a thought."""
    if isinstance(choice, _TextChoice):
        return choice.text
    message = choice.message
    thought = message.reasoning_content if message.reasoning is None else message.reasoning
    if isinstance(message.content, str):
        return message.content
    if message.content is not None:
        texts = [part.text for part in message.content if part.type == "text"]
        others = {part.type for part in message.content} - {"text", *_THOUGHT_PARTS}
        if others:
            raise BadReply(f"a message with a part of type {min(others)!r}, which is no text")
        if texts or not message.content:
            return "".join(texts)
        thought = ""
    if thought is None and choice.finish_reason != "length":
        raise BadReply("a message without content")
    return f"<think>{thought or ''}"


def seed_of(seed: int, prompt_id: str, sample: int) -> int:
    """A number for the server's generator, of 31 bits, for each sample of each problem."""
    digest = hashlib.blake2b(repr((seed, prompt_id, sample)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1
