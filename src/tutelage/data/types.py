"""The few plain records that travel between tasks, models, training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Message: TypeAlias = dict[str, str]
"""One chat turn: {"role": "user", "content": "..."}."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as text or as chat messages, with the reference answer a grader needs."""

    id: str
    """Stable name of the prompt, unique within its source."""
    content: str | tuple[Message, ...]
    """Plain text, or chat messages that the tokenizer's chat template renders."""
    answer: str | None = None
    """Reference answer for grading; None when the prompt cannot be graded."""
    tools: tuple[dict[str, Any], ...] = ()
    """Descriptions of tools that the chat template renders."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What of its record was left out."""


@dataclass(frozen=True)
class Rollout:
    """One prompt and one sampled completion, as token ids (never re-tokenized).

    A server gives texts: then both have no ids.
    """

    prompt: Prompt
    sample: int
    """Index of this completion among the completions of its prompt, from 0."""
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """Sampled ids; the end-of-sequence id that stopped the completion is included and counts."""
    is_truncated: bool = False
    """True when max_new_tokens was reached before an end-of-sequence id."""
    logprobs: tuple[float, ...] = field(default=(), repr=False)
    """Log-probability in nats, under the sampler, of each completion id."""
    text: str = ""
    """Decoded completion without special tokens."""
    thought: str = ""
    """The mark of a thought that the prompt ends with, such as ``<think>``; "" without one."""
    hidden: Tensor | None = field(default=None, repr=False, compare=False)
    """What the head multiplied when each completion id was sampled `[num ids, D]`, in the model's
    dtype and on its device. None unless recorded."""
    num_reported_tokens: int | None = None
    """Length of the completion in tokens as a server without ids reports it, if it does."""

    @property
    def num_tokens(self) -> int | None:
        """Length of the completion in tokens, the end included; None where it is not known."""
        return len(self.completion_ids) or self.num_reported_tokens

    @property
    def graded_text(self) -> str:
        """What a grader reads: a thought that the prompt opened is a thought until it is closed."""
        return self.thought + self.text
