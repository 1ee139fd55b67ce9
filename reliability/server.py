"""A server that answers in every wrong way, and how many of its answers the client takes.

python -m reliability server      # the long version; writes benchmarks/results
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from patience import HANG_S
from tutelage.config.sampling import SamplingConfig
from tutelage.data.types import Prompt
from tutelage.errors import ModelError
from tutelage.evaluation.server import Server
from tutelage.rollout.http_client import KEY_VARIABLE, Limits

from .record import Outcome

MODEL, TEXT, KEY = "a-model", "The answer is \\boxed{4}.", "key-4f1d9c"
DEADLINE_S = 0.6
GRACE_S = 120.0
"""What a loaded machine may add to the deadline before a request counts as hanging."""
SILENCE_S = 240.0
"""How long the slow replies go on, unless the client hangs up: past deadline and grace."""
MAX_REPLY_BYTES = 100_000

Json = dict[str, Any]
Mutation = Callable[["Exchange"], None]


@dataclass
class Exchange:
    """One request that was read, and the means to answer it."""

    socket: socket.socket
    path: str
    body: Json
    random: random.Random

    def good(self) -> Json:
        """The reply that a well-behaved server would give."""
        choice: Json = {"index": 0, "finish_reason": "stop"}
        is_chat = "messages" in self.body
        said = {"message": {"role": "assistant", "content": TEXT}} if is_chat else {"text": TEXT}
        return {
            "id": "x",
            "object": "chat.completion" if is_chat else "text_completion",
            "model": self.body["model"],
            "choices": [choice | said],
            "usage": {"completion_tokens": 9},
        }

    def send(
        self,
        content: bytes | str,
        status: str = "200 OK",
        kind: str | None = "application/json",
        headers: tuple[str, ...] = (),
        length: int | None = None,
    ) -> None:
        """Answer with these bytes; `length` states another length than theirs."""
        data = content.encode() if isinstance(content, str) else content
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(data) if length is None else length}"]
        lines += [f"Content-Type: {kind}"] if kind else []
        self.socket.sendall("\r\n".join([*lines, *headers, "", ""]).encode() + data)

    def send_json(self, value: Any) -> None:
        """Answer with JSON."""
        self.send(json.dumps(value))


def good(exchange: Exchange) -> None:
    """The negative control: nothing is wrong with this one."""
    exchange.send_json(exchange.good())


# --- replies whose JSON is wrong ------------------------------------------------------------------


def with_choice(**changes: Any) -> Mutation:
    def mutation(exchange: Exchange) -> None:
        reply = exchange.good()
        reply["choices"][0] |= changes
        exchange.send_json(reply)

    return mutation


def with_message(**changes: Any) -> Mutation:
    def mutation(exchange: Exchange) -> None:
        reply = exchange.good()
        reply["choices"][0]["message"] |= changes
        exchange.send_json(reply)

    return mutation


def with_reply(**changes: Any) -> Mutation:
    return lambda exchange: exchange.send_json(exchange.good() | changes)


def without(*path: Any) -> Mutation:
    def mutation(exchange: Exchange) -> None:
        reply: Any = exchange.good()
        inner = reply
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        exchange.send_json(reply)

    return mutation


def replaced(old: str, new: str) -> Mutation:
    def mutation(exchange: Exchange) -> None:
        text = json.dumps(exchange.good())
        assert old in text
        exchange.send(text.replace(old, new, 1))

    return mutation


def cut_json(exchange: Exchange) -> None:
    text = json.dumps(exchange.good())
    exchange.send(text[: exchange.random.randrange(len(text))])


def wrong_bytes(exchange: Exchange) -> None:
    data = json.dumps(exchange.good()).encode()
    place = data.index(b"answer")
    exchange.send(data[:place] + b"\xff\xfe" + data[place:])


JSON_MUTATIONS: dict[str, Mutation] = {
    "empty body": lambda x: x.send(""),
    "not JSON": lambda x: x.send("<html>busy</html>"),
    "cut JSON": cut_json,
    "an array": lambda x: x.send_json([x.good()]),
    "a string": lambda x: x.send_json(TEXT),
    "null": lambda x: x.send("null"),
    "two objects": lambda x: x.send(json.dumps(x.good()) + "\n" + json.dumps(x.good())),
    "a byte order mark": lambda x: x.send("\ufeff" + json.dumps(x.good())),
    "UTF-16": lambda x: x.send(json.dumps(x.good()).encode("utf-16")),
    "invalid UTF-8": wrong_bytes,
    "deep nesting": lambda x: x.send("[" * 40_000 + "]" * 40_000),
    "a huge integer": replaced('"completion_tokens": 9', f'"completion_tokens": {"9" * 5000}'),
    "NaN": replaced('"completion_tokens": 9', '"completion_tokens": NaN'),
    "no choices": with_reply(choices=[]),
    "choices missing": without("choices"),
    "two choices": lambda x: x.send_json(x.good() | {"choices": x.good()["choices"] * 2}),
    "choices as object": lambda x: x.send_json(x.good() | {"choices": x.good()["choices"][0]}),
    "index 1": with_choice(index=1),
    "index as text": with_choice(index="0"),
    "index as boolean": with_choice(index=False),
    "index missing": without("choices", 0, "index"),
    "no reason to stop": with_choice(finish_reason=None),
    "content a number": with_message(content=4),
    "content missing": without("choices", 0, "message", "content"),
    "message missing": without("choices", 0, "message"),
    "half a surrogate pair": replaced("The answer", "The \\ud83d answer"),
    "the user's role": with_message(role="user"),
    "another model": with_reply(model="another-model"),
    "model missing": without("model"),
    "a chunk of a stream": with_reply(object="chat.completion.chunk"),
    "an error beside": with_reply(error={"message": "overloaded"}),
    "only an error": lambda x: x.send_json({"error": {"message": "overloaded"}}),
    "negative tokens": with_reply(usage={"completion_tokens": -1}),
    "too many tokens": with_reply(usage={"completion_tokens": 10**6}),
    "tokens as text": with_reply(usage={"completion_tokens": "9"}),
    "half a token": with_reply(usage={"completion_tokens": 8.5}),
}


# --- replies whose HTTP is wrong ------------------------------------------------------------------


def drip(head: bytes) -> Mutation:
    """A space at a time, each well within any timeout of a single read."""
    return endless(head, b" ", 0.2)


def hang(data: bytes = b"") -> Mutation:
    def mutation(exchange: Exchange) -> None:
        exchange.socket.sendall(data)
        exchange.socket.settimeout(SILENCE_S)
        exchange.socket.recv(1)  # until the client hangs up

    return mutation


def endless(head: bytes, piece: bytes, period_s: float = 0.0) -> Mutation:
    def mutation(exchange: Exchange) -> None:
        exchange.socket.sendall(head)
        end = time.monotonic() + SILENCE_S
        while time.monotonic() < end:
            exchange.socket.sendall(piece)
            time.sleep(period_s)

    return mutation


def reset(exchange: Exchange) -> None:
    exchange.socket.sendall(b"HTTP/1.1 200 OK\r\nContent-")
    exchange.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def chunked(ending: bytes) -> Mutation:
    def mutation(exchange: Exchange) -> None:
        text = json.dumps(exchange.good()).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked"
        exchange.socket.sendall(head + b"\r\n\r\n" + ending.replace(b"TEXT", text))

    return mutation


def raw(data: bytes) -> Mutation:
    return lambda exchange: exchange.socket.sendall(data)


def status(line: str, *headers: str) -> Mutation:
    return lambda x: x.send(json.dumps(x.good()), status=line, headers=headers)


def short_by(exchange: Exchange) -> None:
    """A whole JSON text, of which the length says that something is missing."""
    text = json.dumps(exchange.good())
    exchange.send(text, length=len(text) + exchange.random.randrange(1, 99))


_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n"

HTTP_MUTATIONS: dict[str, Mutation] = {
    "closed at once": raw(b""),
    "reset": reset,
    "a garbled status": raw(b"HTTP/1.1 two hundred\r\n\r\n"),
    "not HTTP": raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "a header too long": raw(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n"),
    "too many headers": raw(b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 200 + b"\r\n"),
    "shorter than stated": short_by,
    "longer than stated": lambda x: x.send(json.dumps(x.good()), length=40),
    "a negative length": lambda x: x.send("{}", length=-5),
    "a bad chunk size": chunked(b"zz\r\nTEXT\r\n0\r\n\r\n"),
    "chunks cut off": chunked(b"ffff\r\nTEXT\r\n"),
    "no last chunk": chunked(b"4\r\nnull\r\n"),
    "an event stream": lambda x: x.send(
        f"data: {json.dumps(x.good())}\n\n", kind="text/event-stream"
    ),
    "said to be gzip": lambda x: x.send(json.dumps(x.good()), headers=("Content-Encoding: gzip",)),
    "too large": lambda x: x.send(json.dumps(x.good()) + " " * (MAX_REPLY_BYTES + 1)),
    "status 500": status("500 Internal Server Error"),
    "status 503": status("503 Service Unavailable", "Retry-After: 9999999"),
    "status 429": status("429 Too Many Requests"),
    "status 400": status("400 Bad Request"),
    "status 401": status("401 Unauthorized"),
    "status 404": status("404 Not Found"),
    "status 201": status("201 Created"),
    "status 204": raw(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "redirect to itself": status("307 Temporary Redirect", "Location: /elsewhere"),
}
SLOW_MUTATIONS: dict[str, Mutation] = {
    "silence": hang(),
    "silence after the headers": hang(_HEAD + b"\r\n"),
    "silence within the body": hang(_HEAD + b'\r\n{"object": '),
    "dripping headers": drip(_HEAD + b"X:"),
    "dripping body": drip(_HEAD + b"\r\n"),
    "endless continue": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "endless body": endless(_HEAD.replace(b"5000", b"9" * 12) + b"\r\n", b" " * 65536),
    "endless chunks": endless(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"1\r\n \r\n",
    ),
}
"""Only the deadline ends these."""
SILENCES = {name: m for name, m in SLOW_MUTATIONS.items() if name.startswith("silence")}
MUTATIONS = JSON_MUTATIONS | HTTP_MUTATIONS | SLOW_MUTATIONS


# --- the server and the client's record -----------------------------------------------------------


@dataclass
class EvilServer:
    """Answers request i in the way that `plan(i)` says, on a port of its own."""

    plan: Callable[[Json], Mutation]
    seen: list[tuple[str, Json, dict[str, str]]] = field(default_factory=list)
    """Path, body and headers of every request."""
    read: Callable[[bytes], Json] = json.loads
    """What makes a request's bytes its body."""

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Serve until the block ends; gives the base URL."""
        with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
            accepting = threading.Thread(target=self._accept, args=(listener,), daemon=True)
            accepting.start()
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            finally:
                # Woken and ended before the close: else it would go on with whatever listener
                # gets the same descriptor next.
                listener.shutdown(socket.SHUT_RDWR)
                accepting.join()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # the block ended
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(HANG_S)
            head, data = b"", b""
            while b"\r\n\r\n" not in head:
                if not (piece := connection.recv(65536)):
                    return
                head += piece
            head, data = head.split(b"\r\n\r\n", 1)
            first, *lines = head.decode().split("\r\n")
            headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
            while len(data) < int(headers.get("content-length", 0)):
                if not (piece := connection.recv(65536)):
                    return
                data += piece
            body = self.read(data) if data else {}
            self.seen.append((first.split()[1], body, headers))
            chance = random.Random(body.get("seed"))
            self.plan(body)(Exchange(connection, first.split()[1], body, chance))


@dataclass
class Record:
    """What became of bad replies, and of good ones in between."""

    asked: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    hanging: Counter[str] = field(default_factory=Counter)
    ugly: Counter[str] = field(default_factory=Counter)
    """Errors of more than one line, with the key, or not made for users."""
    num_good: int = 0
    num_good_refused: int = 0
    num_followed: int = 0
    """Redirects that the client followed."""
    slowest_s: float = 0.0


def attack(
    num_replies: int,
    seed: int = 0,
    num_threads: int = 24,
    mutations: dict[str, Mutation] = MUTATIONS,
    deadline_s: float = DEADLINE_S,
) -> Record:
    """Ask for completions of which each gets one bad reply (one in eight a good one)."""
    names = list(mutations)
    random.Random(seed).shuffle(names)
    order = [names[i % len(names)] for i in range(num_replies)]
    record, lock = Record(), threading.Lock()
    server = EvilServer(lambda body: good if "#" not in (n := name_of(body)) else MUTATIONS[n[1:]])
    with server.running() as url:
        client, patient = _client(url, deadline_s), _client(url, HANG_S)

        def ask(number: int, name: str) -> None:
            began = time.monotonic()
            problem = ""
            prompt = Prompt(f"{number}", ({"role": "user", "content": name},))
            try:
                # A loaded machine may be late with a good reply; that is no refusal.
                text = (client if name[0] == "#" else patient).complete([prompt], 64)[0].text
            except ModelError as error:
                text, problem = "", str(error)
            seconds = time.monotonic() - began
            with lock:
                _note(record, name, text, problem, seconds)

        jobs = [f"#{name}" for name in order] + ["good"] * (num_replies // 8 + 1)
        random.Random(seed + 1).shuffle(jobs)
        with ThreadPoolExecutor(num_threads) as pool:
            for future in [pool.submit(ask, i, name) for i, name in enumerate(jobs)]:
                future.result()
    record.num_followed = sum(path.endswith("elsewhere") for path, _, _ in server.seen)
    return record


def attack_without_deadline() -> Record:
    """The negative control: slow replies to a client that waits for the end of each."""
    return attack(len(SILENCES), mutations=SILENCES, deadline_s=HANG_S)


def name_of(body: Json) -> str:
    """The kind of reply that a request asks for: its own text."""
    return str(body["messages"][0]["content"])


def _client(url: str, deadline_s: float) -> Server:
    before = os.environ.get(KEY_VARIABLE)
    os.environ[KEY_VARIABLE] = KEY
    limits = Limits(deadline_s, num_tries=1, max_reply_bytes=MAX_REPLY_BYTES)
    try:
        return Server(url, SamplingConfig(), MODEL, limits=limits)
    finally:
        os.environ.pop(KEY_VARIABLE)
        if before is not None:
            os.environ[KEY_VARIABLE] = before


def _note(record: Record, name: str, text: str, problem: str, seconds: float) -> None:
    record.slowest_s = max(record.slowest_s, seconds)
    if name == "good":
        record.num_good += 1
        record.num_good_refused += text != TEXT
        return
    record.asked[name] += 1
    record.accepted[name] += not problem
    record.hanging[name] += seconds > DEADLINE_S + GRACE_S
    record.ugly[name] += "\n" in problem or KEY in problem or len(problem) > 500


def run(num_replies: int) -> Outcome:
    """Malformed replies, each asked for once or more: none may be taken, hang or end in noise."""
    record, endless = attack(num_replies), attack_without_deadline()
    failures = {
        "accepted": sum(record.accepted.values()),
        "hangs": sum(record.hanging.values()),
        "ugly_errors": sum(record.ugly.values()),
        "redirects_followed": record.num_followed,
    }
    return Outcome(
        "no malformed reply of a server is taken, and none hangs the client",
        trials=sum(record.asked.values()),
        failures=sum(failures.values()),
        control={
            "good replies taken": record.num_good - record.num_good_refused,
            "hangs of a client without a deadline": sum(endless.hanging.values()),
        },
        details=failures
        | {"good_refused": record.num_good_refused, "mutations": len(MUTATIONS)}
        | {"deadline_s": DEADLINE_S, "slowest_s": round(record.slowest_s, 3)},
    )
