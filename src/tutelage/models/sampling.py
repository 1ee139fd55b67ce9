"""Completions from a causal language model, exactly reproducible token by token.

Every token is drawn by inverting the cumulative distribution at one uniform number, and that
number is a hash of (seed, prompt, sample, position). A token therefore does not depend on which
other prompts share its batch, on their order, or on how many tokens were drawn before a restart.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from tutelage.core.counter import GOLDEN, random_bits, splitmix64
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import ConfigError, ModelError
from tutelage.models.tokenizers import decode, encode_prompt, pad_id, stop_ids, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn. Training is exact only at the defaults of the three filters."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # as in every table of a configuration
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token (greedy)."""
    top_p: float = 1.0
    """Smallest set of likeliest tokens holding this probability, in (0, 1]; 1 keeps all."""
    top_k: int = 0
    """Number of likeliest tokens that may be drawn; 0 keeps all."""
    max_new_tokens: int = 256
    """Length in tokens at which a completion is cut off."""
    num_samples: int = 1
    """Completions per prompt."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"sampling.temperature must be at least 0, got {self.temperature}. "
                "Use 1.0 for the model's own distribution or 0 for greedy."
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(
                f"sampling.top_p must be in (0, 1], got {self.top_p}. Use 1.0 to keep every token."
            )
        for name, least in (("top_k", 0), ("max_new_tokens", 1), ("num_samples", 1)):
            value = self.__dict__[name]
            if value < least:
                raise ConfigError(
                    f"sampling.{name} must be at least {least}, got {value}. Raise it."
                )


@dataclass(frozen=True)
class _Job:
    """One completion to draw: a place in the output and what determines its tokens."""

    place: int
    prompt: Prompt
    sample: int
    ids: tuple[int, ...]
    key: int


@dataclass(frozen=True)
class _Draws:
    """What a batch of jobs produced, one row a job: tokens, log-probabilities and lengths."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    lengths: list[int]


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    seed: tuple[int, ...],
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
    enable_thinking: bool | None = None,
) -> list[Rollout]:
    """Draw completions, `config.num_samples` for each prompt.

    Ids beyond the tokenizer's vocabulary (padding rows of the head) are never drawn. Recorded
    log-probabilities are those of the temperature distribution before top-k and top-p; for greedy
    sampling, those at temperature 1.

    Args:
        model: Causal language model; its mode and settings are left as they were.
        tokenizer: The model's tokenizer.
        prompts: Prompts to complete.
        config: How to draw.
        seed: Integers naming this draw, say (run seed, step).
        batch_size: Completions decoded at the same time.
        progress: Called with the number of completions that have just been finished.
        enable_thinking: Passed to the chat template when not None.

    Returns:
        Rollouts, all samples of the first prompt first.

    Raises:
        ConfigError: batch_size is below 1.
        DataError: A prompt cannot be encoded.
        ModelError: The model gave logits that are not numbers.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}. Use 1 or more.")
    jobs = _jobs(tokenizer, prompts, config.num_samples, seed, enable_thinking)
    decoder = _Decoder(model, tokenizer, config)
    rollouts: list[Rollout | None] = [None] * len(jobs)
    # Neighbours in length share a batch, so little of the prefill is padding.
    jobs.sort(key=lambda job: (len(job.ids), job.place))
    with _evaluating(model), torch.no_grad():
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            for job, rollout in zip(batch, decoder.complete(batch), strict=True):
                rollouts[job.place] = rollout
            if progress is not None:
                progress(len(batch))
    return [rollout for rollout in rollouts if rollout is not None]


def _jobs(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    num_samples: int,
    seed: tuple[int, ...],
    enable_thinking: bool | None,
) -> list[_Job]:
    jobs: list[_Job] = []
    seen: Counter[str] = Counter()
    for prompt in prompts:
        ids = tuple(encode_prompt(tokenizer, prompt, enable_thinking))
        # A prompt that comes again in the same step draws further samples, not the same ones.
        first = seen[prompt.id] * num_samples
        seen[prompt.id] += 1
        for s in range(num_samples):
            jobs.append(_Job(len(jobs), prompt, s, ids, _key(seed, prompt.id, first + s)))
    return jobs


class _Decoder:
    """Prefill once per prompt, then one token a step for the completions that are still open."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: SamplingConfig
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.device = model.device
        self.vocabulary = vocabulary_size(tokenizer)
        self.pad = pad_id(tokenizer)
        self.stops = torch.tensor(sorted(stop_ids(model, tokenizer)), device=self.device)

    def complete(self, jobs: Sequence[_Job]) -> list[Rollout]:
        """Rollouts of the jobs, in their order."""
        draws = self._draw(jobs)
        stops = set(self.stops.tolist())
        rollouts = []
        for i, job in enumerate(jobs):
            ids = tuple(draws.tokens[i][: draws.lengths[i]])
            rollouts.append(
                Rollout(
                    prompt=job.prompt,
                    sample=job.sample,
                    prompt_ids=job.ids,
                    completion_ids=ids,
                    is_truncated=ids[-1] not in stops,
                    logprobs=tuple(draws.logprobs[i][: draws.lengths[i]]),
                    text=decode(self.tokenizer, ids),
                )
            )
        return rollouts

    def _draw(self, jobs: Sequence[_Job]) -> _Draws:
        num_steps = self.config.max_new_tokens
        uniform = uniforms([job.key for job in jobs], num_steps).to(self.device)
        tokens = torch.zeros(len(jobs), num_steps, dtype=torch.long, device=self.device)
        logprobs = torch.zeros(len(jobs), num_steps, device=self.device)
        lengths = torch.full((len(jobs),), num_steps, device=self.device)
        state = _State(self, jobs)
        for step in range(num_steps):
            rows = state.rows
            drawn, logprob, ok = draw(state.logits, uniform[rows, step], self.config)
            tokens[rows, step] = drawn
            logprobs[rows, step] = logprob
            is_open = torch.isin(drawn, self.stops, invert=True)
            num_open, is_ok = torch.stack([is_open.sum(), ok.long()]).tolist()
            if not is_ok:
                raise ModelError(
                    f"the model gave logits that are not numbers, got them at token {step}. "
                    "Check its weights and dtype; float16 overflows where bfloat16 does not."
                )
            if num_open < len(rows):
                lengths[rows[~is_open]] = step + 1
                state.keep(is_open)
            if num_open == 0 or step + 1 == num_steps:
                break
            state.advance(drawn[is_open])
        return _Draws(tokens.tolist(), logprobs.tolist(), lengths.tolist())


