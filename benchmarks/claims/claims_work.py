"""Doing one cell: deep-copy the student, take steps, measure it on held-out prompts."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from claims_design import MAX_NEW_TOKENS, NUM_SAMPLES, Cell, config_of
from claims_probe import bias, oscillation, probe, score
from tutelage.config.sampling import SamplingConfig
from tutelage.config.schema import Config
from tutelage.data.types import Prompt
from tutelage.evaluation.benchmark import Benchmark, Result, generate_with, run_benchmark
from tutelage.rollout.sampler import TransformersSampler
from tutelage.setup.components import Components, build_components
from tutelage.train.metrics import HIGH_ENTROPY_NATS
from tutelage.train.optimizer import learning_rate
from tutelage.train.step import Step

_EVALUATION_SEED = 424242
_SAMPLES_SCORED = 2
"""Completions per problem whose tokens are compared with the teacher's distribution."""
_EVALUATION_BATCH = 512
"""Completions decoded at a time; with 1,024 the processor's caches overflow."""


def do(cell: Cell) -> dict[str, Any]:
    """The record of one cell as plain JSON values; a pure function of the cell."""
    torch.set_num_threads(1)
    found: Mapping[str, Any]
    match cell.kind:
        case "probe":
            found = probe(fresh(cell), config_of(cell), cell.num_probe_tokens)
        case "oscillation":
            found = oscillation(cell.seed)
        case "bias":
            found = bias(cell.seed)
        case _:
            found = learn_and_measure(cell)
    numbers = hashlib.blake2b(json.dumps(found).encode(), digest_size=8).hexdigest()
    return {"key": cell.key, **asdict(cell), **found, "digest": numbers}


@cache
def _loaded(student: str) -> Components:
    return build_components(config_of(Cell("arm", student, "all", 0, 0.0, 0)))


def fresh(cell: Cell) -> Components:
    """The models of a cell's setting, the student an untouched copy."""
    components = _loaded(cell.setting)
    return replace(components, student=copy.deepcopy(components.student))


def learn_and_measure(cell: Cell) -> dict[str, Any]:
    """Train one arm with one seed and evaluate it; `start` and `teacher` are only evaluated."""
    components = fresh(cell)
    if cell.arm == "teacher":
        components.student.model = copy.deepcopy(components.teacher.model)
    learned = {} if cell.arm in ("start", "teacher") else learn(components, config_of(cell))
    problems = measure(components, cell.num_problems, cell.seed)
    means = {name: fmean(values) for name, values in problems.items()}
    return {**learned, **means, "weights": digest(components.student), "problems": problems}


def learn(components: Components, config: Config) -> dict[str, float]:
    """Take all steps of a run and sum up what they trained on."""
    optimizer = torch.optim.AdamW(
        components.student.parameters(),
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        weight_decay=config.optimizer.weight_decay,
    )
    stepper = Step(config, components, Accelerator(cpu=True), components.student, optimizer)
    records = []
    for step in range(1, config.num_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, config.num_steps)
        records.append(stepper.take(step))
    first, last = records[0], records[-1]
    return {
        "tokens_trained": sum(r["num_kept"] for r in records),
        "kl_kept": fmean(r["kept_kl_share"] for r in records),
        "q3_kept_first": first["quadrants"]["q3"]["kept_share"],
        "q3_share_first": first["quadrants"]["q3"]["share"],
        "q3_kl_first": first["quadrants"]["q3"]["kl_mass"],
        "training_reverse_kl_first": first["reverse_kl_nats"],
        "training_reverse_kl_last": last["reverse_kl_nats"],
        "gate_share": fmean(r["gate_share"] or 0.0 for r in records),
    }


def measure(components: Components, num_problems: int, seed: int) -> dict[str, list[float]]:
    """One value a held-out problem of every figure; the same problems and draws for every arm."""
    sampler = TransformersSampler(components.student.model, components.tokenizer, _EVALUATION_BATCH)
    sampling = SamplingConfig(num_samples=NUM_SAMPLES)
    problems = tuple(components.task.held_out(num_problems))
    result = run_benchmark(
        Benchmark(components.task.name, problems, components.task.grade, MAX_NEW_TOKENS),
        generate_with(sampler, sampling, (_EVALUATION_SEED, seed)),
        NUM_SAMPLES,
    )
    return {**graded(result), **compared(components, result)}


def graded(result: Result) -> dict[str, list[float]]:
    """Accuracy and diversity of every problem, plain and with a hidden start.

    Hidden start: of the right completions only those count that begin with one particular item,
    which the prompt does not tell. The teacher begins anywhere; a student that knows one order
    of work can only ever solve the problems whose hidden start is its own.
    """
    figures: dict[str, list[float]] = {
        name: [] for name in ("mean", "pass", "hidden_mean", "hidden_pass", "distinct")
    }
    for first in range(0, len(result.rollouts), NUM_SAMPLES):
        mine = slice(first, first + NUM_SAMPLES)
        pairs = zip(result.rollouts[mine], result.is_correct[mine], strict=True)
        right = [r for r, is_correct in pairs if is_correct]
        lucky = [r for r in right if r.text[0] == hidden_start(r.prompt)]
        figures["mean"].append(len(right) / NUM_SAMPLES)
        figures["pass"].append(float(bool(right)))
        figures["hidden_mean"].append(len(lucky) / NUM_SAMPLES)
        figures["hidden_pass"].append(float(bool(lucky)))
        figures["distinct"].append(float(len({r.completion_ids for r in right})))
    return figures


def hidden_start(prompt: Prompt) -> str:
    """Letter of the item with which a completion has to begin; a hash of the prompt's name."""
    assert isinstance(prompt.content, str)
    letters = [item[0] for item in prompt.content.rstrip(";>").split(";")]
    digest = hashlib.blake2b(prompt.id.encode(), digest_size=8).digest()
    return letters[int.from_bytes(digest, "big") % len(letters)]


def compared(components: Components, result: Result) -> dict[str, list[float]]:
    """Mean over tokens, problem by problem, of divergences and entropy of the student's text."""
    rollouts = [r for r in result.rollouts if r.sample < _SAMPLES_SCORED]
    stats, completion, _ = score(components, rollouts)
    problem = completion // _SAMPLES_SCORED
    is_high = stats.teacher_entropy >= HIGH_ENTROPY_NATS
    everywhere = torch.ones_like(is_high)
    return {
        "reverse_kl": _means(stats.reverse_kl, problem, everywhere, result.scores.num_problems),
        "forward_kl": _means(stats.forward_kl, problem, everywhere, result.scores.num_problems),
        "entropy": _means(stats.entropy, problem, everywhere, result.scores.num_problems),
        "high_forward_kl": _means(stats.forward_kl, problem, is_high, result.scores.num_problems),
    }


def _means(x: Tensor, problem: Tensor, chosen: Tensor, num_problems: int) -> list[float]:
    """Mean of the chosen tokens of every problem; 0 for a problem that has none."""
    total, count = torch.zeros(2, num_problems, dtype=torch.float64)
    total.index_add_(0, problem[chosen], x[chosen].double())
    count.index_add_(0, problem[chosen], torch.ones_like(x[chosen], dtype=torch.float64))
    means: list[float] = (total / count.clamp(min=1)).tolist()
    return means


def digest(module: torch.nn.Module) -> str:
    """A short hash of all weights: equal means equal to the last bit."""
    hashed = hashlib.blake2b(digest_size=8)
    for parameter in module.state_dict().values():
        hashed.update(parameter.detach().contiguous().numpy().tobytes())
    return hashed.hexdigest()
