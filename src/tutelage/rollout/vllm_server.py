"""Completions from a vLLM server, which reads the student's weights from a folder both can see."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from safetensors.torch import save_file

from tutelage.data.types import Rollout
from tutelage.errors import ModelError, RunError, remedy
from tutelage.files.atomic import new_file
from tutelage.models.lora import full_weights
from tutelage.models.tokenizers import stop_ids, vocabulary_size
from tutelage.rollout.conversation import Conversations, completion_of, conversations_of
from tutelage.rollout.http_client import BadReply, Client, Limits, Strict, in_thread, parse
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

_NAME = "model.safetensors"


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


class _Done(Strict):
    success: Literal[True]


class _Results(Strict):
    results: list[None]


class _Model(Strict):
    id: str
    max_model_len: int | None = None


class _Models(Strict):
    object: Literal["list"]
    data: list[_Model] = Field(min_length=1, max_length=1)


class VLLMServerSampler:
    """A vLLM server of one model. Before every batch it reads the student's weights.

    It has to be started with the student's architecture, in development mode, and to report
    log-probabilities as the model gives them::

        VLLM_SERVER_DEV_MODE=1 vllm serve STUDENT --logprobs-mode raw_logprobs

    Development mode lets whoever reaches the port command the server: keep it on a trusted network.

    Args:
        model: the student; `sample` uses the weights it has at that time.
        tokenizer: its tokenizer.
        url: the server's address without a path, such as http://127.0.0.1:8000.
        folder: where weights are handed over; the server must see it under the same name.
        num_concurrent: completions asked for at the same time.
        limits: how long and how often the server is asked.
        enable_thinking: passed to the chat template when not None.

    Raises:
        ConfigError: the address is none that may be asked.
        ModelError: the server does not answer as vLLM does.
    """

    has_own_weights = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        url: str,
        folder: Path,
        num_concurrent: int = 64,
        limits: Limits | None = None,
        enable_thinking: bool | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.folder = folder.absolute()
        self.enable_thinking = enable_thinking
        self._client = Client(url, limits or Limits(), num_concurrent)
        models = self._client.ask("/v1/models", None, partial(parse, schema=_Models))
        self._name, self._most = models.data[0].id, models.data[0].max_model_len
        self._stops = stop_ids(model, tokenizer)
        self._num_ids = vocabulary_size(tokenizer)

    def sample(self, request: RolloutRequest) -> list[Rollout]:
        """Completions of the prompts, from the student's present weights, or an error and none.

        Raises:
            ModelError: a completion could not be had.
            RunError: the weights cannot be written.
        """
        thinks = self.enable_thinking
        conversations = conversations_of(request, self.tokenizer, self._stops, thinks)
        requests = completion_requests(self.tokenizer, request, thinks, conversations)
        if conversations is not None and self._most is not None:
            refuse_long_conversations(requests, conversations, self._most)
        options = sampling_options(self.model, self.tokenizer, request.sampling)
        self._push()
        if conversations is None:
            asked = [partial(self._one, one, options) for one in requests]
        else:
            asked = [partial(self._converse, one, options, conversations) for one in requests]
        return self._client.each(asked, request.progress)

    def close(self) -> None:
        """The server stays; the weights handed over last are removed."""
        (self.folder / _NAME).unlink(missing_ok=True)

    def _push(self) -> None:
        """Write the weights, have the server read them, and forget what the old ones computed."""
        weights = {name: weight.cpu().contiguous() for name, weight in full_weights(self.model)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with new_file(self.folder / _NAME, is_durable=False) as new:
                save_file(weights, new, {"format": "pt"})
        except OSError as error:
            raise RunError(
                f"weights cannot be written to engine.folder {self.folder}: {error.strerror}. "
                + remedy(error, "Name a folder that the server reads, too.")
            ) from None
        path = {"weights_path": str(self.folder)}
        order = {"method": "reload_weights", "kwargs": path}
        self._client.ask("/collective_rpc", order, partial(parse, schema=_Results))
        self._client.ask("/reset_prefix_cache", {}, partial(parse, schema=_Done))

    async def _one(self, request: CompletionRequest, options: dict[str, Any]) -> Rollout:
        row = OpenRollout(request)
        await self._turn(row, options)
        return to_rollout(self.tokenizer, request, row.tokens, row.logprobs, self._stops)

    async def _converse(
        self, request: CompletionRequest, options: dict[str, Any], conversations: Conversations
    ) -> Rollout:
        """One conversation; others go on while it waits for its environment."""
        row = OpenRollout(request)
        while True:
            await self._turn(row, options | {"max_tokens": conversations.num_left(row)})
            (answer,) = await in_thread(conversations.answer, [row])
            if answer is None:
                return await in_thread(conversations.rollout, row)
            row.insert(answer)

    async def _turn(self, row: OpenRollout, options: dict[str, Any]) -> None:
        """Append a completion of all ids of a row."""
        ids = [*row.request.ids, *completion_of(row)[0]]
        body = {
            **options,
            "model": self._name,
            "prompt": ids,
            "seed": seed_of(row),
            "return_token_ids": True,
            "n": 1,
            "stream": False,
        }
        accept = partial(self._accepted, ids, options["max_tokens"])
        choice = await self._client.send("/v1/completions", body, accept)
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
                f"the server drew the id {max(tokens)}, but the tokenizer's ids end at "
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
