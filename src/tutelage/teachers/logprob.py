"""A teacher on a server that tells the log-probabilities of the likeliest ids of each token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from tutelage.config.models import TeacherMode
from tutelage.config.teachers import LogprobServerTeacher
from tutelage.core import PartialLogits, TeacherLogits
from tutelage.data.batch import Batch
from tutelage.errors import ModelError
from tutelage.models.tokenizers import encode_completion
from tutelage.rollout.http_client import (
    BadReply,
    Client,
    Limits,
    NoReply,
    RefusedRequest,
    Strict,
    parse,
    run_all,
)
from tutelage.teachers.logprob_api import ROUNDING, Known, LogprobApi, apis_of
from tutelage.teachers.sequences import sequences_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MAX_REPLY_BYTES = 1 << 28
"""Of one sequence: some 100 bytes for each id of each token."""
_PROBE = "The sum of 2 and 3 is 5."
"""A text whose log-probabilities every server is asked for at the start."""


class _Model(Strict):
    id: str
    max_model_len: int | None = None


class _Models(Strict):
    data: list[_Model] = Field(min_length=1)


class LogprobTeacher:
    """Asks servers for the log-probabilities of every sequence of a batch.

    Nothing of the model is here. A batch is refused as a whole where one reply is not what was
    asked for: another model's, of other ids, or no log-probabilities of a distribution.

    Args:
        config: addresses, number of ids and times.
        vocab_size: ids that student and teacher share.
        device: where the objective is computed.
        swap: the student's stop token and the teacher's, which trade places.
        model: the shape of its head, without numbers, for memory plans.
        tokenizer: the model's, with which servers are tried at the start; None tries none.
        key: of the configuration, which names the addresses.
    """

    def __init__(
        self,
        config: LogprobServerTeacher,
        vocab_size: int,
        device: torch.device,
        swap: tuple[int, int] | None = None,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        key: str = "teacher.url",
    ) -> None:
        self.config = config
        self._tokenizer = tokenizer
        self._model = model
        self.vocab_size = vocab_size
        self.device = device
        self.swap = swap
        limits = Limits(deadline_s=config.timeout_s, max_reply_bytes=_MAX_REPLY_BYTES)
        self._clients = [Client(url, limits, config.num_concurrent, key) for url in config.urls]
        self._names: list[str] = []
        self._ways = apis_of(config.api, tokenizer)
        self._apis: list[LogprobApi] = [self._ways[0] for _ in self._clients]

    mode: TeacherMode = "resident"
    head_shape: tuple[int, ...] = (0, 0)
    itemsize = 0
    head_bytes = 0
    full_bytes = 0
    resting_bytes = 0
    is_sharded = False

    @property
    def model(self) -> PreTrainedModel:
        """The shape of its head."""
        if self._model is None:
            raise RuntimeError("the teacher's model is on a server.")
        return self._model

    @property
    def notices(self) -> tuple[str, ...]:
        """What a user has to know at the start of a run."""
        places = ", ".join(self.config.urls)
        return (
            f"prompts and completions leave this machine: their token ids are sent to {places}",
            f"the teacher gives {self.config.num_logprobs} ids of each token: divergences that are "
            "logged are lower bounds, teacher_tail_mass is what they leave out",
        )

    def connect(self) -> None:
        """Ask the servers for their model, and for log-probabilities of a short text.

        Raises:
            ModelError: one does not answer, serves others, or gives no such log-probabilities.
        """
        self._names = [self._served(client) for client in self._clients]
        if self._tokenizer is not None:
            ids = encode_completion(self._tokenizer, _PROBE)
            self._apis = [self._tried(number, ids) for number in range(len(self._clients))]

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Nothing moves; the servers are known before the first batch."""
        if not self._names:
            self.connect()
        yield

    def _served(self, client: Client) -> str:
        """The name by which a server knows the configured model.

        Raises:
            ModelError: it serves others.
        """
        found = client.ask("/v1/models", None, partial(parse, schema=_Models)).data
        wanted = self.config.served_name or self.config.model
        names = [model.id for model in found]
        if wanted not in names:
            raise ModelError(
                f"the server {client.url} serves {', '.join(names)[:200]!r}, not {wanted!r}. Start "
                "it with that model, or set teacher.served_name to the name it has there."
            )
        return wanted

    def _tried(self, number: int, ids: Sequence[int]) -> LogprobApi:
        """The way to ask a server that it does not refuse, and answers as it should."""
        client = self._clients[number].within(num_tries=2)
        places, reason = range(1, len(ids)), ""
        for api in self._ways:
            body = api.body(self._names[number], ids, self.config.num_logprobs)
            accept = partial(self._accepted, api, self._names[number], ids, places)
            try:
                client.ask(api.path, body, accept)
            except RefusedRequest as error:
                reason = f"it refuses the request: status {error.status}: {error.reason[:200]}"
            except NoReply as error:
                reason = error.reason
                break
            else:
                return api
        raise ModelError(
            f"the server {client.url} gives no log-probabilities of a prompt by teacher.api = "
            f"{self.config.api!r} and teacher.num_logprobs = {self.config.num_logprobs}: "
            f"{reason.rstrip('.')}. Lower teacher.num_logprobs to what it gives, or choose its API."
        )

    @torch.no_grad()
    def forward(self, batch: Batch) -> PartialLogits:
        """What the servers know of the batch's N rows.

        Raises:
            ModelError: a server did not give what it was asked for; there is nothing of the batch.
        """
        sequences = sequences_of(batch)
        tasks: list[tuple[Client, Callable[[], Any]]] = []
        for place, sequence in enumerate(sequences):
            number = place % len(self._clients)
            send = partial(self._send, number, sequence.ids, sequence.places)
            tasks.append((self._clients[number], send))
        found = run_all(tasks)
        k = self.config.num_logprobs
        ids = torch.tensor([row[0] for rows in found for row in rows]).view(-1, k)
        numbers = torch.tensor([row[1] for rows in found for row in rows]).view(-1, k)
        token_log_q = torch.tensor([row[2] for rows in found for row in rows])
        tokens = batch.tokens.cpu()
        return PartialLogits(ids, numbers, tokens, token_log_q, self.vocab_size)

    def to_device(self, logits: TeacherLogits) -> TeacherLogits:
        """What `forward` returned, on the device for the objective."""
        return logits.to(self.device)

    def checks(self) -> Mapping[str, float | None]:
        """Nothing: its rows say themselves what is not known of them."""
        return {}

    async def _send(
        self, number: int, ids: Sequence[int], places: Sequence[int]
    ) -> list[tuple[list[int], list[float], float]]:
        """The rows of one sequence: the k likeliest ids, their numbers, and the token's."""
        api, name = self._apis[number], self._names[number]
        ids = self._as_read(ids, places)
        body = api.body(name, ids, self.config.num_logprobs)
        accept = partial(self._accepted, api, name, ids, places)
        return await self._clients[number].send(api.path, body, accept)

    def _as_read(self, ids: Sequence[int], places: Sequence[int]) -> list[int]:
        """What the teacher reads: its own stop token at the end, where it is scored."""
        found = list(ids)
        if self.swap is None:
            return found
        known = dict([self.swap, self.swap[::-1]])
        for place in places:
            if found[place] in known and place != len(found) - 1:
                raise ModelError(
                    f"the stop token {found[place]} is within a completion, where a server cannot "
                    "exchange it for the teacher's. Use a local teacher, or stop_token = 'refuse'."
                )
        if places and places[-1] == len(found) - 1:
            found[-1] = known.get(found[-1], found[-1])
        return found

    def _accepted(
        self,
        api: LogprobApi,
        name: str,
        ids: Sequence[int],
        places: Sequence[int],
        content: bytes,
    ) -> list[tuple[list[int], list[float], float]]:
        found = api.read(content, name, ids, places)
        return [self._row(known, ids[place]) for known, place in zip(found, places, strict=True)]

    def _row(self, known: Known, token: int) -> tuple[list[int], list[float], float]:
        k, numbers, token_log_q = self.config.num_logprobs, dict(known.top), known.log_q
        if (largest := max(numbers)) >= self.vocab_size:
            raise BadReply(
                f"an id of {largest} where both models have ids below {self.vocab_size}: a row of "
                "the teacher's head without a token is among its likeliest ids, or its vocabulary "
                "is another. Lower teacher.num_logprobs, or use a local teacher"
            )
        if not k <= len(numbers) <= k + (token in numbers):
            raise BadReply(f"{len(numbers)} log-probabilities instead of {k} and the token's")
        if abs(numbers.setdefault(token, token_log_q) - token_log_q) > ROUNDING:
            raise BadReply("a token with two log-probabilities")
        mass = float(torch.tensor(list(numbers.values()), dtype=torch.float64).exp().sum())
        if mass > 1 + ROUNDING:
            raise BadReply(f"probabilities with a sum of {mass:.4g}")
        if len(numbers) == k + 1:  # the token is none of the k likeliest
            least = min(value for one, value in numbers.items() if one != token)
            if token_log_q > least:
                raise BadReply("a token that is likelier than those that are likeliest")
            del numbers[token]
        order = sorted(numbers, key=lambda one: -numbers[one])
        other = dict([self.swap, self.swap[::-1]]) if self.swap else {}
        return [other.get(one, one) for one in order], [numbers[one] for one in order], token_log_q
