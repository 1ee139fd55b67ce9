"""The updates of a step: forward and backward passes, one division, clip, optimizer step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from tutelage.config.schema import Config
from tutelage.core import Objective, TokenStats
from tutelage.errors import RunError
from tutelage.models.device import give_back
from tutelage.models.sharding import norm_over_parts
from tutelage.models.student import trained_names
from tutelage.rollout.sampler import TransformersSampler
from tutelage.setup.components import Components
from tutelage.setup.objective import (
    needed_extras,
    needs_scoring,
    needs_teacher,
    scores_teacher,
)
from tutelage.train.distributed import Ranks
from tutelage.train.micro_batch import MicroBatch
from tutelage.train.selection import Selection, assign, divisors
from tutelage.train.signals import Stop


@dataclass(frozen=True)
class UpdateResult:
    """What the updates of a step did."""

    loss: float | None
    """Sum of the objective over all processes by the sum of divisors, of the updates that were
    applied, nats; None if none was."""
    grad_norm: float | None
    """The largest of the updates that were applied; None if none was."""
    micro_batches: Sequence[MicroBatch]
    """As they were trained on, some cut in two."""
    stats: TokenStats
    """Statistics of the rows in the forward passes that trained on them."""
    nonfinite: Sequence[str]
    """What was infinite or NaN in the updates that were skipped."""
    num_skipped: int
    """Updates that were skipped."""
    num_splits: int
    """Micro-batches cut in two for want of memory."""


def require_one_student(components: Components) -> None:
    """Masters, whose gradients an update clears, and sampler have to be the student's own.

    Raises:
        ValueError: they are of another one, such as that of which it is a copy.
    """
    own = {id(weight) for weight in components.student.parameters()}
    if any(id(weight) not in own for weight in components.masters.weights):
        raise ValueError("the masters are of another student: use masters_of(config, student)")
    sampler = components.sampler
    if isinstance(sampler, TransformersSampler) and sampler.model is not components.student.plain:
        raise ValueError("the sampler samples from another student than the one that trains")


class Updater:
    """Applies the updates of a step to the student."""

    def __init__(
        self,
        config: Config,
        components: Components,
        ranks: Ranks,
        student: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        stop: Stop,
    ) -> None:
        require_one_student(components)
        self.config = config
        self.components = components
        self.ranks = ranks
        self.student = student
        self.optimizer = optimizer
        self.stop = stop

    def run(
        self, micro_batches: Sequence[MicroBatch], selection: Selection | None, step: int
    ) -> UpdateResult:
        """Each update from its own micro-batches, divided by its own number of rows."""
        assign(self.config, micro_batches, selection)
        num_updates = self.config.updates_per_step
        updates = [[m for m in micro_batches if m.update == u] for u in range(num_updates)]
        counts = divisors(self.config, updates, selection, self.ranks)
        stats: list[TokenStats] = []
        applied: list[tuple[float, int, float]] = []
        nonfinite: list[list[str]] = []
        num_splits = 0
        for number, (update, divisor) in enumerate(zip(updates, counts, strict=True)):
            # Until the first update a signal may end the step; after it the step must be finished.
            with nullcontext() if number else self.stop.interruptible():
                local_total, num = self._backward(update, divisor, step, stats)
            num_splits += num
            total, norm, names = self._apply(local_total)
            if names:
                nonfinite.append(names)
            else:
                applied.append((total, divisor, norm))
        return UpdateResult(
            sum(a[0] for a in applied) / max(sum(a[1] for a in applied), 1) if applied else None,
            max((a[2] for a in applied), default=None),
            [micro_batch for update in updates for micro_batch in update],
            TokenStats.cat(stats),
            sorted({name for names in nonfinite for name in names}),
            len(nonfinite),
            num_splits,
        )

    def _backward(
        self, update: list[MicroBatch], divisor: int, step: int, stats: list[TokenStats]
    ) -> tuple[Tensor, int]:
        """Sum the gradients of an update; a micro-batch that does not fit is cut in two.

        Args:
            update: its micro-batches; cut ones are replaced by their halves.
            divisor: of the sums.
            step: for the message.
            stats: the statistics of each micro-batch are appended.

        Returns:
            The sum of the objective over this process's rows, nats, a number on the device, and
            how many micro-batches were cut.
        """
        num_splits = 0
        while True:
            total = torch.zeros((), dtype=torch.float64, device=self.ranks.accelerator.device)
            found: list[TokenStats] = []
            too_large = None
            for place, micro_batch in enumerate(update):
                one = self._backward_one(micro_batch, 1 / max(divisor, 1))
                if one is None:
                    too_large = place
                    break
                total = total + one[0]
                found.append(one[1])
            if too_large is None:
                stats += found
                return total, num_splits
            self._split(update, too_large, step)
            num_splits += 1

    def _backward_one(
        self, micro_batch: MicroBatch, scale: float
    ) -> tuple[Tensor, TokenStats] | None:
        """Add a micro-batch's gradient: its objective and statistics, or None if too large."""
        is_scored = needs_scoring(self.config) and scores_teacher(self.config)
        extras = () if is_scored else needed_extras(self.config)
        logits = micro_batch.teacher_logits
        if logits is None and needs_teacher(self.config):
            raise ValueError("the teacher's forward pass comes before the updates.")
        try:
            teacher = None if logits is None else self.components.teacher.to_device(logits)
            rows, terms = micro_batch.rows, micro_batch.terms
            objective = self.student(micro_batch.batch, teacher, rows, terms, extras)
            (objective.total * scale).backward()
            self.components.masters.accumulate_grads()
        except torch.OutOfMemoryError:
            return None
        return objective.total.detach(), _as_stats(objective, teacher is not None)

    def _split(self, update: list[MicroBatch], place: int, step: int) -> None:
        """Cut a micro-batch that memory does not hold; the update begins anew.

        Raises:
            RunError: it is one sequence, or other processes count on as many micro-batches.
        """
        # What was summed so far includes part of the one that failed.
        self.components.masters.zero_grad()
        if self.ranks.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        batch = update[place].batch
        if self.ranks.count > 1 or batch.num_sequences < 2:
            raise RunError(
                f"step {step} ran out of memory while it trained on {batch.input_ids.numel()} "
                "tokens. Lower micro_batch_tokens; `tutelage check` shows what memory goes to."
            )
        update[place : place + 1] = update[place].halves(self.config.objective)

    def _apply(self, local_total: Tensor) -> tuple[float, float, list[str]]:
        """Sum objective and gradient over processes and apply the gradient; or drop it.

        The host waits for both numbers at once, and here only.

        Args:
            local_total: sum of the objective over this process's rows.

        Returns:
            The sum of the objective, the norm of the gradient, and what was not finite.
        """
        masters, student = self.components.masters, self.components.student
        if not student.is_sharded:  # its backward passes summed them
            self.ranks.add_gradients(masters.masters)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        limit = self.config.optimizer.max_grad_norm
        found = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if student.mesh is not None:
            found = norm_over_parts(found, student.mesh)
        total, norm = torch.stack((local_total, found.to(local_total))).tolist()
        total = self.ranks.sum(total)
        if not (math.isfinite(norm) and math.isfinite(total)):
            bad = self._nonfinite()
            masters.zero_grad()
            part = "the loss" if math.isfinite(norm) else "the norm of the gradient"
            return total, norm, bad or [part]
        if 0 < limit < norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, found)
        self.optimizer.step()
        masters.zero_grad()
        if self.components.teacher.mode == "reload" or self.config.optimizer.state_is_on_disk:
            give_back()  # to the teacher, whose forward comes next
        return total, norm, []

    def _nonfinite(self) -> list[str]:
        """Names of the weights whose gradient is not finite, in any process."""
        grads = [master.grad for master in self.components.masters.masters]
        flags = [float(g is not None and not bool(torch.isfinite(g).all())) for g in grads]
        names = trained_names(self.components.student)
        return [name for name, bad in zip(names, self.ranks.max(flags), strict=True) if bad]


def _as_stats(objective: Objective, has_teacher: bool) -> TokenStats:
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
        has_teacher,
    )
