"""Requests to a model server: retries with growing waits, one deadline, all replies or an error."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import random
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn, TypeVar

import anyio
import httpx2
from anyio import to_thread
from anyio.from_thread import start_blocking_portal
from pydantic import BaseModel, ConfigDict, ValidationError

from tutelage.errors import ConfigError, ModelError

KEY_VARIABLE = "TUTELAGE_API_KEY"
"""Environment variable with the key of a server; there is no other way to give it."""

_MAY_BE_SECRET = re.compile(r"[@?#]|:(?!\d*(/|$))")
"""In a URL: what a user, a password or a key may be before or after."""
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)


class BadReply(Exception):
    """The server did not answer, or not with what it was asked for; worth another try."""


class NoReply(ModelError):
    """The server gave no usable reply within its tries and its time: it may be gone."""

    def __init__(self, url: str, reason: str) -> None:
        self.reason = reason
        """How many tries there were, and what came of the last."""
        super().__init__(
            f"the server {url} gave {reason.rstrip('.')}. Nothing of this batch was kept; run the "
            "command again to continue."
        )


class RefusedRequest(ModelError):
    """The server says that the request itself is wrong: the same one will be refused again."""

    def __init__(self, url: str, status: int, reason: str) -> None:
        self.status = status
        self.reason = reason
        """What the server said, of up to 2,000 characters, printable and without the key."""
        said = f"status {status}: {reason[:200].rstrip('.')}"
        super().__init__(f"the server {url} refuses the request: {said}.")


class Strict(BaseModel):
    """A reply in which nothing is converted and nothing is filled in."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


