"""Rollouts of a model in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tutelage.config.sampling import SamplingConfig
from tutelage.data.types import Prompt, Rollout
from tutelage.rollout.generate import generate
from tutelage.rollout.request import RolloutRequest


def sample_rollouts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    seed: tuple[int, ...],
    batch_size: int = 64,
    is_fast: bool = True,
    **request: Any,
) -> list[Rollout]:
    """Rollouts and hidden states; further arguments are those of `RolloutRequest`."""
    asked = RolloutRequest(prompts, config, seed, **request)
    return generate(model, tokenizer, asked, batch_size, is_fast=is_fast)


def sample(*arguments: Any, **options: Any) -> list[Rollout]:
    """As `sample_rollouts`."""
    return sample_rollouts(*arguments, **options)
