"""Completions from vLLM servers over HTTP, by the weights that were handed over to them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tutelage.data.types import Rollout
from tutelage.errors import ModelError
from tutelage.models.tokenizers import stop_ids, vocabulary_size
from tutelage.rollout.conversation import Conversations, completion_of, conversations_of
from tutelage.rollout.http_client import BadReply, NoReply, Strict, in_thread, parse, run_all
from tutelage.rollout.replicas import LostReplicaError, Replicas
from tutelage.rollout.request import (
    CompletionRequest,
    OpenRollout,
    RolloutRequest,
    completion_requests,
    to_rollout,
)
from tutelage.rollout.vllm_engine import refuse_long_conversations, sampling_options, seed_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class _Logprobs(Strict):
    token_logprobs: list[float]


class _Choice(Strict):
    index: Literal[0]
    token_ids: list[int] = Field(min_length=1)
    prompt_token_ids: list[int]
    logprobs: _Logprobs
    finish_reason: Literal["stop", "length"]


class _Completion(Strict):
    object: Literal["text_completion"]
    choices: list[_Choice] = Field(min_length=1, max_length=1)


class VLLMServerSampler:
    """Completions from vLLM servers of one model, by the weights that they hold.

    They have to be started with the student's architecture, in development mode, and to report
    log-probabilities as the model gives them::

        VLLM_SERVER_DEV_MODE=1 vllm serve STUDENT --logprobs-mode raw_logprobs

    Development mode lets whoever reaches the port command the server: keep it on a trusted network.

    Args:
        model: the student.
        tokenizer: its tokenizer.
        replicas: the servers; each gets neighbours among the requests, and as many as any other.
        enable_thinking: passed to the chat template when not None.
    """

    has_own_weights = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        replicas: Replicas,
        enable_thinking: bool | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.replicas = replicas
        self.enable_thinking = enable_thinking
        self._stops = stop_ids(model, tokenizer)
        self._num_ids = vocabulary_size(tokenizer)
        self._futures: Sequence[Future[Rollout]] = ()
        self._is_canceled = False

    def sample(self, request: RolloutRequest) -> list[Rollout]:
        """Completions of the prompts, from the weights that were handed over last.

        Raises:
            LostReplicaError: a replica gave no usable reply; there is no completion.
            ModelError: a completion could not be had.
        """
        thinks = self.enable_thinking
        conversations = conversations_of(request, self.tokenizer, self._stops, thinks)
        requests = completion_requests(self.tokenizer, request, thinks, conversations)
        most = self.replicas.max_model_len
        if conversations is not None and most is not None:
            refuse_long_conversations(requests, conversations, most)
        options = sampling_options(self.model, self.tokenizer, request.sampling)
        tasks = []
        for one, number in zip(requests, self._shared_out(len(requests)), strict=True):
            task = partial(self._rollout, number, one, options, conversations)
            tasks.append((self.replicas.clients[number], task))
        return run_all(tasks, request.progress, self._begun)

    def cancel(self) -> None:
        """End the draw that another thread waits for; there is none after it."""
        self._is_canceled = True
        for future in self._futures:
            future.cancel()

    def close(self) -> None:
        """Requests that are open end with their draw; the servers stay."""

    def _shared_out(self, count: int) -> list[int]:
        """The replica of each request; processes with few begin with different ones."""
        live, first = self.replicas.live, self.replicas.group.index
        return [live[(first + place * len(live) // count) % len(live)] for place in range(count)]

    def _begun(self, futures: Sequence[Future[Rollout]]) -> None:
        self._futures = futures
        if self._is_canceled:
            raise CancelledError

    async def _rollout(
        self,
        number: int,
        request: CompletionRequest,
        options: dict[str, Any],
        conversations: Conversations | None,
    ) -> Rollout:
        """A completion, or a conversation, by one replica."""
        try:
            if conversations is None:
                rollout = await self._one(number, request, options)
            else:
                rollout = await self._converse(number, request, options, conversations)
        except NoReply as error:
            raise LostReplicaError(number, error.reason) from None
        return replace(rollout, replica=number)

    async def _one(
        self, number: int, request: CompletionRequest, options: dict[str, Any]
    ) -> Rollout:
        row = OpenRollout(request)
        await self._turn(number, row, options)
        return to_rollout(self.tokenizer, request, row.tokens, row.logprobs, self._stops)

    async def _converse(
        self,
        number: int,
        request: CompletionRequest,
        options: dict[str, Any],
        conversations: Conversations,
    ) -> Rollout:
        """One conversation; others go on while it waits for its environment."""
        row = OpenRollout(request)
        while True:
            await self._turn(number, row, options | {"max_tokens": conversations.num_left(row)})
            (answer,) = await in_thread(conversations.answer, [row])
            if answer is None:
                return await in_thread(conversations.rollout, row)
            row.insert(answer)

    async def _turn(self, number: int, row: OpenRollout, options: dict[str, Any]) -> None:
        """Append a completion of all ids of a row."""
        ids = [*row.request.ids, *completion_of(row)[0]]
        body = {
            **options,
            "model": self.replicas.names[number],
            "prompt": ids,
            "seed": seed_of(row),
            "return_token_ids": True,
            "n": 1,
            "stream": False,
        }
        accept = partial(self._accepted, ids, options["max_tokens"])
        choice = await self.replicas.clients[number].send("/v1/completions", body, accept)
        row.tokens += choice.token_ids
        row.logprobs += choice.logprobs.token_logprobs

    def _accepted(self, ids: list[int], max_new_tokens: int, content: bytes) -> _Choice:
        choice = parse(content, _Completion).choices[0]
        tokens, logprobs = choice.token_ids, choice.logprobs.token_logprobs
        if choice.prompt_token_ids != ids:
            raise BadReply("a completion of another prompt")
        if len(tokens) > max_new_tokens or len(tokens) != len(logprobs):
            raise BadReply(f"{len(tokens)} tokens with {len(logprobs)} log-probabilities")
        if min(tokens) < 0 or max(logprobs) > 1e-3:
            raise BadReply("tokens that are no ids, or log-probabilities above 0")
        if max(tokens) >= self._num_ids:  # the server would draw it again
            raise ModelError(
                f"the server sampled the id {max(tokens)}, but the tokenizer's ids end at "
                f"{self._num_ids - 1}: the student's head is padded beyond them. Nothing of this "
                'batch was kept. Use engine.kind = "transformers", or cut the head to its ids.'
            )
        if not self._stops.isdisjoint(tokens[:-1]) or (
            (tokens[-1] in self._stops) != (choice.finish_reason == "stop")
        ):
            raise BadReply("a completion that does not end where it should")
        if choice.finish_reason == "length" and len(tokens) < max_new_tokens:
            raise BadReply(f"a completion cut off after {len(tokens)} tokens")
        return choice