Schema = TypeVar("Schema", bound=Strict)
Value = TypeVar("Value")
Body = dict[str, Any] | bytes | None
"""Of a request: JSON, bytes of a format of their own, or nothing."""


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

    Raises:
        ConfigError: the URL names no server, or the environment's key cannot be one.
    """

    def __init__(
        self, url: str, limits: Limits, num_concurrent: int = 16, key: str | None = None
    ) -> None:
        """Take an address; `key` is that of the configuration, where it has no path."""
        self.limits = limits
        self.num_concurrent = num_concurrent
        self.url = checked_url(url) if key is None else checked_url(url, key, "http://host:8000")
        self._key = read_key()
        headers = {"Accept-Encoding": "identity", "User-Agent": "tutelage"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        self._session: Callable[[], httpx2.AsyncClient] = partial(
            httpx2.AsyncClient,
            headers=headers,
            verify=ssl.create_default_context(),
            timeout=None,  # one read's; the deadline is the whole request's
            trust_env=False,  # no proxy and no other key because of an environment variable
        )

    def once(self) -> Client:
        """The same server, to be asked for what must not be done twice: there is one try."""
        return self.within(num_tries=1)

    def within(self, **limits: Any) -> Client:
        """The same server with other limits, e.g. of the size of a reply."""
        other = copy.copy(self)
        other.limits = replace(self.limits, **limits)
        return other

    def each(
        self,
        requests: Sequence[Callable[[], Awaitable[Value]]],
        progress: Callable[[int], None] | None = None,
    ) -> list[Value]:
        """`run_all` of requests to this server."""
        return run_all([(self, request) for request in requests], progress)

    def ask(self, path: str, body: Body, accept: Callable[[bytes], Value]) -> Value:
        """One request of `send`, and the wait for it."""
        return self.each([partial(self.send, path, body, accept)])[0]

    async def send(self, path: str, body: Body, accept: Callable[[bytes], Value]) -> Value:
        """POST (GET without a body) until a reply is accepted, within tries and deadline."""
        end = time.monotonic() + self.limits.deadline_s
        num_tries, delay = 0, self.limits.first_delay_s
        while True:
            num_tries += 1
            try:
                return accept(await self._exchange(path, body, end))
            except BadReply as error:
                if num_tries >= self.limits.num_tries or time.monotonic() + delay >= end:
                    said = self._clean(str(error))
                    reason = f"no usable reply in {num_tries} tries: {said}"
                    raise NoReply(self.url, reason) from None
            await anyio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(2 * delay, self.limits.max_delay_s)

    async def _exchange(self, path: str, body: Body, end: float) -> bytes:
        """The body of one reply."""
        seconds = max(0.1, end - time.monotonic())
        method, content, headers = "GET", None, {}
        if isinstance(body, bytes):
            method, content = "POST", body
            headers = {"Content-Type": "application/octet-stream"}
        elif body is not None:
            method, content = "POST", json.dumps(body).encode()
            headers = {"Content-Type": "application/json"}
        try:
            with anyio.fail_after(seconds):
                async with (
                    self._session() as session,
                    session.stream(
                        method, self.url + path, content=content, headers=headers
                    ) as reply,
                ):
                    return await self._read(path, reply)
        except TimeoutError:
            raise BadReply(f"no whole reply within {seconds:.0f} s") from None
        except httpx2.RequestError as error:
            raise BadReply(str(error) or type(error).__name__) from None

    async def _read(self, path: str, reply: httpx2.Response) -> bytes:
        content = bytearray()
        async for piece in reply.aiter_bytes():
            content += piece
            if len(content) > self.limits.max_reply_bytes:
                raise BadReply(f"a reply of more than {self.limits.max_reply_bytes} bytes")
        if reply.status_code != 200:
            self._refuse(path, reply.status_code, bytes(content))
        return bytes(content)

    def _refuse(self, path: str, status: int, content: bytes) -> NoReturn:
        said = self._clean(content[:2000].decode("utf-8", "replace"), 2000)
        if status in _RETRIED:
            raise BadReply(f"status {status}: {said}")
        if status in (401, 403):
            raise ModelError(
                f"the server {self.url} refuses the key (status {status}). Set {KEY_VARIABLE} in "
                "the environment."
            )
        if 300 <= status < 400:
            said = "it redirects, which is not followed"
        raise RefusedRequest(self.url + path, status, said)

    def _clean(self, text: str, length: int = 200) -> str:
        """Foreign text for one line of an error: short, printable, without the key."""
        if self._key is not None:
            text = text.replace(self._key, "***")
        shown = "".join(char if char.isprintable() else " " for char in text)
        return " ".join(shown.split())[:length]


def run_all(
    tasks: Sequence[tuple[Client, Callable[[], Awaitable[Value]]]],
    progress: Callable[[int], None] | None = None,
    on_start: Callable[[Sequence[Future[Value]]], None] | None = None,
) -> list[Value]:
    """What all requests return, in order, or the first error and nothing.

    They run in an event loop of another thread, so that a signal ends the wait for them.

    Args:
        tasks: each with the client whose `num_concurrent` limits it.
        progress: called in this thread with the number of requests just answered.
        on_start: called with the futures of all; one that is canceled ends the others.
    """
    places = {client: asyncio.Semaphore(client.num_concurrent) for client, _ in tasks}

    async def limited(client: Client, request: Callable[[], Awaitable[Value]]) -> Value:
        async with places[client]:
            return await request()

    values = []
    with start_blocking_portal() as portal:  # an error, or Ctrl-C, cancels what is left
        futures = [portal.start_task_soon(limited, client, request) for client, request in tasks]
        if on_start is not None:
            on_start(futures)
        for future in futures:
            values.append(future.result())
            if progress is not None:
                progress(1)
    return values


async def in_thread(function: Callable[..., Value], *arguments: Any) -> Value:
    """What a function returns that may take long, called in a thread of its own."""
    one = anyio.CapacityLimiter(1)  # the default one is shared by all that wait
    return await to_thread.run_sync(function, *arguments, abandon_on_cancel=True, limiter=one)


async def in_thread_within(
    seconds: float, function: Callable[..., Value], *arguments: Any
) -> Value:
    """`in_thread`, with the thread left behind if it takes longer.

    Raises:
        TimeoutError: it did.
    """
    with anyio.fail_after(seconds):
        return await in_thread(function, *arguments)


def parse(content: bytes, schema: type[Schema]) -> Schema:
    """A reply as its schema wants it."""
    try:
        return schema.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "JSON"
        raise BadReply(f"a reply whose {place} does not fit: {first['msg']}") from None


def checked_url(
    url: str, what: str = "the server's URL", example: str = "http://host:8000/v1"
) -> str:
    """A base URL that names a server and holds no secret, without its last slash.

    Args:
        url: as it was given.
        what: names it in errors.
        example: of one.

    Raises:
        ConfigError: it is another one; it is shown unless it may hold a secret.
    """
    try:
        parsed = httpx2.URL(url)
        parsed.host.encode("idna")  # as a look-up will
    except (httpx2.InvalidURL, UnicodeError):  # its reason may show a part of a password
        parsed = httpx2.URL()
    is_port = parsed.port is None or parsed.port < 1 << 16
    if parsed.scheme not in ("http", "https") or not parsed.host or not is_port:
        shown = "" if _MAY_BE_SECRET.search(url) else f", got {url[:200]!r}"
        raise ConfigError(f"{what} is malformed{shown}. Write it as {example}.")
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise ConfigError(
            f"{what} holds a user, a password or more than a path. Write it as {example}, and set "
            f"{KEY_VARIABLE} where a key is needed."
        )
    return str(parsed).rstrip("/")


def read_key() -> str | None:
    """The key from the environment, None without one; what cannot be a key is not shown."""
    key = os.environ.get(KEY_VARIABLE)
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"{KEY_VARIABLE} holds spaces or unprintable characters. Set it anew.")
    return key or None
