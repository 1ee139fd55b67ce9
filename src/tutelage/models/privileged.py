"""What a teacher reads that knows more than the student: other prompts, the same completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import torch

from tutelage.data.batch import Batch, collate
from tutelage.data.privileged import privileged
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import RunError
from tutelage.models.alignment import AlignedReading
from tutelage.models.tokenizers import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PrivilegedReading:
    """Puts the prompts of a teacher in the place of the student's."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    """Over the fields of a prompt; see `privileged`."""
    names: tuple[str, ...]
    """Of the fields in the template."""
    enable_thinking: bool | None = None
    """Passed to the chat template when not None."""

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The ids that the teacher reads before a completion.

        Raises:
            DataError: the prompt lacks a field, or cannot be encoded.
        """
        told = privileged(prompt, self.template, self.names)
        return tuple(encode_prompt(self.tokenizer, told, self.enable_thinking))

    def rows(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """All of their tokens are rows."""
        return list(rollouts)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The same completions behind the teacher's prompts, in the same order."""
        known: dict[str, tuple[int, ...]] = {}
        for rollout in rollouts:
            if rollout.prompt.id not in known:
                known[rollout.prompt.id] = self.prompt_ids(rollout.prompt)
        return [replace(r, prompt_ids=known[r.prompt.id]) for r in rollouts]


Reading: TypeAlias = PrivilegedReading | AlignedReading
"""What a teacher reads in place of the student's sequences."""


def read_beside(
    batches: Sequence[Batch],
    rollouts: Sequence[Rollout],
    reading: Reading | None,
    pad_id: int,
) -> Iterator[Batch]:
    """What a teacher reads for each batch, with the same rows.

    Args:
        batches: of `rollouts` in their order; some at the end may have none.
        rollouts: of all batches.
        reading: the teacher's prompts; None where they are the student's.
        pad_id: fills padded rows.

    Raises:
        RunError: the rows are not the same.
    """
    if reading is None:
        yield from batches
        return
    start = 0
    for batch in batches:
        stop = min(start + batch.num_sequences, len(rollouts))
        if start == stop:
            yield batch
            continue
        names = range(start, stop)
        own_pad = pad_id_of(reading, pad_id)
        read = collate(reading(rollouts[start:stop]), own_pad, completions=names)
        require_same_rows(batch, read, has_same_ids=isinstance(reading, PrivilegedReading))
        yield read
        start = stop


def pad_id_of(reading: Reading | None, pad_id: int) -> int:
    """What fills padded rows of the teacher's batches, where `pad_id` fills the student's."""
    return reading.pad_id if isinstance(reading, AlignedReading) else pad_id


def require_same_rows(batch: Batch, read: Batch, has_same_ids: bool = True) -> None:
    """Refuse a batch for the teacher whose rows are not, token by token, those of the student's.

    Args:
        batch: what the student learns from.
        read: what the teacher reads.
        has_same_ids: False for a teacher with another tokenizer, whose rows have ids of their own.

    Raises:
        RunError: a row differs in its token, its completion or its place there.
    """
    for name in ("tokens", "completion", "position")[not has_same_ids :]:
        ours, theirs = vars(batch)[name], vars(read)[name]
        if ours.shape != theirs.shape or not torch.equal(ours, theirs):
            where = "their number"
            if ours.shape == theirs.shape:
                where = f"row {int((ours != theirs).nonzero()[0])}"
            raise RunError(
                f"the teacher would be given {read.num_rows} rows that differ in {name} from the "
                f"{batch.num_rows} that the student is trained on, at {where}. The completion "
                "behind both prompts has to be the same."
            )
