"""The interface of the engines that sample completions, and the engine of transformers' models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tutelage.data.types import Rollout
from tutelage.rollout.cuda.generate import forget
from tutelage.rollout.generate import generate
from tutelage.rollout.request import RolloutRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Sampler(Protocol):
    """Samples completions from the student's present weights."""

    has_own_weights: bool
    """Whether it holds a copy of the weights, whose log-probabilities have to be compared with the
    student's; it records no hidden states."""

    def sample(self, request: RolloutRequest) -> list[Rollout]:
        """Completions of the request's prompts."""

    def close(self) -> None:
        """Release the engine's memory; nothing is sampled afterwards."""


@dataclass
class TransformersSampler:
    """Samples from the student itself; no weights are copied."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 64
    """Completions decoded at the same time."""
    enable_thinking: bool | None = None
    """Passed to the chat template when not None."""
    has_own_weights: bool = False

    def sample(self, request: RolloutRequest) -> list[Rollout]:
        """Completions of the request's prompts."""
        return generate(self.model, self.tokenizer, request, self.batch_size, self.enable_thinking)

    def close(self) -> None:
        """Release what stays on the device between batches; the model is the trainer's."""
        forget(self.model)
