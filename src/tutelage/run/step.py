"""One optimizer update: the student writes, the teacher reads, kept tokens teach."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tutelage.core import (
    LazyLogits,
    Objective,
    TokenSelection,
    TokenStats,
    counter_uniform,
    select_tokens,
)
from tutelage.core.terms import Term
from tutelage.data.batch import Batch, micro_batches
from tutelage.data.types import Rollout
from tutelage.errors import RunError
from tutelage.models.sampling import sample
from tutelage.models.tokenizers import pad_id
from tutelage.run.config import Config
from tutelage.run.diagnostics import token_metrics
from tutelage.run.method import (
    FirstTokens,
    PacedWeighting,
    RewardWeighting,
    SampledTokens,
    SomeTokens,
)
from tutelage.run.recipe import (
    gate_of,
    guidance,
    guided_terms,
    needed_extras,
    needs_scoring,
    plain_terms,
    row_weights,
)
from tutelage.run.setup import Parts

_SELECTION_SEED = 1
"""Keeps the random numbers of selection apart from those of sampling."""


@dataclass
class Clock:
    """Seconds spent in each phase of one step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Gathered:
    """What all processes know of a step: every row, in the same order everywhere."""

    stats: TokenStats
    completion: Tensor
    position: Tensor
    offset: int
    """Index of this process's first row among all rows."""


@dataclass(frozen=True)
class _Plan:
    """What a step will learn from, and how heavily."""

    gathered: Gathered
    chosen: TokenSelection
    weights: Tensor
    """Loss weight of every row `[N]`."""
    gate: Tensor
    """EOPD's gate of every row `[N]`."""


@dataclass(frozen=True)
class _Lesson:
    """Rows of one micro-batch to learn from, and the objective's terms with their weights."""

    rows: Tensor
    terms: Sequence[tuple[Term, Tensor | float]]


