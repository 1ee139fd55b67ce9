"""A teacher's server that answers in every wrong way, and how many of its answers are taken.

python -m reliability hidden_server      # the long version; writes benchmarks/results
"""

from __future__ import annotations

import functools
import json
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from tiny import save_tiny_model
from tutelage.data.batch import Batch, collate
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import TutelageError
from tutelage.models.head import hidden_rows
from tutelage.models.load import load_model
from tutelage.rollout.http_client import Limits
from tutelage.teachers.messages import checksum_of, packed_reply, read_request
from tutelage.teachers.server import ServedModel
from tutelage.teachers.tutelage_source import TutelageSource

from .record import Outcome
from .server import EvilServer, Exchange, endless, hang, raw, reset

DEADLINE_S = 0.6
GRACE_S = 120.0
"""What a loaded machine may add to the deadline before a request counts as hanging."""
NUM_THREADS = 4


@dataclass
class Good:
    """A request, and the reply of an honest server."""

    sent: bytes
    earlier: bytes
    """The honest reply to the request before."""
    served: ServedModel
    chance: random.Random

    @functools.cached_property
    def content(self) -> bytes:
        """The reply."""
        return self.served.reply(self.sent)

    def changed(
        self,
        tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda found: found,
        **header: str | None,
    ) -> bytes:
        """The reply with other tensors, whose checksum is right, or with another header."""
        length = int.from_bytes(self.content[:8], "little")
        meta = json.loads(self.content[8 : 8 + length])["__metadata__"]
        found = tensors(load(self.content))
        if "hidden" in found:
            meta["hidden"] = checksum_of(found["hidden"])
        meta |= header
        return save(
            {name: tensor.contiguous() for name, tensor in found.items()},
            {name: value for name, value in meta.items() if value is not None},
        )

    def hidden(self, change: Callable[[Tensor], Tensor]) -> bytes:
        """The reply with other hidden states, whose checksum is right."""
        return self.changed(lambda found: found | {"hidden": change(found["hidden"])})

    def other_read(self, change: Callable[[Batch], Batch]) -> bytes:
        """What a server gives that read another batch and says that it read this one."""
        request = read_request(self.sent)
        batch = change(request.batch)
        with torch.no_grad():
            hidden = hidden_rows(self.served.model, batch)
        known = self.served.identity.head, self.served.weights
        return packed_reply(replace(request, batch=batch), hidden, *known)


def _flipped(good: Good) -> bytes:
    content = bytearray(good.content)
    content[-1 - good.chance.randrange(64)] ^= 1 << good.chance.randrange(8)
    return bytes(content)


def _swapped_sequences(batch: Batch) -> Batch:
    ids = batch.input_ids.flip(0)
    return replace(batch, input_ids=ids, attention_mask=batch.attention_mask.flip(0))


def _other_ids(batch: Batch) -> Batch:
    ids = batch.input_ids.clone()
    ids[0, 0] = (ids[0, 0] + 1) % 20
    return replace(batch, input_ids=ids)


