"""Hidden states from `tutelage serve-teacher`."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from tutelage.core import LazyLogits
from tutelage.data.batch import Batch
from tutelage.errors import ModelError
from tutelage.rollout.http_client import Client, Limits, Strict, parse, run_all
from tutelage.teachers.hidden import cut
from tutelage.teachers.identity import Identity
from tutelage.teachers.messages import (
    VERSION,
    MalformedError,
    Payload,
    packed_request,
    read_reply,
    reply_bytes,
)
from tutelage.teachers.server import HIDDEN, IDENTITY

_SHOWN = {
    "dtype": "teacher.dtype",
    "vocab_size": "rows of its head",
    "hidden_size": "columns of its head",
    "model_type": "model type",
    "head": "SHA-256 of its head",
}
"""What is compared, and what a message calls it; the most telling first."""


class _Identity(Strict):
    head: str
    vocab_size: int
    hidden_size: int
    dtype: str
    model_type: str


class _Described(Strict):
    version: str
    model: str
    weights: str
    identity: _Identity


class TutelageSource:
    """Servers of one model started with `tutelage serve-teacher`.

    A micro-batch is cut into as many parts as servers compute at the same time. One part is the
    forward pass that a teacher in this process would do, to the bit.

    Args:
        urls: their addresses.
        identity: of the head that is here.
        num_concurrent: parts of a micro-batch that one server has at the same time.
        timeout_s: seconds for a request, all tries together.
    """

    def __init__(
        self, urls: Sequence[str], identity: Identity, num_concurrent: int, timeout_s: float
    ) -> None:
        limits = Limits(deadline_s=timeout_s, max_reply_bytes=1 << 16)
        self.clients = [Client(url, limits, num_concurrent, "teacher.url") for url in urls]
        self.identity = identity
        self._num_parts = num_concurrent * len(self.clients)
        self.weights = ""

    def connect(self) -> list[str]:
        """Compare the servers' models with the head that is here, and with one another.

        Raises:
            ModelError: one does not answer, or has another model.
        """
        lines, found = [], {}
        for client in self.clients:
            described = client.ask(IDENTITY, None, partial(_described, client.url))
            self._refuse_other(client.url, described)
            found[described.weights] = client.url
            lines.append(
                f"teacher: {described.model} on {client.url}, weights {described.weights[:16]}"
            )
        if len(found) > 1:
            first, second = list(found.values())[:2]
            raise ModelError(
                f"the servers {first} and {second} of teacher.url have different weights. Serve "
                "the same model on all of them."
            )
        self.trust(*found)
        return lines

    def trust(self, weights: str) -> None:
        """Take replies of the weights with this checksum, and of no others."""
        self.weights = weights

    def _refuse_other(self, url: str, described: _Described) -> None:
        theirs = Identity(**described.identity.model_dump())
        for name, shown in _SHOWN.items():
            here, there = asdict(self.identity)[name], asdict(theirs)[name]
            if here != there:
                raise ModelError(
                    f"the server {url} has another model than teacher.model: {shown} is {there} "
                    f"there and {here} here. Serve the model that teacher.model names, in "
                    "teacher.dtype."
                )

    def hidden(self, batch: Batch, payload: Payload) -> Tensor:
        """Hidden states of a batch's rows `[N, D]`; see `HiddenSource`."""
        parts = cut(batch, self._num_parts)
        tasks = []
        for number, part in enumerate(parts):
            client = self.clients[number % len(self.clients)]
            tasks.append((client, partial(self._part, client, part, payload)))
        return torch.cat(run_all(tasks))

    async def _part(self, client: Client, batch: Batch, payload: Payload) -> Tensor:
        nonce = secrets.token_hex(16)
        sent = packed_request(batch, nonce, payload, self.identity.head)
        expected = {"nonce": nonce, "head": self.identity.head, "weights": self.weights}
        size = self.identity.hidden_size
        accept = partial(
            _hidden, client.url, sent=sent, batch=batch, payload=payload, expected=expected,
            size=size,
        )  # fmt: skip
        most = reply_bytes(batch.num_rows, size, batch.num_sequences, payload)
        return await client.within(max_reply_bytes=most).send(HIDDEN, sent, accept)

    def prove(self, batch: Batch, logits: LazyLogits) -> None:
        """Nothing: every reply carries the checksums of what was read and of the weights."""


def _described(url: str, content: bytes) -> _Described:
    described = parse(content, _Described)
    if described.version != VERSION:
        raise ModelError(
            f"the server {url} has version {described.version[:20]!r} of the messages, this is "
            f"{VERSION!r}. Use the same version of tutelage on both sides."
        )
    return described


def _hidden(url: str, content: bytes, **expected: object) -> Tensor:
    """Hidden states of a reply; one that is wrong is not asked for again."""
    try:
        return read_reply(content, **expected)  # type: ignore[arg-type]
    except MalformedError as error:
        raise ModelError(
            f"the teacher's server {url} gave {error}. Nothing of this batch was kept; check the "
            "server and run the command again to continue."
        ) from None
