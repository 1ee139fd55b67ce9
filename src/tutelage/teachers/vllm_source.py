"""Hidden states from the pooling endpoint of vLLM."""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tutelage.config.teachers import HiddenServerTeacher, LogprobServerTeacher
from tutelage.core import LazyLogits
from tutelage.data.batch import Batch
from tutelage.errors import ModelError
from tutelage.rollout.http_client import BadReply, Client, Limits, Strict, parse, run_all
from tutelage.teachers.logprob import LogprobTeacher
from tutelage.teachers.messages import PAYLOADS, Payload
from tutelage.teachers.sequences import TokenSequence, sequences_of

_NUM_PROVEN, _LEAST_PROVEN = 64, 16
"""Rows that are compared, at most and at least."""
_MAX_GAP = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.05}
"""Largest mean gap in nats to log-probabilities of the same model that rounding explains."""
_START = (
    """Start it with --runner pooling --convert embed --pooler-config '{"task": "token_embed", """
    """"tok_pooling_type": "ALL", "use_activation": false}' and the model of teacher.model"""
)


class _Model(Strict):
    id: str


class _Models(Strict):
    data: list[_Model] = Field(min_length=1)


class _Item(Strict):
    index: Literal[0]
    data: str


class _Usage(Strict):
    prompt_tokens: int


class _Pooled(Strict):
    id: str
    model: str
    data: list[_Item] = Field(min_length=1, max_length=1)
    usage: _Usage


