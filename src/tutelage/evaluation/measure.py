"""What a run measures on held-out prompts, before, during and after training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from tutelage.config.sampling import SamplingConfig
from tutelage.config.schema import Config
from tutelage.data.batch import micro_batches, without_rows
from tutelage.data.types import Rollout
from tutelage.evaluation.benchmark import Benchmark, Result, generate_with, run_benchmark
from tutelage.evaluation.request import HELD_OUT
from tutelage.evaluation.scores import voting_of
from tutelage.models.privileged import Reading, read_beside
from tutelage.models.stored_teacher import StoredTeacher
from tutelage.models.student import Student
from tutelage.models.teacher_protocol import AnyTeacher
from tutelage.models.tokenizers import decode, pad_id
from tutelage.rollout.sampler import Sampler, TransformersSampler
from tutelage.rollout.verifiers_sampler import VerifiersSampler
from tutelage.setup.components import Components, agent_of
from tutelage.setup.inputs import grader_of
from tutelage.setup.phases import PhaseCallback, counting, no_phases
from tutelage.setup.shares import ALONE, Shares

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
    config: Config,
    components: Components,
    step: int,
    on_phase: PhaseCallback = no_phases,
    shares: Shares = ALONE,
) -> Measured:
    """Evaluate the student after `step`, and once, before the first step, the teacher.

    The run's own engine samples from the student. Transformers samples from the teacher, whose
    weights no engine holds.

    Args:
        config: the run; its `evaluation` says how much.
        components: the models after `step`; the student has all weights.
        step: updates done.
        on_phase: told what is being done.
        shares: the processes that share the held-out prompts.

    Returns:
        Everything in the main process, and no lines in the others.
    """
    sampler = components.sampler
    if not sampler.has_own_weights:  # the same model, in the evaluation's own batches
        sampler = _transformers(config, components, components.student.model)
    student = _evaluate(config, components, sampler, "student", on_phase, shares)
    components.forget_draws()
    if components.reading is not None:
        student = replace(student, rollouts=components.reading.rows(student.rollouts))
    nats = held_out_reverse_kl(
        components.student,
        components.teacher,
        student.rollouts,
        pad_id(components.tokenizer, components.student.vocab_size),
        config.micro_batch_size,
        config.micro_batch_tokens,
        shares,
        components.reading,
        on_phase,
    )
    sums, counts, samples = _collected(config, components, step, student, nats, shares)
    kl = mean_reverse_kl(counts, sums)
    found = [("student", student, kl)]
    has_grades = shares.told(student.scores.mean_at_k is not None)
    if step == 0 and config.evaluation.teacher and has_grades:
        with components.teacher.on_device():
            sampler = _transformers(config, components, components.teacher.model)
            result = _evaluate(config, components, sampler, "teacher", on_phase, shares)
            sampler.close()
            found.append(("teacher", result, None))
    if not shares.is_main:
        return Measured([], [], [])
    engines = {"student": config.engine.kind, "teacher": "transformers"}
    heads = [{"step": step, "model": who, "engine": engines[who]} for who, _, _ in found]
    pairs = list(zip(heads, found, strict=True))
    return Measured(
        [
            {**h, **result.scores.summary(), "held_out_reverse_kl_nats": kl}
            for h, (_, result, kl) in pairs
        ],
        [
            {**h, **{key: row[key] for key in _ROW}, **nats}
            for h, (who, result, _) in pairs
            for row, nats in zip(result.rows, _per_row(who, result, sums, counts), strict=True)
        ],
        samples,
    )


def _collected(
    config: Config,
    components: Components,
    step: int,
    result: Result,
    nats: Sequence[float],
    shares: Shares,
) -> tuple[list[float], list[int], list[dict[str, Any]]]:
    """Nats and tokens of every completion, and some of the completions, in the main process."""
    k, rollouts = config.evaluation.num_samples, result.rollouts
    own: dict[int, tuple[Sequence[float], list[int], list[dict[str, Any]]]] = {}
    for place, index in enumerate(shares.mine(result.scores.num_problems)):
        here = slice(place * k, (place + 1) * k)
        counts = [len(rollout.generated_ids) for rollout in rollouts[here]]
        first = rollouts[place * k : place * k + 1] if index < _NUM_SAVED_SAMPLES else []
        samples = [_sample(components, step, rollout) for rollout in first]
        own[index] = (nats[here], counts, samples)
    problems = shares.collect(own)
    verdicts = result.is_correct[::k]
    return (
        [x for sums, _, _ in problems for x in sums],
        [n for _, counts, _ in problems for n in counts],
        [
            {**sample, "is_correct": verdict}
            for (_, _, found), verdict in zip(problems, verdicts, strict=True)
            for sample in found
        ],
    )


def _per_row(
    who: str, result: Result, sums: list[float], counts: list[int]
) -> list[dict[str, float | int | None]]:
    """Nats of each completion, and its tokens that have a teacher.

    The teacher's divergence from itself is not measured.
    """
    if who == "teacher":
        return [{"reverse_kl_nats": None, "num_rows": None} for _ in result.rows]
    return [
        {"reverse_kl_nats": nats if math.isfinite(nats) else None, "num_rows": count}
        for nats, count in zip(sums, counts, strict=True)
    ]


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
    teacher: AnyTeacher,
    rollouts: Sequence[Rollout],
    pad_id: int,
    micro_batch_size: int,
    max_tokens: int = 0,
    shares: Shares = ALONE,
    reading: Reading | None = None,
    on_phase: PhaseCallback = no_phases,
) -> list[float]:
    """Reverse KL of every rollout in nats, summed over its tokens; NaN without a teacher's model.

    Args:
        student: has all weights.
        teacher: the frozen model, which the processes may hold together.
        rollouts: this process's.
        pad_id: fills padded rows.
        micro_batch_size: most rollouts of a forward pass.
        max_tokens: most tokens of one, padding included; 0 sets no limit.
        shares: the processes, each of which runs as many forward passes.
        reading: the prompts that the teacher reads; None where they are the student's.
        on_phase: told how many forward passes are done.
    """
    if isinstance(teacher, StoredTeacher) and teacher.whole is None:
        return [math.nan] * len(rollouts)  # nothing is stored of these completions
    order = sorted(
        range(len(rollouts)), key=lambda i: (rollouts[i].prompt.teacher, _length(rollouts[i]))
    )
    by_length = [rollouts[i] for i in order]
    sums = torch.zeros(len(rollouts), dtype=torch.float64)
    batches = micro_batches(by_length, micro_batch_size, pad_id, max_tokens=max_tokens)
    blanks = [without_rows(pad_id)] * (int(shares.max([len(batches)])[0]) - len(batches))
    every = [*batches, *blanks]
    passed = counting(on_phase, "held-out KL: forward passes", len(every))
    with teacher.on_device(), torch.no_grad():
        for batch, read in zip(every, read_beside(every, by_length, reading, pad_id), strict=True):
            shares.check()
            here = batch.to(student.model.device)
            view = teacher.forward(read)
            if here.num_rows:
                stats = student(here, teacher.to_device(view))
                sums.index_add_(0, here.completion.cpu(), stats.reverse_kl.double().cpu())
            passed(1)
    found = torch.zeros_like(sums)
    found[torch.tensor(order, dtype=torch.int64)] = sums
    return found.tolist()


def _length(rollout: Rollout) -> int:
    return len(rollout.prompt_ids) + len(rollout.completion_ids)


def mean_reverse_kl(counts: Sequence[int], sums: Sequence[float]) -> float | None:
    """Mean over all generated tokens, nats; None without tokens or if infinite.

    Args:
        counts: generated tokens of each completion.
        sums: nats of each.
    """
    total, count = math.fsum(sums), sum(counts)
    return total / count if count and math.isfinite(total) else None


def _transformers(config: Config, components: Components, model: PreTrainedModel) -> Sampler:
    size = max(config.sampling_batch_size, config.evaluation.num_samples)
    sampler = TransformersSampler(model, components.tokenizer, size, components.enable_thinking)
    service = components.verifiers
    return sampler if service is None else VerifiersSampler(sampler, service)


def _evaluate(
    config: Config,
    components: Components,
    sampler: Sampler,
    who: str,
    on_phase: PhaseCallback,
    shares: Shares = ALONE,
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
    text = f"evaluating the {who}: completions"
    progress = shares.progress(on_phase, text, num_completions)
    with shares.uninterrupted(sampler.has_own_weights):  # processes hand them over together
        return run_benchmark(
            benchmark, generate, settings.num_samples, progress=progress, shares=shares
        )


def _sample(components: Components, step: int, rollout: Rollout) -> dict[str, Any]:
    return {
        "step": step,
        "prompt_id": rollout.prompt.id,
        "prompt": decode(components.tokenizer, rollout.prompt_ids),
        "completion": rollout.transcript,
    }
