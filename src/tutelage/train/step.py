"""One step: the student writes, the teacher reads, kept tokens teach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tutelage.config.method import PacedWeighting, RewardWeighting
from tutelage.config.schema import Config
from tutelage.core import LazyLogits, TokenSelection, TokenStats
from tutelage.data.batch import Batch, collate, length_groups, pack, packed_groups
from tutelage.data.types import Rollout
from tutelage.errors import RunError
from tutelage.evaluation.evaluate import grade_rollouts
from tutelage.models.lora import learning
from tutelage.models.tokenizers import pad_id
from tutelage.rollout.request import RolloutRequest, Rollouts, earlier_samples
from tutelage.setup.components import Components
from tutelage.setup.objective import (
    culprit,
    gate_of,
    needed_extras,
    needs_scoring,
    row_weights,
    scores_teacher,
)
from tutelage.train.clock import Clock
from tutelage.train.distributed import Gathered, Ranks
from tutelage.train.logprob_check import engine_gap
from tutelage.train.metrics import clip_share, token_metrics
from tutelage.train.selection import Plan, choose
from tutelage.train.signals import Stop
from tutelage.train.update import Learned, Learner, Ready

_DROPOUT_SEED = 2
"""Keeps the random numbers of dropout apart from those of sampling and selection."""


class Step:
    """Takes steps with one set of models, optimizer and configuration."""

    def __init__(
        self,
        config: Config,
        components: Components,
        accelerator: Accelerator,
        student: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        stop: Stop | None = None,
    ) -> None:
        self.stop = Stop() if stop is None else stop  # one that is not set yet counts as false
        self.config = config
        self.components = components
        self.accelerator = accelerator
        self.ranks = Ranks(accelerator)
        self.student = student
        self.optimizer = optimizer
        self.learner = Learner(config, components, self.ranks, student, optimizer, self.stop)
        self.pad_id = pad_id(components.tokenizer, components.student.vocab_size)
        self.rollouts: list[Rollout] = []
        """This process's rollouts of the last step."""

    def take(self, step: int) -> dict[str, Any]:
        """Perform step `step` (from 1), one update or several, and return its metrics.

        An update whose loss or gradient is not finite is left out: weights and moments stay.

        Raises:
            StoppedError: a signal came before the first update; nothing changed.
            RunError: no token has finite statistics.
        """
        clock = Clock(self.accelerator.device)
        with self.stop.interruptible():
            ready = self._prepare(step, clock)
        seed = (self.config.seed, step, _DROPOUT_SEED)
        with clock.phase("learn"), learning(self.components.student.model, seed):
            learned = self.learner.learn(ready, step)
        plan, rollouts = ready.plan, ready.rollouts
        self.rollouts = rollouts
        if plan is None:  # every token was learned from, so all statistics are known now
            plan = self._plan_of(self.ranks.rows(learned.batches, learned.stats), rollouts, step)
        num_clipped = self.ranks.sum(sum(lesson.num_clipped for lesson in learned.lessons))
        return {
            "step": step,
            "loss": learned.loss,
            "grad_norm": learned.grad_norm,
            "num_skipped_updates": learned.num_skipped,
            **({"nonfinite": list(learned.nonfinite)} if learned.num_skipped else {}),
            "num_memory_splits": learned.num_splits,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "clip_share": clip_share(self.config, num_clipped, len(plan.chosen.rows)),
            "max_relative_hidden_gap": ready.hidden_gap,
            **ready.engine,
            **self._metrics(plan, rollouts, self._described(plan, learned)),
            "seconds": clock.seconds,
            **clock.memory,
        }

    def _prepare(self, step: int, clock: Clock) -> Ready:
        """What comes before the first update: rollouts, the teacher's reading, the plan."""
        with clock.phase("rollout"):
            drawn = self.write(step)
        rollouts = drawn.rollouts
        updates = self.cut(rollouts)
        batches = [batch for update in updates for batch in update]
        engine: dict[str, float] = {}
        if self.components.sampler.has_own_weights:
            with clock.phase("score"):
                said = dict(zip(self.share(len(rollouts)), rollouts, strict=True))
                distance = engine_gap(self.config, self.student, batches, said, step)
                engine["engine_logprob_gap_nats"] = distance
        teacher = self.components.teacher
        with clock.phase("teacher"), teacher.awake():
            views = [teacher.read(batch) for batch in batches]
        plan, gap = None, None
        if needs_scoring(self.config):
            with clock.phase("score"):
                known = self._known(batches, drawn)
                gap = self._verified_gap(batches, known, step)
                plan = self._plan(batches, views, known, rollouts, step)
        return Ready(rollouts, updates, views, plan, engine, gap)

    def write(self, step: int) -> Rollouts:
        """This process's share of the step's rollouts."""
        config = self.config
        prompts = self.components.task.prompts(step - 1, config.prompts_per_step, config.seed)
        earlier = earlier_samples(prompts, config.sampling.num_samples)
        share = self.share(len(prompts) // self.ranks.count)
        return self.components.sampler.sample(
            RolloutRequest(
                [prompts[i] for i in share],
                config.sampling,
                (config.seed, step),
                [earlier[i] for i in share],
                record_hidden=needs_scoring(config) and config.scoring == "recorded",
            )
        )

    def cut(self, rollouts: Sequence[Rollout]) -> list[list[Batch]]:
        """Micro-batches of each update, as many in every process."""
        config, num_updates = self.config, self.config.updates_per_step
        lengths = [len(r.prompt_ids) + len(r.completion_ids) for r in rollouts]
        names = self.share(len(rollouts))
        bounds = [len(rollouts) * u // num_updates for u in range(num_updates + 1)]
        is_packed = config.micro_batches == "packed"
        group_by = packed_groups if is_packed else length_groups

        def groups(u: int, at_least: int) -> list[list[int]]:
            limits = (config.micro_batch_tokens, config.micro_batch_size, at_least)
            found = group_by(lengths[bounds[u] : bounds[u + 1]], *limits)
            return [[bounds[u] + i for i in group] for group in found]

        def batch_of(group: list[int]) -> Batch:
            members, called = [rollouts[i] for i in group], [names[i] for i in group]
            batch = (
                pack(members, called)
                if is_packed
                else collate(members, self.pad_id, completions=called)
            )
            return batch.to(self.accelerator.device)

        counts = self.ranks.max([len(groups(u, 1)) for u in range(num_updates)])
        return [
            [batch_of(group) for group in groups(u, int(count))] for u, count in enumerate(counts)
        ]

    def choose(self, gathered: Gathered, step: int) -> TokenSelection:
        """The rows to train on, of all processes; the same answer in every process."""
        return choose(self.config, gathered, step)

    def share(self, count: int) -> list[int]:
        """Which of the step's items the `count` items of this process are.

        An update's items lie side by side, and each process has as many of them.
        """
        updates, (ranks, rank) = self.config.updates_per_step, (self.ranks.count, self.ranks.index)
        size = count // updates
        return [i + size * ((ranks - 1) * (i // size) + rank) for i in range(count)]

    def _known(self, batches: Sequence[Batch], drawn: Rollouts) -> list[Tensor | None]:
        """Each batch's hidden states from when its tokens were drawn `[N, D]`, if recorded.

        They are those of the weights about to be scored: nothing was updated since.
        """
        if drawn.hidden is None:
            return [None] * len(batches)
        of = dict(zip(self.share(len(drawn.rollouts)), drawn.hidden, strict=True))
        empty = drawn.hidden[0][:0]
        return [torch.cat([empty, *(of[name] for name in batch.names)]) for batch in batches]

    def _verified_gap(
        self, batches: Sequence[Batch], known: Sequence[Tensor | None], step: int
    ) -> float | None:
        """Largest error of the first micro-batch's recorded states; the first step's only.

        Raises:
            RunError: rounding does not explain it.
        """
        if step != 1 or known[0] is None:
            return None
        gap, limit = self.ranks.max(self.components.student.hidden_gap(batches[0], known[0]))
        if not gap <= limit:
            raise RunError(
                f"hidden states recorded while sampling differ from a fresh forward pass by "
                f"{gap:.3g}, more than rounding explains ({limit:.3g}). Use scoring = 'forward'."
            )
        return gap

    def _plan(
        self,
        batches: list[Batch],
        views: list[LazyLogits],
        known: Sequence[Tensor | None],
        rollouts: list[Rollout],
        step: int,
    ) -> Plan:
        reads_teacher = scores_teacher(self.config)
        extras = needed_extras(self.config) if reads_teacher else ()
        stats = []
        for batch, read, hidden in zip(batches, views, known, strict=True):
            view = self.components.teacher.view(read) if reads_teacher else None
            with torch.no_grad():
                stats.append(self.student(batch, view, extras=extras, hidden=hidden))
        return self._plan_of(self.ranks.rows(batches, TokenStats.cat(stats)), rollouts, step)

    def _plan_of(self, gathered: Gathered, rollouts: list[Rollout], step: int) -> Plan:
        stats = gathered.stats
        weights = row_weights(self.config, stats, gathered.completion, self._verdicts(rollouts))
        chosen = self.choose(gathered, step)
        if len(stats) and chosen.num_nonfinite == len(stats):
            raise RunError(
                f"the statistics of all {len(stats)} tokens of step {step} are not finite, so "
                f"{culprit(self.config, stats)} gives logits that are not numbers. Check its "
                "weights and dtype."
            )
        return Plan(gathered, chosen, weights, gate_of(self.config.objective, stats))

    def _verdicts(self, rollouts: list[Rollout]) -> list[bool | None]:
        """Verdict on every completion of the step; none where no weighting asks for them."""
        if not isinstance(self.config.weighting, PacedWeighting | RewardWeighting):
            return []
        local = grade_rollouts(self.components.task.grade, rollouts)
        codes = [-1 if verdict is None else int(verdict) for verdict in local]
        table = self.ranks.by_completion(codes, self.share(len(rollouts)))
        return [None if code < 0 else bool(code) for code in table]

    def _described(self, plan: Plan, learned: Learned) -> tuple[TokenStats, Tensor, Tensor]:
        """Statistics that the metrics describe, which of their rows were kept, and their gates.

        Where scoring left the teacher out, the kept rows are known from learning.
        """
        stats, rows = plan.gathered.stats, plan.chosen.rows
        if self.config.diagnostics == "all":
            return stats, plan.chosen.mask, plan.gate
        is_kept = torch.ones_like(rows, dtype=torch.bool)
        if stats.has_teacher:
            return stats[rows], is_kept, plan.gate[rows]
        kept = [lesson.rows for lesson in learned.lessons]
        stats = self.ranks.rows(learned.batches, learned.stats, kept).stats
        return stats, is_kept, gate_of(self.config.objective, stats)

    def _metrics(
        self, plan: Plan, rollouts: list[Rollout], described: tuple[TokenStats, Tensor, Tensor]
    ) -> dict[str, Any]:
        count = max(self.ranks.sum(len(rollouts)), 1)
        distinct = len({(r.prompt.id, r.completion_ids) for r in rollouts})
        return {
            "num_rows": len(plan.gathered.stats),
            "num_kept": len(plan.chosen.rows),
            **token_metrics(*described, self.config),
            "completion_length_mean": len(plan.gathered.stats) / count,
            "truncated_share": self.ranks.sum(sum(r.is_truncated for r in rollouts)) / count,
            "duplicate_share": 1 - self.ranks.sum(distinct) / count,
        }
