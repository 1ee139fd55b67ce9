"""One step: generate, pack, teacher forward, select, update; then its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tutelage.config.sampling import VLLMServer
from tutelage.config.schema import Config
from tutelage.core import TokenSelection, TokenStats
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import RunError
from tutelage.models.alignment import AlignedReading
from tutelage.models.lora import learning
from tutelage.models.tokenizers import pad_id
from tutelage.rollout.replica_sampler import ReplicaSampler
from tutelage.rollout.request import RolloutRequest, earlier_samples
from tutelage.setup.components import Components, agent_of
from tutelage.setup.objective import (
    culprit,
    gate_of,
    graded_by,
    needed_extras,
    needs_scoring,
    needs_teacher,
    row_weights,
    scores_teacher,
    with_advantages,
)
from tutelage.train.ahead import Ahead, restored, saved_lines
from tutelage.train.clock import Clock
from tutelage.train.distributed import Ranks, StepRows
from tutelage.train.grades import Grades, GradeStep, grade_step
from tutelage.train.logprob_check import (
    engine_mismatch,
    hidden_mismatch,
    sampler_logprobs,
    staleness,
)
from tutelage.train.metrics import (
    clip_share,
    rollout_metrics,
    teacher_checks,
    teacher_metrics,
    token_metrics,
)
from tutelage.train.micro_batch import MicroBatch, pack_rollouts
from tutelage.train.selection import Selection, choose, selection_of
from tutelage.train.signals import Stop
from tutelage.train.stored.age import age_of, compare_with_sampler, has_older
from tutelage.train.stored.sources import source_of
from tutelage.train.stored.states import states_of
from tutelage.train.stored.store import Store
from tutelage.train.update import Updater, UpdateResult

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
        store: Store | None = None,
    ) -> None:
        self.stop = Stop() if stop is None else stop  # one that is not set yet counts as false
        self.config = config
        self.components = components
        self.device = accelerator.device
        self.ranks = Ranks(accelerator)
        self.student = student
        self.optimizer = optimizer
        self.updater = Updater(config, components, self.ranks, student, optimizer, self.stop)
        self.pad_id = pad_id(components.tokenizer, components.student.vocab_size)
        self.rollouts: list[Rollout] = []
        """This process's rollouts of the last step."""
        self.clock = Clock(self.device)
        self.ahead = self._ahead()
        """Draws a step ahead; None where rollouts are the present student's."""
        self.states = states_of(self, store)
        """What is stored of the teacher; None where it runs in every step."""
        self.source = source_of(self, store)
        """Gives the completions of the steps that are not drawn ahead."""
        self.checks: dict[str, float | None] = {}
        """What was measured to trust the step's rollouts, by the key of its metric."""
        self.grade: GradeStep = grade_step
        self.grades: Grades | None = None
        """Of the step's completions, where the method needs them."""

    def _ahead(self) -> Ahead | None:
        engine, sampler = self.config.engine, self.components.sampler
        if not isinstance(sampler, ReplicaSampler) or not isinstance(engine, VLLMServer):
            return None
        if not engine.max_staleness:
            return None
        return Ahead(sampler, self.components.student, self.request, self.config.num_steps)

    def take(self, step: int) -> dict[str, Any]:
        """Take step `step` (from 1), with one update or several, and return its metrics.

        An update whose loss or gradient is not finite is skipped: weights and moments stay.

        Raises:
            StoppedError: a signal came before the first update; nothing changed.
            RunError: no token has finite statistics.
        """
        self.clock, self.checks, self.grades = Clock(self.device), {}, None
        with self.stop.interruptible():
            rollouts = self.generate(step)
            learned = self.learned(rollouts)
            micro_batches = self.pack(learned, step)
            self.teacher_forward(micro_batches)
            selection = self.select(micro_batches, learned, step)
            rollouts = [replace(rollout, hidden=None) for rollout in rollouts]  # their memory goes
        result = self.update(micro_batches, selection, step)
        self.rollouts = rollouts
        return self.metrics(result, selection, rollouts, step)

    # --- the five verbs ---------------------------------------------------------------------------

    def generate(self, step: int) -> list[Rollout]:
        """The student samples this process's share of the step's completions."""
        with self.clock.phase("rollout"):
            return self.source.take(step) if self.ahead is None else self.ahead.take(step)

    def sample(self, request: RolloutRequest, step: int) -> list[Rollout]:
        """Completions by the student's present weights, those that a step begins with."""
        with self.components.whole():
            rollouts = self.components.sampler.sample(request) if request.prompts else []
        return [replace(rollout, weights_version=step - 1) for rollout in rollouts]

    def learned(self, rollouts: Sequence[Rollout]) -> Sequence[Rollout]:
        """The rollouts with those of their tokens as rows that the teacher can be asked about."""
        reading = self.components.reading
        if not isinstance(reading, AlignedReading):
            return rollouts
        found = reading.rows(rollouts)
        counts = [self.ranks.sum(sum(len(r.generated_ids) for r in x)) for x in (found, rollouts)]
        self.checks["aligned_share"] = counts[0] / max(counts[1], 1)
        shared = self.components.student.shared
        if shared is not None:
            self.checks["shared_share"] = len(shared.pairs[0]) / shared.sizes[0]
        return found

    def pack(self, rollouts: Sequence[Rollout], step: int = 1) -> list[MicroBatch]:
        """Micro-batches of each update, as many in every process.

        Args:
            rollouts: this process's.
            step: that learns from them; those that older weights sampled have log-probabilities.
        """
        completions, reading = self.share(len(rollouts)), self.components.reading
        read = None if reading is None else reading(rollouts)
        micro_batches = pack_rollouts(
            self.config, rollouts, completions, self.pad_id, self.ranks, self.device, read, reading
        )
        if self.ahead is not None or (has_older(self) and staleness(rollouts, step)):
            for micro_batch in micro_batches:
                logprobs = sampler_logprobs([micro_batch.batch], self.named(rollouts))
                micro_batch.sampler_logprobs = logprobs.to(self.device)
        return micro_batches

    def teacher_forward(self, micro_batches: Sequence[MicroBatch]) -> None:
        """The teacher's logits of every row, as hidden states; it may then leave the device.

        A method of rewards, or of the student, alone has no teacher forward.
        """
        if not needs_teacher(self.config):
            return
        with self.clock.phase("teacher"), self.components.teacher.on_device():
            for micro_batch in sorted(micro_batches, key=lambda m: m.batch.teacher):
                micro_batch.teacher_logits = self.components.teacher.forward(
                    micro_batch.read_by_teacher
                )

    def select(
        self, micro_batches: Sequence[MicroBatch], rollouts: Sequence[Rollout], step: int
    ) -> Selection | None:
        """Which rows train, how heavily; None where every row does and no statistics are needed."""
        age = age_of(self, rollouts, step)
        if self.components.sampler.has_own_weights and self.source.has_logprobs and not age:
            self._check_engine(micro_batches, rollouts, step)
        if not needs_scoring(self.config):
            compare_with_sampler(self, micro_batches[:1], rollouts, age)
            return None
        if graded_by(self.config):
            with self.clock.phase("grade"):
                share = self.share(len(rollouts))
                self.grades = self.grade(self.components.task, rollouts, share, self.ranks)
        with self.clock.phase("score"):
            recorded = self._recorded(micro_batches, rollouts)
            if step == 1 and recorded[0] is not None:
                found = hidden_mismatch(
                    self.components.student, micro_batches[0].batch, recorded[0], self.ranks
                )
                self.checks["max_relative_hidden_gap"] = found
            stats = self._score(micro_batches, recorded)
            compare_with_sampler(self, micro_batches, rollouts, age, stats.log_p)
            rows = self.ranks.rows([m.batch for m in micro_batches], stats)
            return self._selection(rows, step)

    def update(
        self, micro_batches: Sequence[MicroBatch], selection: Selection | None, step: int
    ) -> UpdateResult:
        """Backward passes, one division, clip and optimizer step of every update."""
        seed = (self.config.seed, step, _DROPOUT_SEED)
        with self.clock.phase("learn"), learning(self.components.student.model, seed):
            return self.updater.run(micro_batches, selection, step)

    # --- metrics ----------------------------------------------------------------------------------

    def metrics(
        self,
        result: UpdateResult,
        selection: Selection | None,
        rollouts: Sequence[Rollout],
        step: int,
    ) -> dict[str, Any]:
        """What is logged about the step; plain JSON values, the same in every process."""
        trained = result.micro_batches
        if selection is None:  # every row trained, so all statistics are known now
            rows = self.ranks.rows([m.batch for m in trained], result.stats)
            selection = self._selection(rows, step)
        num_clipped = self.ranks.sum(sum(m.num_clipped for m in trained))
        num_rows, num_kept = len(selection.stats), len(selection.rows)
        return {
            "step": step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "num_skipped_updates": result.num_skipped,
            **({"nonfinite": list(result.nonfinite)} if result.num_skipped else {}),
            "num_memory_splits": result.num_splits,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "clip_share": clip_share(self.config, num_clipped, num_kept),
            "max_relative_hidden_gap": None,
            **self.checks,
            **teacher_checks(self.config, self.components.teacher.checks(), trained, self.ranks),
            **({} if self.grades is None else self.grades.metrics(self.config)),
            "num_rows": num_rows,
            "num_kept": num_kept,
            **token_metrics(*self._described(selection, result), self.config),
            **rollout_metrics(rollouts, num_rows, self.ranks),
            **self._by_teacher(selection, step),
            "seconds": self.clock.seconds,
            **self.clock.memory,
        }

    # --- rollouts of other weights ----------------------------------------------------------------

    def saved_ahead(self, done: int) -> str:
        """What a checkpoint after `done` steps holds of the next one; "" where that is nothing.

        Raises:
            ModelError: its draw has failed.
        """
        rollouts = None if self.ahead is None else self.ahead.known(done + 1)
        if rollouts is None:
            return ""
        return saved_lines(self.ranks, rollouts, self.share(len(rollouts)))

    def restore_ahead(self, step: int, text: str) -> bool:
        """Let a step learn from what a checkpoint holds; whether that fits the configuration."""
        if self.ahead is None:
            return True
        rollouts = restored(text, self.prompts(step), self.config.sampling.num_samples)
        if rollouts is None:
            return False
        self.ahead.restore(
            step, [rollouts[i] for i in self.share(len(rollouts) // self.ranks.count)]
        )
        return True

    # --- what they need ---------------------------------------------------------------------------

    def request(self, step: int) -> RolloutRequest:
        """This process's share of the completions of a step."""
        config, prompts = self.config, self.prompts(step)
        earlier = earlier_samples(prompts, config.sampling.num_samples)
        share = self.share(len(prompts) // self.ranks.count)
        return RolloutRequest(
            [prompts[i] for i in share],
            config.sampling,
            (config.seed, step),
            [earlier[i] for i in share],
            record_hidden=needs_scoring(config) and config.scoring == "recorded",
            agent=agent_of(config, self.components.task),
        )

    def prompts(self, step: int) -> Sequence[Prompt]:
        """The prompts of a step, of all processes."""
        config = self.config
        return self.components.task.prompts(step - 1, config.prompts_per_step, config.seed)

    def named(self, rollouts: Sequence[Rollout]) -> dict[int, Rollout]:
        """Rollouts by the names that batches give them."""
        return dict(zip(self.share(len(rollouts)), rollouts, strict=True))

    def share(self, count: int) -> list[int]:
        """Which of the step's items the `count` items of this process are.

        An update's items lie side by side, and each process has as many of them.
        """
        updates, (ranks, rank) = self.config.updates_per_step, (self.ranks.count, self.ranks.index)
        size = count // updates
        return [i + size * ((ranks - 1) * (i // size) + rank) for i in range(count)]

    def _check_engine(
        self, micro_batches: Sequence[MicroBatch], rollouts: Sequence[Rollout], step: int
    ) -> None:
        """Whether an engine with weights of its own has the student's."""
        with self.clock.phase("score"):
            named = self.named(rollouts)
            batches = [micro_batch.batch for micro_batch in micro_batches]
            found = engine_mismatch(self.config, self.student, batches, named, step, self.ranks)
            self.checks["engine_logprob_gap_nats"] = found

    def choose(self, rows: StepRows, step: int) -> TokenSelection:
        """The rows to train on, of all processes; the same answer in every process."""
        return choose(self.config, rows, step, self.components.stops)

    def _recorded(
        self, micro_batches: Sequence[MicroBatch], rollouts: Sequence[Rollout]
    ) -> list[Tensor | None]:
        """Each micro-batch's hidden states from sampling `[N, D]`, if they were recorded.

        They are those of the weights about to be scored: nothing was updated since.
        """
        hidden = [r.hidden for r in rollouts if r.hidden is not None]
        if not hidden:
            return [None] * len(micro_batches)
        of = dict(zip(self.share(len(rollouts)), hidden, strict=True))
        empty = hidden[0][:0]
        return [torch.cat([empty, *(of[name] for name in m.batch.names)]) for m in micro_batches]

    def _score(
        self, micro_batches: Sequence[MicroBatch], known: Sequence[Tensor | None]
    ) -> TokenStats:
        """Statistics of this process's rows, before the first update."""
        uses_teacher = scores_teacher(self.config)
        extras = needed_extras(self.config) if uses_teacher else ()
        stats = []
        for micro_batch, hidden in zip(micro_batches, known, strict=True):
            logits = micro_batch.teacher_logits if uses_teacher else None
            teacher = None if logits is None else self.components.teacher.to_device(logits)
            with torch.no_grad():
                stats.append(self.student(micro_batch.batch, teacher, extras=extras, hidden=hidden))
        return TokenStats.cat(stats)

    def _selection(self, rows: StepRows, step: int) -> Selection:
        verdicts, rewards = (
            ((), ()) if self.grades is None else (self.grades.verdicts, self.grades.rewards)
        )
        weights = row_weights(self.config, rows.stats, rows.completion, verdicts)
        chosen = self.choose(rows, step)
        stats = with_advantages(self.config, rows.stats, rows.completion, rewards, chosen.rows)
        if len(stats) and chosen.num_nonfinite == len(stats):
            raise RunError(
                f"the statistics of all {len(stats)} tokens of step {step} are not finite, so "
                f"{culprit(self.config, stats)} gives logits that are not numbers. Check its "
                "weights and dtype."
            )
        rows = replace(rows, stats=stats)
        return selection_of(self.config, rows, chosen, weights, step)

    def _by_teacher(self, selection: Selection, step: int) -> dict[str, Any]:
        if not self.config.teachers or self.config.diagnostics != "all":
            return {}
        samples = self.config.sampling.num_samples
        names = [prompt.teacher for prompt in self.prompts(step) for _ in range(samples)]
        return teacher_metrics(selection.stats, selection.completion, names)

    def _described(
        self, selection: Selection, result: UpdateResult
    ) -> tuple[TokenStats, Tensor, Tensor]:
        """Statistics that the metrics describe, which of their rows were kept, and their gates.

        Where scoring left the teacher out, the kept rows are known from the updates.
        """
        stats, rows = selection.stats, selection.rows
        if self.config.diagnostics == "all":
            return stats, selection.mask, selection.gate
        is_kept = torch.ones_like(rows, dtype=torch.bool)
        if stats.has_teacher:
            return stats[rows], is_kept, selection.gate[rows]
        trained = result.micro_batches
        kept = [m.rows for m in trained if m.rows is not None]
        stats = self.ranks.rows([m.batch for m in trained], result.stats, kept).stats
        return stats, is_kept, gate_of(self.config.objective, stats)
