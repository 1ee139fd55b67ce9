"""Who writes the completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tutelage.config.sampling import SamplingConfig
from tutelage.data.types import Prompt
from tutelage.rollout.cuda.generate import forget
from tutelage.rollout.generate import draw_rollouts
from tutelage.rollout.request import Drawn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Sampler(Protocol):
    """Draws completions from the student as it is at that moment."""

    has_own_weights: bool
    """Whether it holds weights of its own, which have to be proven; without hidden states."""

    def draw(
        self,
        prompts: Sequence[Prompt],
        config: SamplingConfig,
        seed: tuple[int, ...],
        first_sample: Sequence[int] | None = None,
        record: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Drawn:
        """Completions of the prompts; arguments and result as in `draw_rollouts`."""

    def close(self) -> None:
        """Give back what the engine holds; it draws no more."""


@dataclass
class TransformersSampler:
    """Draws from the student itself; nothing has to be copied."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    """Completions decoded at the same time."""
    enable_thinking: bool | None = None
    has_own_weights: bool = False

    def draw(
        self,
        prompts: Sequence[Prompt],
        config: SamplingConfig,
        seed: tuple[int, ...],
        first_sample: Sequence[int] | None = None,
        record: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Drawn:
        """Completions of the prompts."""
        return draw_rollouts(
            self.model,
            self.tokenizer,
            prompts,
            config,
            seed,
            self.batch_size,
            progress,
            enable_thinking=self.enable_thinking,
            first_sample=first_sample,
            record=record,
        )

    def close(self) -> None:
        """Give back what draws keep on the device; the model is the trainer's."""
        forget(self.model)
