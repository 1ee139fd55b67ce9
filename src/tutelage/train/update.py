"""The updates of a step: backward passes over micro-batches, one division, one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from tutelage.config.schema import Config
from tutelage.core import LazyLogits, Objective, TokenStats
from tutelage.data.batch import Batch
from tutelage.data.types import Rollout
from tutelage.errors import RunError
from tutelage.models.device import give_back
from tutelage.setup.components import Components, trained_names
from tutelage.setup.objective import needed_extras, needs_scoring, scores_teacher
from tutelage.train.distributed import Ranks
from tutelage.train.micro_batch import Attempt, Portion, halves_of, portions_of
from tutelage.train.selection import Lesson, Plan, divisors
from tutelage.train.signals import Stop


@dataclass(frozen=True)
class Ready:
    """All that a step knows before its first update."""

    rollouts: list[Rollout]
    updates: list[list[Batch]]
    """Micro-batches of each update."""
    views: list[LazyLogits]
    """The teacher's logits of every micro-batch."""
    plan: Plan | None
    """None where every token teaches and no pass of scoring is needed."""
    engine: dict[str, float]
    hidden_gap: float | None


@dataclass(frozen=True)
class Learned:
    """What the updates of a step did."""

    loss: float | None
    """Sum of the objective over all processes by the sum of divisors, of the updates that were
    applied, nats; None if none was."""
    grad_norm: float | None
    """The largest of the updates'."""
    batches: Sequence[Batch]
    """Micro-batches as they were learned from, some cut in two."""
    lessons: Sequence[Lesson]
    stats: TokenStats
    """Statistics of the rows as they were learned from."""
    nonfinite: Sequence[str]
    """What was infinite or NaN in the updates that were skipped."""
    num_skipped: int
    """Updates that were skipped."""
    num_splits: int
    """Micro-batches cut in two for want of memory."""


class Learner:
    """Turns what a step is ready to learn into new weights."""

    def __init__(
        self,
        config: Config,
        components: Components,
        ranks: Ranks,
        student: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        stop: Stop,
    ) -> None:
        self.config = config
        self.components = components
        self.ranks = ranks
        self.student = student
        self.optimizer = optimizer
        self.stop = stop

    def learn(self, ready: Ready, step: int) -> Learned:
        """The updates of a step, each from its own micro-batches and divided by its own number."""
        batches = [batch for update in ready.updates for batch in update]
        if ready.plan is None:
            counts = [self.ranks.sum(sum(b.num_rows for b in u)) for u in ready.updates]
        else:
            counts = divisors(self.config, ready.plan, self._completions_per_update(batches))
        portions = portions_of(self.config, batches, ready.views, ready.plan)
        attempts: list[Attempt] = []
        applied: list[tuple[float, int, float]] = []
        nonfinite: list[list[str]] = []
        start = 0
        for number, (update, divisor) in enumerate(zip(ready.updates, counts, strict=True)):
            here = portions[start : start + len(update)]
            start += len(update)
            # Until the first update a signal may end the step; after it the step must be finished.
            with nullcontext() if number else self.stop.interruptible():
                attempts.append(self._back_propagate(here, divisor, step))
            total, norm, names = self._update(attempts[-1].total)
            if names:
                nonfinite.append(names)
            else:
                applied.append((total, divisor, norm))
        learned = [portion for attempt in attempts for portion in attempt.portions]
        return Learned(
            sum(a[0] for a in applied) / max(sum(a[1] for a in applied), 1) if applied else None,
            max((a[2] for a in applied), default=None),
            [portion.batch for portion in learned],
            [portion.lesson for portion in learned],
            TokenStats.cat([stats for attempt in attempts for stats in attempt.stats]),
            sorted({name for names in nonfinite for name in names}),
            len(nonfinite),
            sum(attempt.num_splits for attempt in attempts),
        )

    def _completions_per_update(self, batches: Sequence[Batch]) -> int:
        num_local = sum(batch.num_sequences for batch in batches)
        return num_local * self.ranks.count // self.config.updates_per_step

    def _back_propagate(self, portions: Sequence[Portion], divisor: int, step: int) -> Attempt:
        """Back-propagate every micro-batch; those that memory does not hold are cut in two."""
        portions, num_splits = list(portions), 0
        while True:
            attempt = self._attempt(portions, divisor, num_splits)
            if attempt.too_large is None:
                return attempt
            # What was summed so far includes part of the one that failed.
            self.optimizer.zero_grad()
            self.components.student.zero_grad()
            if self.ranks.accelerator.device.type == "cuda":
                torch.cuda.empty_cache()
            place = attempt.too_large
            if self.ranks.count > 1 or portions[place].batch.num_sequences < 2:
                raise RunError(
                    f"step {step} ran out of memory while it learned from "
                    f"{portions[place].batch.input_ids.numel()} tokens. Lower micro_batch_tokens; "
                    "`tutelage check` shows what memory goes to."
                )
            portions[place : place + 1] = halves_of(self.config, portions[place])
            num_splits += 1

    def _attempt(self, portions: Sequence[Portion], divisor: int, num_splits: int) -> Attempt:
        scale = 1 / max(divisor, 1)
        is_scored = needs_scoring(self.config) and scores_teacher(self.config)
        extras = () if is_scored else needed_extras(self.config)
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.accelerator.device)
        stats: list[TokenStats] = []
        for i, portion in enumerate(portions):
            batch, lesson = portion.batch, portion.lesson
            try:
                teacher = self.components.teacher.view(portion.view)
                objective = self.student(batch, teacher, lesson.rows, lesson.terms, extras)
                (objective.total * scale).backward()
                self.components.masters.collect()
            except torch.OutOfMemoryError:
                return Attempt(portions, total, stats, num_splits, too_large=i)
            total = total + objective.total.detach()
            stats.append(_as_stats(objective))
        return Attempt(portions, total, stats, num_splits)

    def _update(self, local_total: Tensor) -> tuple[float, float, list[str]]:
        """Sum objective and gradient over processes and apply the gradient; or drop it.

        The device is asked for both numbers at once, and here only.

        Args:
            local_total: sum of the objective over this process's rows.

        Returns:
            The sum of the objective, the norm of the gradient, and what was not finite.
        """
        masters = self.components.masters.masters
        self.ranks.add_gradients(masters)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        limit = self.config.optimizer.max_grad_norm
        found = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        total, norm = torch.stack((local_total, found.to(local_total))).tolist()
        total = self.ranks.sum(total)
        if not (math.isfinite(norm) and math.isfinite(total)):
            named = zip(
                trained_names(self.components.student),
                (master.grad for master in masters),
                strict=True,
            )
            bad = [n for n, g in named if g is not None and not bool(torch.isfinite(g).all())]
            self.optimizer.zero_grad()
            part = "the loss" if math.isfinite(norm) else "the norm of the gradient"
            return total, norm, bad or [part]
        if 0 < limit < norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, found)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.components.teacher.mode == "reload" or self.config.optimizer.state_is_on_disk:
            give_back()  # to the teacher, which reads next
        return total, norm, []


def _as_stats(objective: Objective) -> TokenStats:
    """Statistics of the rows an objective saw; the sampled token's log-probability is unknown."""
    unknown = torch.zeros_like(objective.entropy)
    return TokenStats(
        objective.entropy,
        objective.teacher_entropy,
        objective.reverse_kl,
        objective.forward_kl,
        unknown,
        unknown,
        objective.extras,
    )
