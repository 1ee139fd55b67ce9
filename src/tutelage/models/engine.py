"""Who writes the completions, and the proof that they come from the student's present weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from tutelage.data.types import Prompt
from tutelage.models.draw import SamplingConfig
from tutelage.models.jobs import Drawn
from tutelage.models.sampling import draw_rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Sampler(Protocol):
    """Draws completions from the student as it is at that moment."""

    is_remote: bool
    """Whether it holds weights of its own, which have to be proven; without hidden states."""

    def draw(
        self,
        prompts: Sequence[Prompt],
        config: SamplingConfig,
        seed: tuple[int, ...],
        first_sample: Sequence[int] | None = None,
        record: bool = False,
    ) -> Drawn:
        """Completions of the prompts; arguments and result as in `draw_rollouts`."""


@dataclass
class TransformersSampler:
    """Draws from the student itself; nothing has to be copied."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    """Completions decoded at the same time."""
    enable_thinking: bool | None = None
    is_remote: bool = False

    def draw(
        self,
        prompts: Sequence[Prompt],
        config: SamplingConfig,
        seed: tuple[int, ...],
        first_sample: Sequence[int] | None = None,
        record: bool = False,
    ) -> Drawn:
        """Completions of the prompts."""
        return draw_rollouts(
            self.model,
            self.tokenizer,
            prompts,
            config,
            seed,
            self.batch_size,
            enable_thinking=self.enable_thinking,
            first_sample=first_sample,
            record=record,
        )


def default_gap(dtype: torch.dtype) -> float:
    """Mean gap in nats at which two engines no longer hold the same weights, for a model's dtype.

    One model in two engines differs by 2e-7 in float32 on a CPU (measured); half precision rounds
    a logit of 16 to within 1/16. A random model differs by whole nats.
    """
    return 1e-3 if dtype == torch.float32 else 5e-2