def _set(number: float) -> Callable[[Tensor], Tensor]:
    def change(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[-1, 0] = number
        return hidden

    return change


CONTENTS: dict[str, Callable[[Good], bytes]] = {
    "empty": lambda g: b"",
    "text": lambda g: b"<html>busy</html>",
    "JSON": lambda g: b'{"hidden": [[0.0]]}',
    "cut off": lambda g: g.content[: g.chance.randrange(len(g.content))],
    "bytes behind": lambda g: g.content + b"\0" * 8,
    "a bit flipped": _flipped,
    "a huge header": lambda g: (1 << 60).to_bytes(8, "little") + g.content[8:],
    "no header": lambda g: save(load(g.content)),
    "the request itself": lambda g: g.sent,
    "the reply before": lambda g: g.earlier or g.sent,
    "hidden states of the reply before": lambda g: g.changed(
        lambda found: load(g.earlier or g.sent)
    ),
    "another version": lambda g: g.changed(version="0"),
    "no version": lambda g: g.changed(version=None),
    "another nonce": lambda g: g.changed(nonce="0" * 32),
    "no nonce": lambda g: g.changed(nonce=None),
    "another model": lambda g: g.changed(head="0" * 64),
    "no model": lambda g: g.changed(head=None),
    "other weights": lambda g: g.changed(weights="0" * 64),
    "no weights": lambda g: g.changed(weights=None),
    "another payload": lambda g: g.changed(payload="bfloat16"),
    "another request": lambda g: g.changed(request="0" * 64),
    "no request": lambda g: g.changed(request=None),
    "a wrong checksum": lambda g: g.changed(hidden="0" * 64),
    "a row too few": lambda g: g.hidden(lambda hidden: hidden[:-1]),
    "a row too many": lambda g: g.hidden(lambda hidden: torch.cat([hidden, hidden[:1]])),
    "no rows": lambda g: g.hidden(lambda hidden: hidden[:0]),
    "a column too few": lambda g: g.hidden(lambda hidden: hidden[:, :-1]),
    "transposed": lambda g: g.hidden(lambda hidden: hidden.t()),
    "flat": lambda g: g.hidden(lambda hidden: hidden.flatten()),
    "float64": lambda g: g.hidden(lambda hidden: hidden.double()),
    "bfloat16": lambda g: g.hidden(lambda hidden: hidden.bfloat16()),
    "integers": lambda g: g.hidden(lambda hidden: hidden.to(torch.int32)),
    "NaN": lambda g: g.hidden(_set(float("nan"))),
    "infinity": lambda g: g.hidden(_set(float("inf"))),
    "no hidden states": lambda g: g.changed(lambda found: {"sequences": found["sequences"]}),
    "no sequences": lambda g: g.changed(lambda found: {"hidden": found["hidden"]}),
    "a tensor more": lambda g: g.changed(lambda found: found | {"more": found["hidden"].clone()}),
    "sequences in another order": lambda g: g.changed(
        lambda found: found | {"sequences": found["sequences"].flip(0)}
    ),
    "a sequence too few": lambda g: g.changed(
        lambda found: found | {"sequences": found["sequences"][:-1]}
    ),
    "read in another order": lambda g: g.other_read(_swapped_sequences),
    "read other ids": lambda g: g.other_read(_other_ids),
}
"""Contents of a reply with status 200, by what is wrong with them."""

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: 5000\r\n"
EXCHANGES: dict[str, Callable[[Exchange, Good], None]] = {
    "status 500": lambda x, g: x.send(g.content, "500 Internal Server Error"),
    "status 503": lambda x, g: x.send(g.content, "503 Service Unavailable"),
    "status 400": lambda x, g: x.send(g.content, "400 Bad Request"),
    "status 401": lambda x, g: x.send(g.content, "401 Unauthorized"),
    "status 404": lambda x, g: x.send(g.content, "404 Not Found"),
    "status 201": lambda x, g: x.send(g.content, "201 Created"),
    "status 204": lambda x, g: raw(b"HTTP/1.1 204 No Content\r\n\r\n")(x),
    "a redirect": lambda x, g: x.send(
        g.content, "307 Temporary Redirect", headers=("Location: /elsewhere",)
    ),
    "closed at once": lambda x, g: raw(b"")(x),
    "a reset": lambda x, g: reset(x),
    "not HTTP": lambda x, g: raw(b"SSH-2.0-OpenSSH_9.6\r\n")(x),
    "shorter than stated": lambda x, g: x.send(g.content, length=len(g.content) + 9),
    "longer than stated": lambda x, g: x.send(g.content, length=40),
    "a negative length": lambda x, g: x.send(g.content, length=-5),
    "said to be gzip": lambda x, g: x.send(g.content, headers=("Content-Encoding: gzip",)),
    "too large": lambda x, g: x.send(g.content + b"\0" * 200_000),
    "silence": lambda x, g: hang()(x),
    "silence within the body": lambda x, g: hang(_HEAD + b"\r\n" + g.content[:99])(x),
    "a dripping body": lambda x, g: endless(_HEAD + b"\r\n", b" ", 0.2)(x),
    "an endless body": lambda x, g: endless(
        _HEAD.replace(b"5000", b"9" * 12) + b"\r\n", b" " * 65536
    )(x),
}
"""Exchanges of which HTTP itself is wrong."""
KINDS = (*CONTENTS, *EXCHANGES)


@dataclass
class Record:
    """What became of replies."""

    asked: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    hanging: Counter[str] = field(default_factory=Counter)
    ugly: Counter[str] = field(default_factory=Counter)
    """Errors of more than one line, or not made for users."""
    num_good: int = 0
    num_good_taken: int = 0
    slowest_s: float = 0.0


def attack(num_replies: int, models: Path, kinds: tuple[str, ...] = KINDS) -> Record:
    """Ask for hidden states, each time with one bad reply, and in between with good ones.

    Args:
        num_replies: bad ones.
        models: an empty folder.
        kinds: of which each comes as often as any other.
    """
    model = load_model(str(save_tiny_model(models / "teacher", 1)))
    served, record, lock = ServedModel(model, "a teacher"), Record(), threading.Lock()
    order = [kinds[i % len(kinds)] for i in range(num_replies)]
    order += ["good"] * (num_replies // 4 + NUM_THREADS)
    random.Random(0).shuffle(order)

    def work(number: int) -> None:
        for name, taken, problem, seconds in _asked(served, order[number::NUM_THREADS], number):
            with lock:
                record.slowest_s = max(record.slowest_s, seconds)
                if name == "good":
                    record.num_good += 1
                    record.num_good_taken += taken
                    continue
                record.asked[name] += 1
                record.accepted[name] += taken
                record.hanging[name] += seconds > DEADLINE_S + GRACE_S
                record.ugly[name] += "\n" in problem or len(problem) > 600 or not problem

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(work, range(NUM_THREADS)))
    return record


def _asked(served: ServedModel, names: list[str], seed: int) -> list[tuple[str, bool, str, float]]:
    """One request after the other to a server of their own; name, whether taken, error, seconds."""
    chance, found = random.Random(seed), []
    now = {"name": "good", "earlier": b""}

    def plan(body: dict[str, Any]) -> Callable[[Exchange], None]:
        name, good = str(now["name"]), Good(body["raw"], now["earlier"], served, chance)

        def answer(exchange: Exchange) -> None:
            if name in EXCHANGES:
                EXCHANGES[name](exchange, good)
            else:
                exchange.send(CONTENTS[name](good) if name in CONTENTS else good.content)
            now["earlier"] = good.content

        return answer

    server = EvilServer(plan, read=lambda data: {"raw": data})
    with server.running() as url:
        source = TutelageSource([url.removesuffix("/v1")], served.identity, 1, DEADLINE_S)
        source.trust(served.weights)
        for name in names:
            now["name"] = name
            patience = Limits(deadline_s=DEADLINE_S if name != "good" else GRACE_S)
            source.clients[0].limits = patience
            batch, began, problem, taken = _batch(chance), time.monotonic(), "", False
            try:
                taken = bool(source.hidden(batch, "float32").numel())
            except TutelageError as error:
                problem = str(error)
            found.append((name, taken, problem, time.monotonic() - began))
    return found


def _batch(chance: random.Random) -> Batch:
    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(chance.randrange(1, 20) for _ in range(chance.randrange(low, high)))

    prompt = Prompt("a", "")
    first = Rollout(prompt, 0, (*ids(1, 5), 19), ids(2, 6))  # so that no two sequences are equal
    rest = [Rollout(prompt, 0, (*ids(1, 5), 18), ids(1, 6)) for _ in range(chance.randrange(1, 4))]
    return collate([first, *rest], 0)


def run(num_replies: int) -> Outcome:
    """Malformed replies of a teacher's server: none may be taken, hang or end in noise."""
    with tempfile.TemporaryDirectory() as folder:
        record = attack(num_replies, Path(folder))
    failures = {
        "accepted": sum(record.accepted.values()),
        "hangs": sum(record.hanging.values()),
        "ugly_errors": sum(record.ugly.values()),
        "good_refused": record.num_good - record.num_good_taken,
    }
    return Outcome(
        "no malformed reply of a teacher's server is taken, and none hangs the run",
        trials=sum(record.asked.values()),
        failures=sum(failures.values()),
        control={"good replies taken": record.num_good_taken},
        details=failures
        | {"kinds": len(KINDS), "deadline_s": DEADLINE_S}
        | {"slowest_s": round(record.slowest_s, 3)},
    )
