"""One token a row from logits and counter-based uniform numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tutelage.config.sampling import SamplingConfig
from tutelage.core.counter import GOLDEN, random_bits, splitmix64
from tutelage.errors import ModelError

__all__ = ["SamplingConfig", "check_finite", "filter_probs", "sample_token", "uniforms"]

_BLOCK = 256
"""Ids whose probabilities are first summed together; only one block a row is searched id by id."""


def sample_token(logits: Tensor, uniform: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Sample one token a row by inverse CDF: the first v with sum_{w <= v} p(w) > u.

    Args:
        logits: Next-token logits, float32 or wider, [B, V].
        uniform: One number in [0, 1) a row, float64, [B].
        config: Temperature and filters.

    Returns:
        Tokens [B] and their unfiltered log-probabilities in nats [B], which are not finite where
        the logits are not numbers.
    """
    is_warm = config.temperature not in (0.0, 1.0)
    probs = torch.softmax(logits / config.temperature if is_warm else logits, dim=-1)
    if config.temperature == 0.0:
        token = logits.argmax(dim=-1, keepdim=True)
    else:
        token = _invert(filter_probs(probs, config), uniform[:, None])
    logprob = probs.gather(1, token).log()
    return token.squeeze(1), logprob.squeeze(1)


def _invert(probs: Tensor, uniform: Tensor) -> Tensor:
    """First id of each row whose cumulative weight exceeds `uniform` times the total, [B, 1]."""
    num_ids = probs.shape[-1]
    if num_ids <= 4 * _BLOCK:
        cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
        return _search(cumulative, uniform * cumulative[:, -1:])
    num_full = num_ids // _BLOCK
    full, rest = probs[:, : num_full * _BLOCK], probs[:, num_full * _BLOCK :]  # views, no copy
    sums = full.view(-1, num_full, _BLOCK).sum(dim=-1, dtype=torch.float64)
    sums = torch.cat((sums, rest.sum(dim=-1, keepdim=True, dtype=torch.float64)), dim=-1)
    cumulative = sums.cumsum(dim=-1)
    threshold = uniform * cumulative[:, -1:]
    block = _search(cumulative, threshold)
    threshold = (threshold - (cumulative - sums).gather(1, block)).clamp_(min=0.0)
    ids = block * _BLOCK + torch.arange(_BLOCK, device=probs.device)
    inside = probs.gather(1, ids.clamp(max=num_ids - 1)).masked_fill(ids >= num_ids, 0.0)
    inside = inside.cumsum(dim=-1, dtype=torch.float64)
    # The two ways of adding up may differ in the last bit; the block's last possible id ends it.
    last = torch.nextafter(inside[:, -1:], inside.new_zeros(()))
    token = block * _BLOCK + _search(inside, threshold.minimum(last))
    return token.clamp(max=num_ids - 1)  # of a row that is not finite


def _search(cumulative: Tensor, threshold: Tensor) -> Tensor:
    """First index of each row above the threshold, [B, 1]."""
    # Only a row that is not finite points past the end; `sample_token` reports it.
    index = torch.searchsorted(cumulative, threshold, right=True)
    return index.clamp(max=cumulative.shape[-1] - 1)


def filter_probs(probs: Tensor, config: SamplingConfig) -> Tensor:
    """Zero every token outside the top-k and the top-p set (in this order), not renormalized.

    Args:
        probs: Probabilities, [B, V].
        config: Its top_k and top_p; ties are broken by the smaller id.

    Returns:
        The probabilities of the tokens that may be sampled, 0 elsewhere, [B, V].
    """
    keeps_k = 0 < config.top_k < probs.shape[-1]
    if not keeps_k and config.top_p == 1.0:
        return probs
    ranked, index = probs.double().sort(dim=-1, descending=True, stable=True)
    if keeps_k:
        ranked[:, config.top_k :] = 0.0
    before = ranked.cumsum(dim=-1) - ranked
    ranked[before >= config.top_p * ranked.sum(dim=-1, keepdim=True)] = 0.0
    return torch.zeros_like(ranked).scatter(-1, index, ranked)


def uniforms(keys: Sequence[int], count: int, first: Sequence[int] | None = None) -> Tensor:
    """Counter-based uniform numbers (splitmix64): number i of a key needs no number before it.

    Args:
        keys: One signed 64-bit integer for each row.
        count: Numbers per row.
        first: Index of the first number of each row; 0 when None.

    Returns:
        Numbers in [0, 1) with 53 random bits, float64, [len(keys), count].
    """
    index = torch.arange(count) + torch.tensor(first or [0] * len(keys))[:, None]
    # int64 products wrap around, which is the arithmetic modulo 2^64 that splitmix64 wants.
    return random_bits(splitmix64(torch.tensor(keys, dtype=torch.long)[:, None] + index * GOLDEN))


def check_finite(logprobs: Sequence[float], first: int) -> None:
    """Refuse log-probabilities that are not numbers; the first is that of token `first`.

    Raises:
        ModelError: one is not finite.
    """
    for place, logprob in enumerate(logprobs, first):
        if not math.isfinite(logprob):
            raise ModelError(
                f"the model gave logits that are not numbers, got them at token {place}. "
                "Check its weights and dtype; float16 overflows where bfloat16 does not."
            )
