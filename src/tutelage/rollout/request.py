"""What is to be drawn, and what was: the same for every engine."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tutelage.data.types import Prompt, Rollout
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

_LONGEST_MARK = 32
"""Tokens of a prompt's end in which the mark of a thought and the spaces behind it fit."""


@dataclass(frozen=True)
class Drawn:
    """Rollouts, and the hidden states their tokens were drawn from."""

    rollouts: list[Rollout]
    hidden: list[Tensor] | None
    """For each rollout `[num completion tokens, D]`: what the head multiplied when it drew them, in
    the model's dtype and on its device. None unless recorded."""


@dataclass(frozen=True)
class Job:
    """One completion to draw: a place in the output and what determines its tokens."""

    place: int
    prompt: Prompt
    sample: int
    ids: Ids
    key: int
    """Names its random numbers: a signed 64-bit hash of seed, prompt and sample."""
    thought: str = ""
    """The mark of a thought that the prompt ends with."""


@dataclass
class Open:
    """A completion under way."""

    job: Job
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)


def jobs_of(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    num_samples: int,
    seed: tuple[int, ...],
    first_sample: Sequence[int] | None = None,
    enable_thinking: bool | None = None,
) -> list[Job]:
    """All samples of the first prompt, then those of the second; arguments as in `draw_rollouts`.

    Raises:
        DataError: a prompt cannot be encoded.
    """
    first = earlier_samples(prompts, num_samples) if first_sample is None else first_sample
    ids = [tuple(encode_prompt(tokenizer, prompt, enable_thinking)) for prompt in prompts]
    thoughts = [opened_thought(decode(tokenizer, i[-_LONGEST_MARK:])) for i in ids]
    numbers = [(i, s) for i in range(len(prompts)) for s in range(num_samples)]
    return [
        Job(place, prompts[i], s, ids[i], _key(seed, prompts[i].id, first[i] + s), thoughts[i])
        for place, (i, s) in enumerate(numbers)
    ]


def in_reading_order(jobs: Sequence[Job]) -> list[Job]:
    """Neighbours in length together, so that little of a prefill is padding; equal prompts one
    after the other, so that each is read once."""
    first: dict[Ids, int] = {}
    for job in jobs:
        first.setdefault(job.ids, job.place)
    return sorted(jobs, key=lambda job: (len(job.ids), first[job.ids], job.place))


def rollout_of(
    tokenizer: PreTrainedTokenizerBase,
    job: Job,
    tokens: Sequence[int],
    logprobs: Sequence[float],
    stops: AbstractSet[int],
) -> Rollout:
    """The record of a finished completion; without a stop token at its end it was cut off."""
    return Rollout(
        prompt=job.prompt,
        sample=job.sample,
        prompt_ids=job.ids,
        completion_ids=tuple(tokens),
        is_truncated=tokens[-1] not in stops,
        logprobs=tuple(logprobs),
        text=decode(tokenizer, tokens),
        thought=job.thought,
    )


def earlier_samples(prompts: Sequence[Prompt], num_samples: int) -> list[int]:
    """For each prompt, how many samples of the same prompt the ones before it draw.

    Several processes that share the prompts of a step compute this over all of them and pass their
    part on as `first_sample`; they then draw what one process would.
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