class VLLMSource:
    """vLLM servers of one model in its pooling mode; a request is a sequence.

    Args:
        settings: addresses and limits.
        size: D.
    """

    weights = ""

    def __init__(self, settings: HiddenServerTeacher, size: int) -> None:
        limits = Limits(deadline_s=settings.timeout_s)
        count = settings.num_concurrent or 64
        self.clients = [Client(url, limits, count, "teacher.url") for url in settings.urls]
        self.settings = settings
        self.size = size
        self._name = settings.served_name or settings.model

    def connect(self) -> list[str]:
        """Compare the names of the servers' models with the configured one.

        Raises:
            ModelError: one does not answer, or serves others.
        """
        lines = []
        for client in self.clients:
            found = client.ask("/v1/models", None, partial(parse, schema=_Models))
            names = [model.id for model in found.data]
            if self._name not in names:
                raise ModelError(
                    f"the server {client.url} serves {', '.join(names)[:200]!r}, not "
                    f"{self._name!r}. Start it with that model, or set teacher.served_name to the "
                    "name it has there."
                )
            lines.append(f"teacher: {self._name} on {client.url}, by its name there")
        if self.settings.logprob_url:
            self._other(self.size).connect()
        return lines

    def hidden(self, batch: Batch, payload: Payload) -> Tensor:
        """Hidden states of a batch's rows `[N, D]`; see `HiddenSource`."""
        tasks = []
        for number, sequence in enumerate(sequences_of(batch)):
            client = self.clients[number % len(self.clients)]
            tasks.append((client, partial(self._sequence, client, sequence, payload)))
        return torch.cat(run_all(tasks))

    async def _sequence(self, client: Client, sequence: TokenSequence, payload: Payload) -> Tensor:
        """The rows of one sequence."""
        nonce = secrets.token_hex(16)
        body = {
            "model": self._name,
            "input": list(sequence.ids),
            "task": "token_embed",
            "use_activation": False,
            "encoding_format": "base64",
            "embed_dtype": payload,
            "endianness": "little",
            "request_id": nonce,
        }
        num_bytes = len(sequence.ids) * self.size * PAYLOADS[payload].itemsize
        accept = partial(self._accepted, client.url, nonce, sequence, payload)
        patient = client.within(max_reply_bytes=2 * num_bytes + (1 << 16))
        return await patient.send("/pooling", body, accept)

    def _accepted(
        self, url: str, nonce: str, sequence: TokenSequence, payload: Payload, content: bytes
    ) -> Tensor:
        """Rows of a reply; one that is wrong is not asked for again."""
        try:
            return self._rows(parse(content, _Pooled), nonce, sequence, payload)
        except BadReply as error:
            raise ModelError(
                f"the teacher's server {url} gave {error}. Nothing of this batch was kept; check "
                "the server and run the command again to continue."
            ) from None

    def _rows(
        self, reply: _Pooled, nonce: str, sequence: TokenSequence, payload: Payload
    ) -> Tensor:
        if reply.id != f"pooling-{nonce}":
            raise BadReply("a reply to another request")
        if reply.model != self._name:
            raise BadReply(f"a reply of another model, {reply.model[:100]!r}")
        num_ids = len(sequence.ids)
        if reply.usage.prompt_tokens != num_ids:
            raise BadReply(f"a reply to {reply.usage.prompt_tokens} token ids instead of {num_ids}")
        try:
            content = bytearray(base64.b64decode(reply.data[0].data, validate=True))
        except (binascii.Error, ValueError):
            raise BadReply("hidden states that are not base64") from None
        dtype = PAYLOADS[payload]
        expected = num_ids * self.size * dtype.itemsize
        if len(content) != expected:
            raise BadReply(f"{len(content)} bytes of hidden states instead of {expected}")
        hidden = torch.frombuffer(content, dtype=dtype).view(num_ids, self.size)
        if not bool(hidden.isfinite().all()):
            raise BadReply("hidden states that are not finite")
        # the position before a token is the one whose hidden state predicts it
        return hidden[torch.tensor(sequence.places, dtype=torch.int64) - 1]

    def prove(self, batch: Batch, logits: LazyLogits) -> None:
        """Compare with log-probabilities of the same model, or with those of other tokens.

        vLLM gives no checksum of what it serves. A server of the same model that gives
        log-probabilities (`teacher.logprob_url`) proves hidden states up to rounding. Without one,
        tokens have to be likelier than others in their place.

        Raises:
            ModelError: the hidden states are not the model's final ones.
        """
        if self.settings.logprob_url:
            self._compare(batch, logits)
            return
        count = min(_NUM_PROVEN, batch.num_rows)
        if count < _LEAST_PROVEN:
            return
        rows = torch.linspace(0, batch.num_rows - 1, count).long()
        tokens = batch.tokens.cpu()[rows]
        own, other = _log_q(logits, rows, tokens), _log_q(logits, rows, tokens.roll(1))
        if not float(own.mean()) > float(other.mean()):
            raise ModelError(
                f"the hidden states of {self.settings.urls[0]} are not final ones of "
                f"{self.settings.model!r}: log-probabilities of tokens are "
                f"{float(own.mean()):.3g} nats on average, and of others in their place "
                f"{float(other.mean()):.3g}. {_START}."
            )

    def _other(self, vocab_size: int) -> LogprobTeacher:
        """The server of the same model that gives log-probabilities."""
        settings = self.settings
        table = LogprobServerTeacher(
            "logprob_server",
            settings.model,
            settings.logprob_url,
            settings.served_name,
            num_logprobs=1,
            timeout_s=settings.timeout_s,
        )
        return LogprobTeacher(table, vocab_size, torch.device("cpu"), key="teacher.logprob_url")

    def _compare(self, batch: Batch, logits: LazyLogits) -> None:
        kind, settings = "logprob_server", self.settings
        other = self._other(logits.vocab_size)
        with other.on_device():
            theirs = other.forward(batch).token_log_q.double()
        rows = torch.arange(batch.num_rows)
        gap = float((_log_q(logits, rows, batch.tokens.cpu()) - theirs).abs().mean())
        if not gap <= _MAX_GAP[settings.dtype]:
            raise ModelError(
                f"the hidden states of {settings.urls[0]} give other log-probabilities than the "
                f"{kind} {settings.logprob_url}: {gap:.2g} nats on average, more than "
                f"{_MAX_GAP[settings.dtype]:g}. {_START}."
            )


def _log_q(logits: LazyLogits, rows: Tensor, tokens: Sequence[int] | Tensor) -> Tensor:
    """Log-probabilities of tokens in some rows, float64, a few rows at a time."""
    found = []
    for start in range(0, len(rows), _NUM_PROVEN):
        some = rows[start : start + _NUM_PROVEN]
        block = logits[some.to(logits.hidden.device)].block(0, len(some)).double()
        ids = torch.as_tensor(tokens[start : start + _NUM_PROVEN]).to(block.device)
        found.append(block.log_softmax(-1).gather(1, ids[:, None]).squeeze(1).cpu())
    return torch.cat(found)
