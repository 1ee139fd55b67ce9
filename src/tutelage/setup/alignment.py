"""What student and teacher share where their tokenizers differ, checked at the start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tutelage.config.schema import Config
from tutelage.core.shared_ids import SharedIds
from tutelage.data.types import Prompt
from tutelage.errors import ModelError
from tutelage.models.alignment import AlignedReading, Aligner, shared_pairs
from tutelage.models.privileged import Reading
from tutelage.models.stop_class import stop_class
from tutelage.models.tokenizers import (
    pad_id,
    shared_vocabulary,
    stop_ids,
    vocabulary_size,
)
from tutelage.setup.inputs import Inputs, is_aligned, privileged_reading, thinking

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_SHARED = 0.1
"""Share of the student's ids that the teacher has too, below which a run is refused."""
LEAST_ALIGNED = 0.3
"""The same of the tokens of its prompts that are one token of the teacher's."""
_NUM_TEXTS = 32


def compared_sizes(config: Config, inputs: Inputs, rows: Sequence[int]) -> tuple[int, int]:
    """Ids of student and teacher that are compared: equally many unless they are aligned.

    Args:
        config: the run.
        inputs: the tokenizers.
        rows: of both heads.
    """
    both = (inputs.tokenizer, inputs.teacher_tokenizer)
    if not is_aligned(config):
        size = shared_vocabulary(*both, rows[0], rows[1])
        return size, size
    sizes = [min(vocabulary_size(one), count) for one, count in zip(both, rows, strict=True)]
    return sizes[0], sizes[1]


@dataclass(frozen=True)
class Compared:
    """What student and teacher are compared over."""

    stops: tuple[int, ...] = ()
    """Ids that count as one."""
    shared: SharedIds | None = None
    """What two vocabularies share; None for one."""
    reading: Reading | None = None
    """What the teacher reads; None where that is what the student does."""


def compared_ids(
    config: Config,
    inputs: Inputs,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    sizes: tuple[int, int],
) -> Compared:
    """What both sides are compared over.

    Args:
        config: the run.
        inputs: the tokenizers and the task.
        student: its model.
        teacher: its model; None where only its hidden states are here.
        sizes: from `compared_sizes`.

    Raises:
        ModelError: they share too little, or a side has no id that ends a text.
    """
    if teacher is not None and is_aligned(config):
        return Compared((), *aligned_reading(config, inputs, student, teacher, sizes))
    stops: tuple[int, ...] = ()
    if teacher is not None and config.teacher.stop_token == "class":
        sides = (student, inputs.tokenizer), (teacher, inputs.teacher_tokenizer)
        stops = stop_class(*sides, sizes[0])
    return Compared(stops, None, privileged_reading(config, inputs.tokenizer))


def aligned_reading(
    config: Config,
    inputs: Inputs,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    sizes: tuple[int, int],
) -> tuple[SharedIds, AlignedReading]:
    """What both sides share, and how the teacher reads completions.

    Raises:
        ModelError: they share too little.
    """
    ours, theirs = inputs.tokenizer, inputs.teacher_tokenizer
    pairs = shared_pairs(ours, theirs, sizes)
    stops = [
        frozenset(i for i in stop_ids(model, tokenizer) if i < size)
        for model, tokenizer, size in zip((student, teacher), (ours, theirs), sizes, strict=True)
    ]
    share = len(pairs) / sizes[0]
    if share < LEAST_SHARED or not all(stops):
        raise ModelError(
            f"teacher.vocabulary = 'aligned' needs shared tokens, {LEAST_SHARED:.0%} of the "
            f"student's ids or more, and ids that end a text on both sides, got {share:.1%} and "
            f"{len(stops[0])} and {len(stops[1])} such ids. Choose models with closer tokenizers."
        )
    shared = SharedIds.of(pairs, sizes, (sorted(stops[0]), sorted(stops[1])))
    reading = AlignedReading(
        Aligner(ours, theirs, (stops[0], stops[1])), pad_id(theirs, sizes[1]), thinking(config.data)
    )
    found = aligned_share(reading.aligner, inputs.task.prompts(0, _NUM_TEXTS, config.seed))
    if found < LEAST_ALIGNED:
        raise ModelError(
            f"only {found:.1%} of the tokens of the prompts are one token of the teacher's, less "
            f"than {LEAST_ALIGNED:.0%}: too few would be trained on. Choose models with closer "
            "tokenizers."
        )
    return shared, reading


def aligned_share(aligner: Aligner, prompts: list[Prompt]) -> float:
    """Share of the tokens of some prompts' texts that are aligned; 1 without tokens."""
    texts = [
        text
        for prompt in prompts
        for text in (
            [prompt.content]
            if isinstance(prompt.content, str)
            else [message["content"] for message in prompt.content]
        )
    ]
    masks = [aligner(aligner.encode(text, 0), (False, False)).of_student for text in texts]
    return sum(map(sum, masks)) / max(1, sum(map(len, masks))) if any(masks) else 1.0
