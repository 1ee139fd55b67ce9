"""What a run measures on held-out prompts, before, during and after training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tutelage.config.sampling import SamplingConfig
from tutelage.config.schema import Config
from tutelage.data.batch import micro_batches
from tutelage.data.types import Rollout
from tutelage.evaluation.benchmark import Benchmark, Result, generate_with, run_benchmark
from tutelage.evaluation.request import HELD_OUT
from tutelage.evaluation.scores import voting_of
from tutelage.models.student import Student
from tutelage.models.teacher import Teacher
from tutelage.models.tokenizers import decode, pad_id
from tutelage.rollout.sampler import Sampler, TransformersSampler
from tutelage.rollout.verifiers_sampler import VerifiersSampler
from tutelage.setup.components import Components, agent_of
from tutelage.setup.inputs import grader_of
from tutelage.setup.phases import PhaseCallback, counting, no_phases

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EVALUATION_SEED = 424242
"""Evaluations use the same random numbers in every run, so that runs can be compared in pairs."""
_NUM_SAVED_SAMPLES = 8
_ROW = ("prompt_id", "sample", "is_correct", "is_truncated", "num_tokens")
"""What of a sample's record is logged."""


@dataclass(frozen=True)
class Measured:
    """One evaluation of the student, and perhaps of the teacher."""

    summaries: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    """A verdict on every completion."""
    samples: list[dict[str, Any]]
    """Some of the student's completions."""

    def logs(self) -> dict[str, list[dict[str, Any]]]:
        """Lines for each log; the one that tells that an evaluation is complete comes last."""
        return {
            "evaluation_rows.jsonl": self.rows,
            "samples.jsonl": self.samples,
            "evaluation.jsonl": self.summaries[::-1],
        }


def measure(
    config: Config, components: Components, step: int, on_phase: PhaseCallback = no_phases
) -> Measured:
    """Evaluate the student after `step`, and once, before the first step, the teacher.

    The run's own engine samples from the student. Transformers samples from the teacher, whose
    weights no engine holds.
    """
    sampler = components.sampler
    if not sampler.has_own_weights:  # the same model, in the evaluation's own batches
        sampler = _transformers(config, components, components.student.model)
    student = _evaluate(config, components, sampler, "student", on_phase)
    on_phase("held-out KL")
    sums = held_out_reverse_kl(
        components.student,
        components.teacher,
        student.rollouts,
        pad_id(components.tokenizer, components.student.vocab_size),
        config.micro_batch_size,
        config.micro_batch_tokens,
    )
    kl = mean_reverse_kl(student.rollouts, sums)
    found = [("student", student, kl)]
    if step == 0 and config.evaluation.teacher and student.scores.mean_at_k is not None:
        with components.teacher.on_device():
            sampler = _transformers(config, components, components.teacher.model)
            result = _evaluate(config, components, sampler, "teacher", on_phase)
            sampler.close()
            found.append(("teacher", result, None))
    engines = {"student": config.engine.kind, "teacher": "transformers"}
    heads = [{"step": step, "model": who, "engine": engines[who]} for who, _, _ in found]
    pairs = list(zip(heads, found, strict=True))
    return Measured(
        [
            {**h, **result.scores.summary(), "held_out_reverse_kl_nats": kl}
            for h, (_, result, kl) in pairs
        ],
        [
            {**h, **{key: row[key] for key in _ROW}, "reverse_kl_nats": nats}
            for h, (who, result, _) in pairs
            for row, nats in zip(result.rows, _per_row(who, result, sums), strict=True)
        ],
        _samples(components, step, student),
    )


def _per_row(who: str, result: Result, sums: list[float]) -> list[float | None]:
    """Nats of each completion; the teacher's divergence from itself is not measured."""
    if who == "teacher":
        return [None] * len(result.rollouts)
    return [nats if math.isfinite(nats) else None for nats in sums]


