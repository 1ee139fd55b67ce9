"""A few sequences of a step: what the teacher computed for them, and which rows train how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from tutelage.config.method import ObjectiveConfig, needs_sampler
from tutelage.config.schema import Config
from tutelage.core import TeacherLogits, TokenStats
from tutelage.core.policy import Sampled
from tutelage.core.terms import Term
from tutelage.data.batch import Batch, collate, length_groups, pack, packed_groups
from tutelage.data.types import Rollout
from tutelage.models.alignment import AlignedReading
from tutelage.models.privileged import Reading, pad_id_of, require_same_rows
from tutelage.setup.objective import row_terms, uniform_terms
from tutelage.train.distributed import Ranks


@dataclass
class MicroBatch:
    """What one forward and backward pass works on."""

    batch: Batch
    """B sequences with N completion tokens, the rows."""
    update: int
    """Which of the step's updates it belongs to, from 0."""
    teacher_batch: Batch | None = None
    """The same N rows behind other prompts, where the teacher reads others; None: `batch`."""
    teacher_logits: TeacherLogits | None = None
    """The teacher's logits of the N rows, once its forward pass has run; None without one."""
    rows: Tensor | None = None
    """Rows to train on `[K]`, once they are selected."""
    stats: TokenStats | None = None
    """Statistics of the K rows before the step; None where every row trains with weight 1."""
    weights: Tensor | None = None
    """Loss weight of the K rows `[K]`; None with `stats`."""
    gate: Tensor | None = None
    """How far the forward KL of the K rows is switched on `[K]`; None with `stats`."""
    sampler_logprobs: Tensor | None = None
    """What the sampler gave the N sampled tokens, nats, where it had older weights than the step
    begins with `[N]`; sampled objectives clip against it."""
    terms: Sequence[tuple[Term, Tensor | float]] = field(default_factory=list)
    """Terms of the objective with their weights, `[K]` or one number each."""

    @property
    def read_by_teacher(self) -> Batch:
        """The sequences of the teacher's forward pass, whose rows are those of `batch`."""
        return self.batch if self.teacher_batch is None else self.teacher_batch

    @property
    def num_clipped(self) -> int:
        """Rows of the sampled objective whose clip took effect in the backward pass."""
        sampled = ((term, weight) for term, weight in self.terms if isinstance(term, Sampled))
        return sum(int((term.is_clipped & (weight != 0)).sum()) for term, weight in sampled)

    def train_on_all(self, objective: ObjectiveConfig) -> None:
        """Every row trains with the objective's own weights."""
        self.rows = torch.arange(self.batch.num_rows, device=self.batch.tokens.device)
        self.terms = uniform_terms(objective)

    def train_on(
        self,
        objective: ObjectiveConfig,
        rows: Tensor,
        stats: TokenStats,
        weights: Tensor,
        gate: Tensor,
    ) -> None:
        """The given rows train, each with its weight and gate, `[K]` each."""
        self.rows, self.stats, self.weights, self.gate = rows, stats, weights, gate
        sampler = self.sampler_logprobs if needs_sampler(objective) else None
        old = stats.log_p if sampler is None else sampler[rows].to(stats.log_p)
        self.terms = row_terms(objective, stats, self.batch.tokens[rows], old, weights, gate)

    def halves(self, objective: ObjectiveConfig) -> tuple[MicroBatch, MicroBatch]:
        """The same rows in two micro-batches; sums and their divisor are as before."""
        if self.rows is None:
            raise ValueError("a micro-batch is cut after the teacher's forward and the selection.")
        first, last = self.batch.halves()
        of_teacher: Sequence[Batch | None] = (None, None)
        if self.teacher_batch is not None:
            of_teacher = self.teacher_batch.halves()
        cut = first.num_rows
        halves = []
        for batch, read, start in zip((first, last), of_teacher, (0, cut), strict=True):
            stop = start + batch.num_rows
            half = MicroBatch(batch, self.update, read)
            if self.teacher_logits is not None:
                half.teacher_logits = self.teacher_logits[start:stop]
            if self.sampler_logprobs is not None:
                half.sampler_logprobs = self.sampler_logprobs[start:stop]
            here = (self.rows >= start) & (self.rows < stop)
            if self.stats is None or self.weights is None or self.gate is None:
                half.train_on_all(objective)
            else:
                chosen = (self.stats[here], self.weights[here], self.gate[here])
                half.train_on(objective, self.rows[here] - start, *chosen)
            halves.append(half)
        return halves[0], halves[1]


def pack_rollouts(
    config: Config,
    rollouts: Sequence[Rollout],
    completions: Sequence[int],
    pad_id: int,
    ranks: Ranks,
    device: torch.device,
    read_by_teacher: Sequence[Rollout] | None = None,
    reading: Reading | None = None,
) -> list[MicroBatch]:
    """Micro-batches of every update of a step, as many of each teacher in every process.

    Args:
        config: sizes, number of updates, padded or packed.
        rollouts: this process's, an update's side by side.
        completions: the step's index of each of them.
        pad_id: fills padded rows.
        ranks: agree on the number of micro-batches.
        device: of the result.
        read_by_teacher: the same completions behind the prompts that the teacher reads, one for
            each rollout; None where those are the rollouts' own.
        reading: what made them, if anything did.

    Raises:
        RunError: the teacher would read other tokens than those that are to be learned.
    """
    num_updates, is_packed = config.updates_per_step, config.micro_batches == "packed"
    group_by = packed_groups if is_packed else length_groups
    lengths = [_length(r) for r in rollouts]
    if read_by_teacher is not None:
        longer = zip(lengths, map(_length, read_by_teacher), strict=True)
        lengths = [max(pair) for pair in longer]
    bounds = [len(rollouts) * u // num_updates for u in range(num_updates + 1)]
    teachers = ("", *config.teachers)

    def groups(update: int, teacher: str, at_least: int) -> list[list[int]]:
        limits = (config.micro_batch_tokens, config.micro_batch_size, at_least)
        here = range(bounds[update], bounds[update + 1])
        members = [i for i in here if rollouts[i].prompt.teacher == teacher]
        found = group_by([lengths[i] for i in members], *limits) if members else []
        return [[members[i] for i in group] for group in found]

    def batch_of(group: list[int], of: Sequence[Rollout]) -> Batch:
        members, named = [of[i] for i in group], [completions[i] for i in group]
        pad = pad_id if of is rollouts else pad_id_of(reading, pad_id)
        return pack(members, named) if is_packed else collate(members, pad, completions=named)

    def micro_batch(group: list[int], update: int) -> MicroBatch:
        batch, read = batch_of(group, rollouts), None
        if read_by_teacher is not None:
            read = batch_of(group, read_by_teacher)
            require_same_rows(batch, read, not isinstance(reading, AlignedReading))
            read = read.to(device)
        return MicroBatch(batch.to(device), update, read)

    kinds = list(product(range(num_updates), teachers))
    counts = ranks.max([len(groups(*kind, 1)) for kind in kinds])
    return [
        micro_batch(group, update)
        for (update, teacher), count in zip(kinds, counts, strict=True)
        for group in groups(update, teacher, int(count))
    ]


def _length(rollout: Rollout) -> int:
    return len(rollout.prompt_ids) + len(rollout.completion_ids)
