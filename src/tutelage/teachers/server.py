"""The server of a teacher: token ids in, final hidden states out, one forward pass at a time.

It uses Python's own HTTP server with a thread a connection, as a request is one long computation
and there are few.
"""

from __future__ import annotations

import hmac
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import torch

from tutelage.errors import ConfigError, TutelageError, is_out_of_memory
from tutelage.models.head import hidden_rows
from tutelage.models.packing import require_packed
from tutelage.teachers.identity import identity_of, weights_checksum
from tutelage.teachers.messages import (
    MAX_TOKENS,
    VERSION,
    MalformedError,
    Request,
    packed_reply,
    read_request,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IDENTITY, HIDDEN = "/v1/identity", "/v1/hidden"
"""Paths of the server."""
_READ_S = 60.0
"""Seconds without a byte of a request after which its connection ends."""
_MAX_BYTES = 24 * MAX_TOKENS + (1 << 20)


class ServedModel:
    """A frozen model that answers requests, one after the other."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.identity = identity_of(model)
        self.weights = weights_checksum(model)
        embeddings: Any = model.get_input_embeddings()
        self._num_ids = int(embeddings.num_embeddings)
        self._lock = threading.Lock()
        self._is_packed = False

    def described(self) -> dict[str, Any]:
        """What a run compares with its own configuration."""
        return {
            "version": VERSION,
            "model": self.name,
            "weights": self.weights,
            "identity": asdict(self.identity),
        }

    def reply(self, content: bytes) -> bytes:
        """The reply to a message.

        Raises:
            MalformedError: it is no request, or one for another model.
            TutelageError: the model cannot compute it.
        """
        request = read_request(content)
        self._refuse(request)
        with self._lock, torch.no_grad():
            if request.batch.packed is not None and not self._is_packed:
                require_packed(self.model, f"model {self.name!r}")
                self._is_packed = True
            hidden = hidden_rows(self.model, request.batch.to(self.model.device)).cpu()
        return packed_reply(request, hidden, self.identity.head, self.weights)

    def _refuse(self, request: Request) -> None:
        if request.head != self.identity.head:
            raise MalformedError("a request for another model than the one that is served")
        ids = request.batch.input_ids
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._num_ids:
            raise MalformedError(f"ids from {low} to {high}, of a model with {self._num_ids}")


class TeacherServer(ThreadingHTTPServer):
    """Listens from the start, and answers once it has a model and `serve_forever` runs.

    Args:
        host: address to listen on.
        port: 0 takes a free one.
        key: what requests have to carry; None asks for none.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    served: ServedModel
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, host: str, port: int, key: str | None = None) -> None:
        self.key = key
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(
                f"cannot listen on {host}:{port}: {reason}. Give another --host or --port."
            ) from None

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no defect; anything else is shown."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@contextmanager
def serving(
    served: ServedModel, host: str = "127.0.0.1", port: int = 0, key: str | None = None
) -> Iterator[str]:
    """Answer in a thread until the block ends; gives the server's address."""
    server = TeacherServer(host, port, key)
    server.served = served
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "tutelage", ""
    timeout = _READ_S
    server: TeacherServer

    def do_GET(self) -> None:
        """The model's identity."""
        if self._is_allowed() and self._is_at(IDENTITY):
            self._answer(
                200, json.dumps(self.server.served.described()).encode(), "application/json"
            )

    def do_POST(self) -> None:
        """The hidden states of a request."""
        if not (self._is_allowed() and self._is_at(HIDDEN)):
            return
        length = self.headers.get("Content-Length", "")
        if not (length.isdecimal() and len(length) < 20):
            self._refuse(411, "a request needs a Content-Length")
            return
        if int(length) > _MAX_BYTES:
            self._refuse(413, f"a request of {length} bytes, of at most {_MAX_BYTES}")
            return
        content = self.rfile.read(int(length))
        if len(content) == int(length):
            self._answered(lambda: self.server.served.reply(content))

    def _answered(self, reply: Callable[[], bytes]) -> None:
        try:
            content = reply()
        except MalformedError as error:
            self._refuse(400, str(error))
        except TutelageError as error:
            self._refuse(422, str(error))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                self._refuse(500, "the forward pass failed; the server's output says how")
                raise
            self._refuse(422, "out of memory. Lower micro_batch_tokens")
        else:
            self._answer(200, content, "application/octet-stream")

    def _is_allowed(self) -> bool:
        given = self.headers.get("Authorization", "")
        if self.server.key is None or hmac.compare_digest(
            given.encode(), f"Bearer {self.server.key}".encode()
        ):
            return True
        self._refuse(401, "the key is missing or wrong")
        return False

    def _is_at(self, path: str) -> bool:
        if self.path == path:
            return True
        self._refuse(404, f"there is {IDENTITY} (GET) and {HIDDEN} (POST)")
        return False

    def _refuse(self, status: int, reason: str) -> None:
        """One line of text; the connection ends, as what follows may be the rest of the request."""
        self.close_connection = True
        self._answer(status, f"{' '.join(reason.split())}\n".encode(), "text/plain; charset=utf-8")

    def _answer(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing for each request."""