class _State:
    """The open completions of a batch: their rows, key-value cache and next-token logits."""

    def __init__(self, decoder: _Decoder, jobs: Sequence[_Job]) -> None:
        from transformers import DynamicCache

        self.model = decoder.model
        self.vocabulary = decoder.vocabulary
        self.cache = DynamicCache(config=decoder.model.config)
        distinct = list(dict.fromkeys(job.ids for job in jobs))
        ids, self.mask = _pad_left(distinct, decoder.pad, decoder.device)
        self.position = self.mask.sum(1)
        self.logits = self._forward(ids, (self.mask.cumsum(1) - 1).clamp(min=0))
        self.rows = torch.arange(len(distinct), device=decoder.device)
        if len(distinct) < len(jobs):
            # All samples of a prompt start from one copy of its prefill.
            row = {ids: i for i, ids in enumerate(distinct)}
            self._select(torch.tensor([row[job.ids] for job in jobs], device=decoder.device))
        self.rows = torch.arange(len(jobs), device=decoder.device)

    def keep(self, is_open: Tensor) -> None:
        """Let finished completions leave the batch, so that they cost nothing more."""
        self._select(is_open.nonzero().squeeze(1))

    def advance(self, tokens: Tensor) -> None:
        """Feed one token to every open completion."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.logits = self._forward(tokens[:, None], self.position[:, None])
        self.position = self.position + 1

    def _select(self, index: Tensor) -> None:
        self.cache.batch_select_indices(index)
        self.mask, self.position = self.mask[index], self.position[index]
        self.logits, self.rows = self.logits[index], self.rows[index]

    def _forward(self, ids: Tensor, position: Tensor) -> Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1, : self.vocabulary]
        return logits.float()


def draw(logits: Tensor, uniform: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token a row by inverse CDF: the first v with sum_{w <= v} p(w) > u.

    Args:
        logits: Next-token logits, float32, [B, V].
        uniform: One number in [0, 1) a row, float64, [B].
        config: Temperature and filters.

    Returns:
        Tokens [B], their unfiltered log-probabilities in nats [B], and whether all is finite [].
    """
    log_p = torch.log_softmax(logits / (config.temperature or 1.0), dim=-1)
    if config.temperature == 0.0:
        token = logits.argmax(dim=-1)
    else:
        cumulative = filter_probs(log_p.double().exp(), config).cumsum(dim=-1)
        threshold = uniform * cumulative[:, -1]
        token = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(1)
        # Only a row that is not finite can point past the end; it is reported below.
        token = token.clamp(max=logits.shape[-1] - 1)
    logprob = log_p.gather(1, token[:, None]).squeeze(1)
    return token, logprob, logprob.isfinite().all()


def filter_probs(probs: Tensor, config: SamplingConfig) -> Tensor:
    """Zero every token outside the top-k and the top-p set (in this order), not renormalised.

    Args:
        probs: Probabilities, [B, V].
        config: Its top_k and top_p; ties are broken by the smaller id.

    Returns:
        The probabilities of the tokens that may be drawn, 0 elsewhere, [B, V].
    """
    keeps_k = 0 < config.top_k < probs.shape[-1]
    if not keeps_k and config.top_p == 1.0:
        return probs
    ranked, index = probs.sort(dim=-1, descending=True, stable=True)
    if keeps_k:
        ranked[:, config.top_k :] = 0.0
    before = ranked.cumsum(dim=-1) - ranked
    ranked[before >= config.top_p * ranked.sum(dim=-1, keepdim=True)] = 0.0
    return torch.zeros_like(probs).scatter(-1, index, ranked)


def uniforms(keys: Sequence[int], count: int) -> Tensor:
    """Counter-based uniform numbers (splitmix64): number i of a key needs no number before it.

    Args:
        keys: One signed 64-bit integer for each row.
        count: Numbers per row.

    Returns:
        Numbers in [0, 1) with 53 random bits, float64, [len(keys), count].
    """
    counter = torch.arange(count, dtype=torch.long)
    # int64 products wrap around, which is the arithmetic modulo 2^64 that splitmix64 wants.
    return random_bits(splitmix64(torch.tensor(keys, dtype=torch.long)[:, None] + counter * GOLDEN))


def _key(seed: tuple[int, ...], prompt_id: str, sample_index: int) -> int:
    digest = hashlib.blake2b(repr((seed, prompt_id, sample_index)).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little", signed=True)


def _pad_left(
    sequences: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    width = max(len(ids) for ids in sequences)
    padded = [[pad] * (width - len(ids)) + list(ids) for ids in sequences]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences]
    return torch.tensor(padded, device=device), torch.tensor(mask, device=device)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode (no dropout, no checkpointing); afterwards each module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
