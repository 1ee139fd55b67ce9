"""How servers of several kinds are asked for log-probabilities of a prompt, and how they answer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field

from tutelage.errors import ModelError
from tutelage.models.tokenizers import vocabulary_size
from tutelage.rollout.http_client import BadReply, Strict, parse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROUNDING = 1e-3
"""What rounded log-probabilities, and their sum, may be above those of a distribution."""
_UNKNOWN = -9999.0
"""What servers write for minus infinity, or for a log-probability that they do not know."""
_ID = re.compile(r"0|[1-9][0-9]{0,9}")
_TOKEN_ID = re.compile(r"token_id:(0|[1-9]\d*)")

_LogProb = Annotated[float, Field(le=ROUNDING)]


@dataclass(frozen=True)
class Known:
    """What a server tells of one token."""

    top: dict[int, float]
    """Log-probabilities of the likeliest ids, nats; the token's may be one more than was asked for.
    """
    log_q: float
    """The token's own, nats."""


class LogprobApi(Protocol):
    """One way of asking for the likeliest ids at every place of a prompt."""

    path: str

    def body(self, name: str, ids: Sequence[int], k: int) -> dict[str, Any]:
        """The request for a sequence, to the model of a name."""

    def read(
        self, content: bytes, name: str, ids: Sequence[int], places: Sequence[int]
    ) -> list[Known]:
        """What a reply tells of the tokens at some places.

        Raises:
            BadReply: it is no answer to the request.
        """


class _Number(Strict):
    logprob: _LogProb


class _VLLMChoice(Strict):
    index: Literal[0]
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[str, _Number] | None]


class _VLLMReply(Strict):
    model: str
    choices: list[_VLLMChoice] = Field(min_length=1, max_length=1)


class VLLMApi:
    """vLLM's completions endpoint with `prompt_logprobs`, which names ids by their numbers."""

    path = "/v1/completions"

    def body(self, name: str, ids: Sequence[int], k: int) -> dict[str, Any]:
        """See `LogprobApi`."""
        return {
            "model": name,
            "prompt": list(ids),
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": k,
            "return_token_ids": True,
            "stream": False,
        }

    def read(
        self, content: bytes, name: str, ids: Sequence[int], places: Sequence[int]
    ) -> list[Known]:
        """See `LogprobApi`."""
        reply = parse(content, _VLLMReply)
        choice = reply.choices[0]
        _require_model(reply.model, name)
        _require_ids(choice.prompt_token_ids, ids)
        _require_count(len(choice.prompt_logprobs), len(ids))
        _require_unknown(choice.prompt_logprobs[0])
        return [self._known(choice.prompt_logprobs[place], ids[place]) for place in places]

    def _known(self, known: dict[str, _Number] | None, token: int) -> Known:
        if not known or not all(_ID.fullmatch(name) for name in known):
            raise BadReply("a token without log-probabilities, or of names that are no ids")
        numbers = {int(name): value.logprob for name, value in known.items()}
        if token not in numbers:
            raise BadReply("log-probabilities without the token's")
        return Known(numbers, numbers[token])


class _Listed(Strict):
    tokens: list[str]
    token_logprobs: list[_LogProb | None]
    top_logprobs: list[dict[str, _LogProb] | None]


class _ListedChoice(Strict):
    index: Literal[0]
    logprobs: _Listed


class _ListedReply(Strict):
    model: str
    choices: list[_ListedChoice] = Field(min_length=1, max_length=1)


