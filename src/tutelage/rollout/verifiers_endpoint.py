"""An endpoint on this machine that environments of verifiers ask for the student's turns.

It speaks the protocol of vLLM's ``/inference/v1/generate``: ids in, ids with log-probabilities
out, so that no turn is ever tokenized again.
"""

from __future__ import annotations

import hmac
import json
import queue
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tutelage.config.sampling import SamplingConfig

_HEADER = "X-Session-ID"
"""Names the trace that a request belongs to."""
_PATH = "/inference/v1/generate"
TOKEN_LIMIT = "tutelage: a limit of tokens of the conversation is reached"
"""The answer to a request for a turn that is denied; a rollout's error contains it."""
_MAX_BYTES = 64 * 2**20
"""Size of a request; one with a million ids has 8 MiB."""
_STATED = ("temperature", "top_p", "top_k")
"""Settings of a request that have to be the run's."""
_IGNORED = (
    *("max_tokens", "stop_token_ids", "logprobs", "skip_special_tokens"),
    "routed_experts_prompt_start",
)
"""Settings that are looked at by themselves, or change no token."""


class _Request(BaseModel):
    """The body of a request; anything else it may hold, such as images, is refused."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)
    model: str
    token_ids: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    sampling_params: dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """What was sampled for a request."""

    ids: Sequence[int]
    logprobs: Sequence[float]
    is_cut: bool
    """The last id is no stop token."""


@dataclass
class Asked:
    """A request that waits for an answer."""

    session: str
    """The trace that it belongs to."""
    ids: tuple[int, ...]
    max_tokens: int
    """Most tokens that it asks for; 0 states no number."""
    _answered: threading.Event = field(default_factory=threading.Event)
    _answer: Turn | str = "the endpoint is closed"

    def answer(self, answer: Turn | str) -> None:
        """Answer with what was sampled, or with the reason why nothing is."""
        self._answer = answer
        self._answered.set()

    def wait(self) -> Turn | str:
        """The answer, when there is one."""
        self._answered.wait()
        return self._answer


@dataclass(frozen=True)
class Refused:
    """A request that no answer can be given to."""

    reason: str


class Endpoint:
    """Takes requests on 127.0.0.1 and puts them into a queue, for the sampler to answer.

    Args:
        key: what a request's header has to hold.
        stops: ids that end a turn of the student.
    """

    def __init__(self, key: str, stops: frozenset[int]) -> None:
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        """Requests (`Asked`) and refusals (`Refused`); others may add what they have."""
        self.sampling = SamplingConfig()
        """Settings that a request must not change."""
        self._key, self._stops = key, stops
        self._waiting: dict[int, Asked] = {}
        self._is_closed = False
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.endpoint = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.daemon = True
        self._thread.start()

    @property
    def url(self) -> str:
        """Its address, without a path."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Take no more requests, and answer those that wait."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        with self._lock:
            self._is_closed = True
            waiting = list(self._waiting.values())
        for asked in waiting:
            asked.answer("the endpoint is closed")

    def may_ask(self, authorization: str | None) -> bool:
        """Whether a request has the key."""
        shown = (authorization or "").removeprefix("Bearer ")
        return hmac.compare_digest(shown.encode(), self._key.encode())

    def reply(self, session: str | None, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and body of the reply to a request, when it has been answered."""
        try:
            asked = self._accepted(session, body)
        except _Unusable as error:
            self.events.put(Refused(str(error)))
            return 400, _error(str(error))
        with self._lock:
            if self._is_closed:
                return 400, _error("the endpoint is closed")
            self._waiting[id(asked)] = asked
        self.events.put(asked)
        answer = asked.wait()
        with self._lock:
            del self._waiting[id(asked)]
        return (400, _error(answer)) if isinstance(answer, str) else (200, _generated(answer))

    def _accepted(self, session: str | None, body: bytes) -> Asked:
        if not session:
            raise _Unusable(f"a request without the header {_HEADER}")
        try:
            request = _Request.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise _Unusable(f"a request that cannot be used: {where}: {first['msg']}") from None
        return Asked(session, tuple(request.token_ids), self._most(request.sampling_params))

    def _most(self, stated: dict[str, Any]) -> int:
        """The most tokens that a request asks for, if it changes nothing else."""
        most = stated.get("max_tokens", 0)
        if type(most) is not int or most < 0:
            raise _Unusable(f"a request with max_tokens = {_shown(most)!r}")
        stops = stated.get("stop_token_ids", [])
        if not isinstance(stops, list) or any(
            type(stop) is not int or stop not in self._stops for stop in stops
        ):
            raise _Unusable(
                f"a request that stops at {_shown(stops)}, where the student stops at "
                f"{sorted(self._stops)}"
            )
        known = {key: getattr(self.sampling, key) for key in _STATED}
        for key, value in stated.items():
            if key in known and value != known[key]:
                raise _Unusable(
                    f"a request with {key} = {_shown(value)}, where the run has {known[key]}"
                )
            if key not in (*known, *_IGNORED):
                raise _Unusable(f"a request with {_shown(key)!r}, which the run does not have")
        return most


class _Unusable(Exception):
    """A request that no answer can be given to."""


class _Server(ThreadingHTTPServer):
    endpoint: Endpoint
    daemon_threads = True
    request_queue_size = 1024

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A closed connection is the worker's own failure; any other error fails the step."""
        error = sys.exception()
        if not isinstance(error, ConnectionError):
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.endpoint.events.put(Refused(f"a request that failed with {reason[:200]}"))


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_POST(self) -> None:
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal() or int(size) > _MAX_BYTES:
            self.close_connection = True
            return self._send(413, _error(f"a request of {size or 'unknown'} bytes"))
        body = self.rfile.read(int(size))
        if not self.server.endpoint.may_ask(self.headers.get("Authorization")):
            return self._send(401, _error("no key"))
        if self.path != _PATH:
            return self._send(404, _error(f"no such path, only {_PATH}"))
        return self._send(*self.server.endpoint.reply(self.headers.get(_HEADER), body))

    def do_GET(self) -> None:
        self._send(404, _error(f"no such path, only {_PATH}"))

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged."""

    def _send(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _shown(value: object) -> str:
    return " ".join(str(value).split())[:80]


def _error(reason: str) -> dict[str, Any]:
    return {"error": {"message": reason, "type": "invalid_request_error"}}


def _generated(turn: Turn) -> dict[str, Any]:
    pairs = zip(turn.ids, turn.logprobs, strict=True)
    logprobs = [{"token": f"token_id:{token}", "logprob": x} for token, x in pairs]
    choice = {
        "index": 0,
        "token_ids": list(turn.ids),
        "finish_reason": "length" if turn.is_cut else "stop",
        "logprobs": {"content": logprobs},
    }
    return {"request_id": "", "choices": [choice]}