class Step:
    """Takes steps with one set of models, optimizer and configuration."""

    def __init__(
        self,
        config: Config,
        parts: Parts,
        accelerator: Accelerator,
        student: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.config = config
        self.parts = parts
        self.accelerator = accelerator
        self.student = student
        self.optimizer = optimizer
        self.pad_id = pad_id(parts.tokenizer)

    def take(self, step: int) -> dict[str, Any]:
        """Perform update `step` (from 1) and return its metrics.

        Raises:
            RunError: the gradient is not finite; weights and moments are as before the step.
        """
        clock = Clock()
        with clock.phase("rollout_s"):
            rollouts = self.write(step)
        batches = micro_batches(rollouts, self.config.micro_batch_size, self.pad_id)
        batches = [batch.to(self.accelerator.device) for batch in batches]
        teacher = self.parts.teacher
        with clock.phase("teacher_s"), teacher.awake():
            views = [teacher.read(batch) for batch in batches]
        plan: _Plan | None = None
        if needs_scoring(self.config):
            with clock.phase("score_s"):
                plan = self._plan(batches, views, rollouts, step)
        with clock.phase("learn_s"):
            lessons = self._lessons(batches, plan)
            num_rows = self._sum(sum(batch.num_rows for batch in batches))
            divisor = self._divisor(num_rows, plan)
            total, learned = self._learn(batches, views, lessons, divisor)
            grad_norm = self._update(step)
        if plan is None:  # every token was learned from, so all statistics are known now
            plan = self._plan_of(self._gather(batches, learned), rollouts, step)
        return {
            "step": step,
            "loss": self._sum(total) / max(divisor, 1),
            "grad_norm": grad_norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **self._metrics(plan, rollouts),
            "seconds": clock.seconds,
        }

    def write(self, step: int) -> list[Rollout]:
        """This process's share of the step's rollouts."""
        config, accelerator = self.config, self.accelerator
        prompts = self.parts.task.prompts(step - 1, config.prompts_per_step, config.seed)
        share = len(prompts) // accelerator.num_processes
        first = share * accelerator.process_index
        return sample(
            self.parts.student.model,
            self.parts.tokenizer,
            prompts[first : first + share],
            config.sampling,
            (config.seed, step),
            config.sampling_batch_size,
        )

    def choose(self, gathered: Gathered, step: int) -> TokenSelection:
        """The rows to train on, of all processes; the same answer in every process."""
        selection = self.config.selection
        options: dict[str, Any] = {"position": gathered.position}
        if isinstance(selection, SomeTokens | SampledTokens):
            options |= {"keep": selection.keep, "scope": selection.scope}
            options["normalization"] = selection.normalization
        if isinstance(selection, SampledTokens):
            seed = (self.config.seed, step, _SELECTION_SEED)
            options["uniform"] = counter_uniform(seed, gathered.completion, gathered.position)
            options["correct_sampling"] = selection.correct_sampling
        if isinstance(selection, FirstTokens):
            options["num_tokens"] = selection.num_tokens
        return select_tokens(gathered.stats, gathered.completion, selection.rule, **options)

    def _plan(
        self, batches: list[Batch], views: list[LazyLogits], rollouts: list[Rollout], step: int
    ) -> _Plan:
        view, extras = self.parts.teacher.view, needed_extras(self.config)
        with torch.no_grad():
            stats = [
                self.student(b, view(v), extras=extras) for b, v in zip(batches, views, strict=True)
            ]
        return self._plan_of(self._gather(batches, TokenStats.cat(stats)), rollouts, step)

    def _plan_of(self, gathered: Gathered, rollouts: list[Rollout], step: int) -> _Plan:
        stats = gathered.stats
        weights = row_weights(self.config, stats, gathered.completion, self._verdicts(rollouts))
        chosen = self.choose(gathered, step)
        if len(stats) and chosen.num_nonfinite == len(stats):
            raise RunError(
                f"the statistics of all {len(stats)} tokens of step {step} are not finite, so the "
                "student or the teacher gives logits that are not numbers. Check weights and dtype."
            )
        return _Plan(gathered, chosen, weights, gate_of(self.config.objective, stats))

    def _verdicts(self, rollouts: list[Rollout]) -> list[bool | None]:
        """Verdict on every completion of the step; none where no weighting asks for them."""
        if not isinstance(self.config.weighting, PacedWeighting | RewardWeighting):
            return []
        grade = self.parts.task.grade
        local = [False if r.is_truncated else grade(r.prompt, r.text) for r in rollouts]
        codes = [-1 if verdict is None else int(verdict) for verdict in local]
        table = self._gather_table(torch.tensor(codes, device=self.accelerator.device))
        return [None if code < 0 else bool(code) for code in table.tolist()]

    def _lessons(self, batches: list[Batch], plan: _Plan | None) -> list[_Lesson]:
        """What each micro-batch of this process learns from."""
        if plan is None:
            terms, device = plain_terms(self.config.objective), self.accelerator.device
            return [_Lesson(torch.arange(b.num_rows, device=device), terms) for b in batches]
        lessons, start, is_kept = [], plan.gathered.offset, plan.chosen.mask
        weights = torch.zeros_like(plan.weights)
        weights[plan.chosen.rows] = plan.weights[plan.chosen.rows] * plan.chosen.weights
        for batch in batches:
            here = slice(start, start + batch.num_rows)
            rows = is_kept[here].nonzero().squeeze(1)
            guide = guidance(
                plan.gathered.stats[here], batch.tokens, weights[here], plan.gate[here]
            )
            lessons.append(_Lesson(rows, guided_terms(self.config.objective, guide[rows])))
            start = here.stop
        return lessons

    def _divisor(self, num_rows: int, plan: _Plan | None) -> int:
        """The one number that sums are divided by."""
        if plan is None or not self.config.renormalise:
            return num_rows
        selection = self.config.selection
        if isinstance(selection, SampledTokens) and selection.correct_sampling:
            return num_rows  # the weights 1/π already estimate the sum over all rows
        return len(plan.chosen.rows)

    def _learn(
        self,
        batches: list[Batch],
        views: list[LazyLogits],
        lessons: list[_Lesson],
        divisor: int,
    ) -> tuple[float, TokenStats]:
        """Back-propagate every micro-batch; the sum of the objective and what its rows were."""
        scale = self.accelerator.num_processes / max(divisor, 1)
        extras = () if needs_scoring(self.config) else needed_extras(self.config)
        total, learned = 0.0, []
        for batch, view, lesson in zip(batches, views, lessons, strict=True):
            teacher = self.parts.teacher.view(view)
            objective = self.student(batch, teacher, lesson.rows, lesson.terms, extras)
            self.accelerator.backward(objective.total * scale)
            total += float(objective.total.detach())
            learned.append(_as_stats(objective))
        return total, TokenStats.cat(learned)

    def _update(self, step: int) -> float:
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        limit = self.config.optimizer.max_grad_norm
        norm = float(
            torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        )
        if not norm < float("inf"):
            self.optimizer.zero_grad()
            raise RunError(
                f"the gradient of step {step} is not finite (norm {norm}). Nothing was updated; "
                "lower optimizer.learning_rate or use float32, then start again."
            )
        if limit > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, torch.tensor(norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _metrics(self, plan: _Plan, rollouts: list[Rollout]) -> dict[str, Any]:
        count = max(self._sum(len(rollouts)), 1)
        distinct = len({(r.prompt.id, r.completion_ids) for r in rollouts})
        return {
            **token_metrics(plan.gathered.stats, plan.chosen, plan.gate, self.config),
            "completion_length_mean": len(plan.gathered.stats) / count,
            "truncated_share": self._sum(sum(r.is_truncated for r in rollouts)) / count,
            "duplicate_share": 1 - self._sum(distinct) / count,
        }

    def _gather(self, batches: list[Batch], stats: TokenStats) -> Gathered:
        """The rows of all processes, one process after the other."""
        completion = torch.cat([batch.completion for batch in batches])
        position = torch.cat([batch.position for batch in batches])
        num_local = self.config.prompts_per_step * self.config.sampling.num_samples
        completion += (num_local // self.accelerator.num_processes) * self.accelerator.process_index
        table = torch.cat([stats.stack(), completion[None].double(), position[None].double()])
        sizes = self._gather_table(torch.tensor([[table.shape[1]]], device=table.device))
        padded = self.accelerator.pad_across_processes(table, dim=1)
        whole = self._gather_table(padded[None])
        table = torch.cat([part[:, : int(n)] for part, n in zip(whole, sizes, strict=True)], 1)
        return Gathered(
            TokenStats.unstack(table[:-2], tuple(stats.extras)),
            table[-2].long(),
            table[-1].long(),
            int(sizes[: self.accelerator.process_index].sum()),
        )

    def _gather_table(self, table: Tensor) -> Tensor:
        gathered: Tensor = self.accelerator.gather(table.contiguous())
        return gathered

    def _sum(self, value: float) -> Any:
        """Sum over processes, in the type of `value`."""
        if self.accelerator.num_processes == 1:
            return value
        total = self._gather_table(
            torch.tensor([value], dtype=torch.float64, device=self.accelerator.device)
        )
        return type(value)(total.sum().item())


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
