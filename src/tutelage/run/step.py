"""One optimizer update: the student writes, the teacher reads, kept tokens teach."""

from __future__ import annotations

import time
from collections.abc import Iterator
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
    quadrant_table,
    quadrants,
    select_tokens,
)
from tutelage.data.batch import Batch, micro_batches
from tutelage.data.types import Rollout
from tutelage.errors import RunError
from tutelage.models.sampling import sample
from tutelage.models.tokenizers import pad_id
from tutelage.run.config import AllTokens, Config
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
        if isinstance(self.config.selection, AllTokens):
            # Every token is trained on, so the learning pass itself yields the statistics.
            rows = [torch.arange(batch.num_rows, device=batch.tokens.device) for batch in batches]
            num_rows, num_kept = (self._sum(sum(map(len, rows))),) * 2
        else:
            with clock.phase("score_s"):
                gathered = self._gather(batches, self._score(batches, views))
                chosen = self.choose(gathered, step)
            rows = _split(chosen.rows - gathered.offset, batches)
            num_rows, num_kept = len(gathered.stats), len(chosen.rows)
        with clock.phase("learn_s"):
            divisor = num_kept if self.config.renormalise else num_rows
            parts, learned = self._learn(batches, views, rows, divisor)
            grad_norm = self._update(step)
        if isinstance(self.config.selection, AllTokens):
            gathered = self._gather(batches, learned)
            chosen = self.choose(gathered, step)
        metrics = self._metrics(gathered, chosen, rollouts)
        loss = self._sum(parts) / max(divisor, 1)
        return {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **metrics,
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
        if isinstance(selection, AllTokens):
            return select_tokens(gathered.stats, gathered.completion, "all", keep=1.0)
        seed = (self.config.seed, step, _SELECTION_SEED)
        uniform = counter_uniform(seed, gathered.completion, gathered.position)
        return select_tokens(
            gathered.stats,
            gathered.completion,
            selection.rule,
            selection.keep,
            selection.scope,
            selection.normalization,
            uniform,
        )

    def _score(self, batches: list[Batch], views: list[LazyLogits]) -> TokenStats:
        view = self.parts.teacher.view
        with torch.no_grad():
            return TokenStats.cat(
                [self.student(b, view(v)) for b, v in zip(batches, views, strict=True)]
            )

    def _learn(
        self, batches: list[Batch], views: list[LazyLogits], rows: list[Tensor], divisor: int
    ) -> tuple[float, TokenStats]:
        """Back-propagate every micro-batch; the sum of the objective and what its rows were."""
        weights = (self.config.objective.reverse_weight, self.config.objective.forward_weight)
        scale = self.accelerator.num_processes / max(divisor, 1)
        total, learned = 0.0, []
        for batch, view, kept in zip(batches, views, rows, strict=True):
            objective = self.student(batch, self.parts.teacher.view(view), kept, weights)
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

    def _metrics(
        self, gathered: Gathered, chosen: TokenSelection, rollouts: list[Rollout]
    ) -> dict[str, Any]:
        stats = gathered.stats
        count = max(len(stats), 1)
        cut = self.config.quadrant_thresholds
        quadrant = quadrants(stats.entropy, stats.reverse_kl, cut)
        means = {
            f"{name}_nats": float(stats.__dict__[name].sum()) / count
            for name in ("reverse_kl", "forward_kl", "entropy", "teacher_entropy")
        }
        num_completions = max(self._sum(len(rollouts)), 1)
        return {
            "num_rows": len(stats),
            "num_kept": len(chosen.rows),
            "num_nonfinite": chosen.num_nonfinite,
            "kept_kl_share": _share(stats.reverse_kl[chosen.rows], stats.reverse_kl),
            **means,
            "completion_length_mean": len(stats) / num_completions,
            "truncated_share": self._sum(sum(r.is_truncated for r in rollouts)) / num_completions,
            "quadrants": quadrant_table(quadrant, stats.reverse_kl, chosen.mask),
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
            TokenStats.unstack(table[:6]),
            table[6].long(),
            table[7].long(),
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
    )


def _share(part: Tensor, whole: Tensor) -> float:
    """Sum of a part as a share of the sum of the whole; 0 where the whole is 0."""
    total = float(whole.sum())
    return float(part.sum()) / total if total > 0 else 0.0


def _split(rows: Tensor, batches: list[Batch]) -> list[Tensor]:
    """Rows of this process, per micro-batch and counted from the micro-batch's first row."""
    parts, start = [], 0
    for batch in batches:
        here = (rows >= start) & (rows < start + batch.num_rows)
        parts.append(rows[here] - start)
        start += batch.num_rows
    return parts
