"""The few plain records that travel between tasks, models, training and evaluation."""

from __future__ import annotations

import math
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
    fields: tuple[tuple[str, str], ...] = ()
    """Names and texts of what a teacher reads beyond the prompt, where one asks for it."""
    teacher: str = ""
    """Name of the teacher that supervises it, where a run has several; "" for the first."""


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool as the model wrote it; not checked against the tool's schema."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    """Why the text is no call, for the model to read; "" for a call."""


@dataclass(frozen=True)
class Turn:
    """What the model generated before it gave the word to the environment."""

    text: str
    """Decoded without special tokens; thoughts and calls included."""
    calls: tuple[ToolCall, ...] = ()
    """The calls of tools in the text, in their order; none in a final answer."""


@dataclass(frozen=True)
class Outcome:
    """The environment's score of a conversation."""

    score: float
    """In [0, 1]; 1 for a conversation that did all that was asked."""
    is_success: bool
    details: dict[str, float | int | str] = field(default_factory=dict)
    """Other measures by name; plain JSON values."""

    def __post_init__(self) -> None:
        """Raises: ValueError: a value that the logs cannot hold."""
        _require_finite("the score", self.score, (float, int))
        for name, value in self.details.items():
            _require_finite(f"detail {name!r}", value, (float, int, str))


def _require_finite(name: str, value: object, kinds: tuple[type, ...]) -> None:
    is_finite = not isinstance(value, float) or math.isfinite(value)
    if not isinstance(value, kinds) or not is_finite:
        wanted = " or ".join(["a finite number", *(["a text"] if str in kinds else [])])
        raise ValueError(f"{name} of an outcome must be {wanted}, got {value!r:.60}")


@dataclass(frozen=True)
class Conversation:
    """The turns of a rollout, as messages, and how it ended."""

    messages: tuple[Message, ...]
    """Everything after the prompt: what the model generated (role assistant, decoded) and what the
    environment answered, in their order."""
    num_turns: int
    """Turns that the model generated."""
    num_tool_calls: int
    num_tool_errors: int
    """Calls that were answered with an error."""
    outcome: Outcome

    @property
    def transcript(self) -> str:
        """The messages as plain text: the role, the name of a tool, what was said."""
        return "\n".join(
            f"{' '.join(filter(None, (m['role'], m.get('name'))))}: {m['content']}"
            for m in self.messages
        )


@dataclass(frozen=True)
class Rollout:
    """One prompt and one sampled completion, as token ids (never re-tokenized).

    In a conversation the completion is everything after the prompt: ids that the model generated,
    and ids that were inserted between its turns. A server gives texts: then both have no ids.
    """

    prompt: Prompt
    sample: int
    """Index of this completion among the completions of its prompt, from 0."""
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """Sampled ids; the end-of-sequence id that stopped the completion is included and counts."""
    is_truncated: bool = False
    """True when a limit was reached before the model ended its completion or conversation."""
    logprobs: tuple[float, ...] = field(default=(), repr=False)
    """Log-probability in nats, under the sampler, of each generated id."""
    text: str = ""
    """Decoded completion without special tokens; of a conversation, the last turn."""
    thought: str = ""
    """The mark of a thought that the prompt ends with, such as ``<think>``; "" without one."""
    hidden: Tensor | None = field(default=None, repr=False, compare=False)
    """What the head multiplied when each generated id was sampled `[num ids, D]`, in the model's
    dtype and on its device. None unless recorded."""
    is_generated: tuple[bool, ...] = field(default=(), repr=False)
    """Whether the model sampled each completion id; the others were inserted between its turns and
    are never supervised. Empty where all were sampled."""
    conversation: Conversation | None = None
    """The turns and their score; None where the completion is a single answer."""
    num_reported_tokens: int | None = None
    """Length of the completion in tokens as a server without ids reports it, if it does."""
    replica: int | None = field(default=None, compare=False)
    """Which of several servers sampled it, from 0; None for no server, or several of them."""
    weights_version: int | None = None
    """Steps after which the student's weights were those that sampled it; None outside of steps."""

    @property
    def generated_ids(self) -> tuple[int, ...]:
        """The completion ids that the model sampled."""
        if not self.is_generated:
            return self.completion_ids
        pairs = zip(self.completion_ids, self.is_generated, strict=True)
        return tuple(token for token, is_generated in pairs if is_generated)

    @property
    def num_tokens(self) -> int | None:
        """Number of generated tokens, the end included; None where it is not known."""
        return len(self.generated_ids) or self.num_reported_tokens

    @property
    def transcript(self) -> str:
        """What a reader is shown: the text, or all messages of a conversation."""
        return self.text if self.conversation is None else self.conversation.transcript

    @property
    def graded_text(self) -> str:
        """What a grader reads: a thought that the prompt opened is a thought until it is closed."""
        return self.thought + self.text