class CompletionsApi:
    """OpenAI's completions with `echo` and `logprobs`, which names tokens by their texts.

    Args:
        tokenizer: gives the texts; None accepts the names `token_id:N` alone.
        asks_for_ids: whether to ask for such names, as vLLM and some others have.
    """

    path = "/v1/completions"

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None = None, asks_for_ids: bool = True
    ) -> None:
        self._tokenizer, self._asks_for_ids = tokenizer, asks_for_ids

    def body(self, name: str, ids: Sequence[int], k: int) -> dict[str, Any]:
        """See `LogprobApi`."""
        named = {"return_tokens_as_token_ids": True} if self._asks_for_ids else {}
        return {
            "model": name,
            "prompt": list(ids),
            "max_tokens": 1,
            "temperature": 1.0,
            "echo": True,
            "logprobs": k,
            "stream": False,
        } | named

    def read(
        self, content: bytes, name: str, ids: Sequence[int], places: Sequence[int]
    ) -> list[Known]:
        """See `LogprobApi`.

        Raises:
            ModelError: a name stands for several ids.
        """
        reply = parse(content, _ListedReply)
        found = reply.choices[0].logprobs
        _require_model(reply.model, name)
        counts = {len(found.tokens), len(found.token_logprobs), len(found.top_logprobs)}
        if len(counts) > 1 or not counts <= {len(ids), len(ids) + 1}:  # one is generated
            _require_count(min(counts), len(ids))
            raise BadReply(f"{max(counts)} log-probabilities of {len(ids)} tokens")
        _require_unknown(found.top_logprobs[0], found.token_logprobs[0])
        for text, token in zip(found.tokens, ids, strict=False):
            if text != f"token_id:{token}" and text != self._text(token):
                raise BadReply(f"log-probabilities of other tokens, {text[:40]!r} for id {token}")
        return [
            self._known(found.top_logprobs[place], found.token_logprobs[place]) for place in places
        ]

    def _known(self, known: dict[str, float] | None, log_q: float | None) -> Known:
        if not known or log_q is None:
            raise BadReply("a token without log-probabilities")
        if min(log_q, *known.values()) <= _UNKNOWN:
            raise BadReply(f"a log-probability of {_UNKNOWN:g}, which stands for an unknown one")
        numbers = {self._id(name): value for name, value in known.items()}
        if len(numbers) < len(known):
            raise BadReply("log-probabilities with two names of one id")
        return Known(numbers, log_q)

    def _id(self, name: str) -> int:
        if match := _TOKEN_ID.fullmatch(name):
            return int(match[1])
        if self._count[name] == 1:
            return self._ids[name]
        if not self._count[name]:
            raise BadReply(f"log-probabilities of {name[:40]!r}, which is no token's text")
        raise ModelError(
            f"the teacher's server names a token {name[:40]!r}, which is the text of "
            f"{self._count[name]} ids. Use a server that names tokens token_id:N, or teacher.api = "
            "'vllm' or 'sglang'."
        )

    def _text(self, token: int) -> str | None:
        return self._texts[token] if token < len(self._texts) else None

    @cached_property
    def _texts(self) -> list[str]:
        """The text of every id."""
        if self._tokenizer is None:
            return []
        ids = [[token] for token in range(vocabulary_size(self._tokenizer))]
        decode = partial(self._tokenizer.batch_decode, clean_up_tokenization_spaces=False)
        return list(decode(ids))

    @cached_property
    def _ids(self) -> dict[str, int]:
        """The last id of each text."""
        return {text: token for token, text in enumerate(self._texts)}

    @cached_property
    def _count(self) -> Counter[str]:
        """Ids of each text."""
        return Counter(self._texts)


_Entry = tuple[_LogProb | None, int, str | None]
"""A log-probability, an id, and its text if one was asked for."""
_KnownEntry = tuple[_LogProb, int, str | None]


class _Meta(Strict):
    input_token_logprobs: list[_Entry]
    input_top_logprobs: list[list[_KnownEntry] | None]


class _SGLangReply(Strict):
    meta_info: _Meta


class SGLangApi:
    """SGLang's own endpoint `/generate`, which gives ids; its replies name no model."""

    path = "/generate"

    def body(self, name: str, ids: Sequence[int], k: int) -> dict[str, Any]:
        """See `LogprobApi`."""
        return {
            "input_ids": list(ids),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": k,
            "return_text_in_logprobs": False,
            "stream": False,
        }

    def read(
        self, content: bytes, name: str, ids: Sequence[int], places: Sequence[int]
    ) -> list[Known]:
        """See `LogprobApi`."""
        found = parse(content, _SGLangReply).meta_info
        _require_count(len(found.input_token_logprobs), len(ids))
        _require_count(len(found.input_top_logprobs), len(ids))
        _require_ids([token for _, token, _ in found.input_token_logprobs], ids)
        _require_unknown(found.input_top_logprobs[0], found.input_token_logprobs[0][0])
        return [
            self._known(found.input_top_logprobs[place], found.input_token_logprobs[place][0])
            for place in places
        ]

    def _known(self, known: Sequence[_KnownEntry] | None, log_q: float | None) -> Known:
        if not known or log_q is None:
            raise BadReply("a token without log-probabilities")
        numbers = {token: value for value, token, _ in known}
        if len(numbers) < len(known) or min(numbers) < 0:
            raise BadReply("log-probabilities of one id twice, or of ids below 0")
        return Known(numbers, log_q)


def _require_model(found: str, name: str) -> None:
    if found != name:
        raise BadReply(f"log-probabilities of another model, {found[:100]!r}")


def _require_ids(found: Sequence[int], ids: Sequence[int]) -> None:
    if list(found) != list(ids):
        raise BadReply("log-probabilities of other tokens")


def _require_count(found: int, expected: int) -> None:
    if found != expected:
        raise BadReply(f"{found} log-probabilities of {expected} tokens")


def _require_unknown(top: Collection[object] | None, log_q: float | None = None) -> None:
    """Nothing predicts the first token; numbers there are those of another one."""
    if top or log_q is not None:
        raise BadReply("log-probabilities of the first token, which nothing predicts")


def apis_of(
    kind: Literal["vllm", "completions", "sglang"], tokenizer: PreTrainedTokenizerBase | None
) -> tuple[LogprobApi, ...]:
    """The ways to ask a server of a kind, of which the first that it does not refuse is taken."""
    if kind == "completions":
        return CompletionsApi(tokenizer), CompletionsApi(tokenizer, asks_for_ids=False)
    return (SGLangApi(),) if kind == "sglang" else (VLLMApi(),)
