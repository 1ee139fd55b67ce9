"""Requests for rollouts and their results: the same for every engine."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from tutelage.config.conversations import ConversationData
from tutelage.config.sampling import SamplingConfig
from tutelage.data.types import Prompt, Rollout
from tutelage.envs.environment import Environment
from tutelage.grading.answer import opened_thought
from tutelage.models.forward import Ids
from tutelage.models.tokenizers import decode, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEUTRAL: dict[str, Any] = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
    "stop": None,
}
"""Settings that change nothing, stated in every request to a server: what a request leaves out, a
server fills in from the model's generation_config.json or from its own defaults."""

LONGEST_MARK = 32
"""Tokens of a prompt's end in which the mark of a thought and the spaces behind it fit."""


@dataclass(frozen=True)
class Agent:
    """How prompts become conversations with environments."""

    environment: Callable[[], Environment]
    """A new environment, for one conversation."""
    limits: ConversationData


@dataclass(frozen=True)
class RolloutRequest:
    """What to sample: `sampling.num_samples` completions of each prompt."""

    prompts: Sequence[Prompt]
    sampling: SamplingConfig
    seed: tuple[int, ...]
    """Integers that name this batch, say (run seed, step)."""
    first_sample: Sequence[int] | None = None
    """For each prompt the number of its samples that are sampled before under the same seed, here
    or in another process. When None, `earlier_samples(prompts, sampling.num_samples)`: no other
    process samples under this seed."""
    record_hidden: bool = False
    """Keep the hidden state that every token was sampled from; engines with weights of their own
    have none."""
    progress: Callable[[int], None] | None = None
    """Called with the number of completions that have just been finished."""
    agent: Agent | None = None
    """Where a completion is a conversation; None where it is a single answer."""
    prompt_ids: Sequence[Ids] | None = None
    """Ids of each prompt, taken as they are; None encodes what the prompts say."""


@dataclass(frozen=True)
class CompletionRequest:
    """One completion to sample: its index in the output and what determines its tokens."""

    index: int
    prompt: Prompt
    sample: int
    ids: Ids
    """Tokens of the prompt."""
    key: int
    """Names its random numbers: a signed 64-bit hash of seed, prompt and sample."""
    thought: str = ""
    """The mark of a thought that the prompt ends with."""


@dataclass
class OpenRollout:
    """A completion under way."""

    request: CompletionRequest
    tokens: list[int] = field(default_factory=list)
    """What was generated."""
    logprobs: list[float] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    turn_start: int = 0
    """Number of tokens that were generated before the present turn."""
    inserted: list[tuple[int, Ids]] = field(default_factory=list)
    """Ids between turns, each with the number of tokens that were generated before them."""
    pending: Ids = ()
    """Inserted ids that the slot has not read yet."""

    @property
    def length(self) -> int:
        """Ids of the whole sequence: the prompt, generated and inserted ones."""
        between = sum(len(ids) for _, ids in self.inserted)
        return len(self.request.ids) + len(self.tokens) + between

    def insert(self, ids: Ids) -> None:
        """End the present turn with ids that were not generated."""
        self.inserted.append((len(self.tokens), ids))
        self.turn_start = len(self.tokens)


class Opened(Protocol):
    """Conversations that have begun."""

    def start(self, prompts: Sequence[Prompt], keys: Sequence[int]) -> list[Ids]:
        """The ids that the model reads first, of one conversation a prompt."""


def completion_requests(
    tokenizer: PreTrainedTokenizerBase,
    request: RolloutRequest,
    enable_thinking: bool | None = None,
    conversations: Opened | None = None,
) -> list[CompletionRequest]:
    """All samples of the first prompt, then those of the second.

    Args:
        tokenizer: the model's tokenizer.
        request: the prompts, and how many samples of each.
        enable_thinking: passed to the chat template when not None.
        conversations: begins a conversation for each; None where there are single answers.

    Raises:
        DataError: a prompt cannot be encoded.
    """
    prompts, num_samples, first = (
        request.prompts,
        request.sampling.num_samples,
        request.first_sample,
    )
    if first is None:
        first = earlier_samples(prompts, num_samples)
    numbers = [(i, s) for i in range(len(prompts)) for s in range(num_samples)]
    keys = [_key(request.seed, prompts[i].id, first[i] + s) for i, s in numbers]
    if conversations is None:
        encoded = request.prompt_ids
        if encoded is None:
            encoded = [tuple(encode_prompt(tokenizer, one, enable_thinking)) for one in prompts]
        ids = [encoded[i] for i, _ in numbers]
    else:
        ids = conversations.start([prompts[i] for i, _ in numbers], keys)
    ends = {one[-LONGEST_MARK:] for one in ids}
    thoughts = {end: opened_thought(decode(tokenizer, end)) for end in ends}
    return [
        CompletionRequest(index, prompts[i], s, one, key, thoughts[one[-LONGEST_MARK:]])
        for index, ((i, s), key, one) in enumerate(zip(numbers, keys, ids, strict=True))
    ]


def in_prefill_order(requests: Sequence[CompletionRequest]) -> list[CompletionRequest]:
    """Neighbours in length together, so that little of a prefill is padding; equal prompts one
    after the other, so that each is read once."""
    first: dict[Ids, int] = {}
    for request in requests:
        first.setdefault(request.ids, request.index)
    return sorted(
        requests, key=lambda request: (len(request.ids), first[request.ids], request.index)
    )


def to_rollout(
    tokenizer: PreTrainedTokenizerBase,
    request: CompletionRequest,
    tokens: Sequence[int],
    logprobs: Sequence[float],
    stops: AbstractSet[int],
) -> Rollout:
    """The record of a finished completion; without a stop token at its end it was cut off."""
    return Rollout(
        prompt=request.prompt,
        sample=request.sample,
        prompt_ids=request.ids,
        completion_ids=tuple(tokens),
        is_truncated=tokens[-1] not in stops,
        logprobs=tuple(logprobs),
        text=decode(tokenizer, tokens),
        thought=request.thought,
    )


def earlier_samples(prompts: Sequence[Prompt], num_samples: int) -> list[int]:
    """For each prompt, how many samples of the same prompt the ones before it ask for.

    Several processes that share the prompts of a step compute this over all of them and pass their
    part on as `first_sample`; together they then sample what one process would.
    """
    seen: Counter[str] = Counter()
    first = []
    for prompt in prompts:
        first.append(seen[prompt.id])
        seen[prompt.id] += num_samples
    return first


def _key(seed: tuple[int, ...], prompt_id: str, sample_index: int) -> int:
    digest = hashlib.blake2b(repr((seed, prompt_id, sample_index)).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little", signed=True)