def describe(summary: dict[str, Any]) -> str:
    """One line on an evaluation record."""
    parts = [f"{summary['model']} at step {summary['step']}:"]
    for name, title in (("mean_at_k", "mean"), ("pass_at_k", "pass")):
        if summary[name] is not None:
            low, high = summary[f"{name}_low"], summary[f"{name}_high"]
            value = f"{title}@{summary['k']} {100 * summary[name]:.1f} %"
            parts.append(f"{value} [{100 * low:.1f}, {100 * high:.1f}]")
    if summary["held_out_reverse_kl_nats"] is not None:
        parts.append(f"held-out reverse KL {summary['held_out_reverse_kl_nats']:.4f} nats")
    return " ".join(parts)


def held_out_reverse_kl(
    student: Student,
    teacher: Teacher,
    rollouts: Sequence[Rollout],
    pad_id: int,
    micro_batch_size: int,
    max_tokens: int = 0,
) -> list[float]:
    """Reverse KL of every rollout in nats, summed over its tokens."""
    order = sorted(range(len(rollouts)), key=lambda i: _length(rollouts[i]))
    by_length = [rollouts[i] for i in order]
    sums = torch.zeros(len(rollouts), dtype=torch.float64)
    with teacher.on_device(), torch.no_grad():
        for batch in micro_batches(by_length, micro_batch_size, pad_id, max_tokens=max_tokens):
            here = batch.to(student.model.device)
            stats = student(here, teacher.to_device(teacher.forward(here)))
            sums.index_add_(0, here.completion.cpu(), stats.reverse_kl.double().cpu())
    found = torch.zeros_like(sums)
    found[torch.tensor(order, dtype=torch.int64)] = sums
    return found.tolist()


def _length(rollout: Rollout) -> int:
    return len(rollout.prompt_ids) + len(rollout.completion_ids)


def mean_reverse_kl(rollouts: Sequence[Rollout], sums: Sequence[float]) -> float | None:
    """Mean over all generated tokens, nats; None without tokens or if infinite."""
    total, count = math.fsum(sums), sum(len(r.generated_ids) for r in rollouts)
    return total / count if count and math.isfinite(total) else None


def _transformers(config: Config, components: Components, model: PreTrainedModel) -> Sampler:
    size = max(config.sampling_batch_size, config.evaluation.num_samples)
    sampler = TransformersSampler(model, components.tokenizer, size, components.enable_thinking)
    service = components.verifiers
    return sampler if service is None else VerifiersSampler(sampler, service)


def _evaluate(
    config: Config, components: Components, sampler: Sampler, who: str, on_phase: PhaseCallback
) -> Result:
    settings, task = config.evaluation, components.task
    sampling = SamplingConfig(
        settings.temperature,
        settings.top_p,
        0,
        config.sampling.max_new_tokens,
        settings.num_samples,
    )
    prompts = tuple(task.held_out(settings.num_problems))
    grader = grader_of(task)
    benchmark = Benchmark(
        HELD_OUT,
        prompts,
        task.grade,
        sampling.max_new_tokens,
        grader,
        voting_of(grader),
        agent_of(config, task),
    )
    generate = generate_with(sampler, sampling, (_EVALUATION_SEED,))
    num_completions = len(prompts) * settings.num_samples
    progress = counting(on_phase, f"evaluating the {who}: completions", num_completions)
    return run_benchmark(benchmark, generate, settings.num_samples, progress=progress)


def _samples(components: Components, step: int, result: Result) -> list[dict[str, Any]]:
    chosen = range(0, len(result.rollouts), result.scores.num_samples)
    return [
        {
            "step": step,
            "prompt_id": result.rollouts[i].prompt.id,
            "prompt": decode(components.tokenizer, result.rollouts[i].prompt_ids),
            "completion": result.rollouts[i].transcript,
            "is_correct": result.is_correct[i],
        }
        for i in list(chosen)[:_NUM_SAVED_SAMPLES]
    ]
