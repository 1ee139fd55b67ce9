"""Doing one cell: deep-copy the student, take steps, measure it on held-out prompts."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from torch import Tensor

from claims_arms import BASELINES
from claims_choices import choices, own_choice
from claims_design import Cell, config_of
from claims_probe import bias, oscillation, probe, score
from tutelage.config.sampling import SamplingConfig
from tutelage.config.schema import Config
from tutelage.config.selection import AllTokens
from tutelage.data.tasks import Task
from tutelage.data.tasks.coins import parse_purchase
from tutelage.data.types import Prompt
from tutelage.evaluation.benchmark import Benchmark, Result, generate_with, run_benchmark
from tutelage.rollout.sampler import TransformersSampler
from tutelage.setup.components import Components, build_components, make_sampler, masters_of
from tutelage.setup.phases import no_phases
from tutelage.train.metrics import HIGH_ENTROPY_NATS
from tutelage.train.optimizer import build_optimizer, learning_rate
from tutelage.train.step import Step
from tutelage.train.stored.fill import Fill, store_of

NUM_SAMPLES = 8
"""Completions of each held-out problem."""
_EVALUATION_SEED = 424242
_SAMPLES_SCORED = 2
"""Completions per problem whose tokens are compared with the teacher's distribution."""
_SEARCHED = 8
"""Held-out prompts drawn for every problem that is wanted."""
_EVALUATION_BATCH = 512
"""Completions decoded at a time; with 1,024 the processor's caches overflow."""


def do(cell: Cell) -> dict[str, Any]:
    """The record of one cell as plain JSON values; a pure function of the cell."""
    torch.set_num_threads(1)
    found: Mapping[str, Any]
    match cell.kind:
        case "probe":
            found = probe(fresh(cell), config_of(cell), cell.num_probed)
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
    return with_own_student(_loaded(cell.setting), config_of(cell))


def with_own_student(loaded: Components, config: Config) -> Components:
    """The same with a copy of the student, its masters, and a sampler that samples from it."""
    student = copy.deepcopy(loaded.student)
    sampler = make_sampler(config, student.plain, loaded.tokenizer, loaded.verifiers)
    return replace(loaded, student=student, masters=masters_of(config, student), sampler=sampler)


def learn_and_measure(cell: Cell) -> dict[str, Any]:
    """Train one arm with one seed and evaluate it; `start` and `teacher` are only evaluated."""
    components = fresh(cell)
    if cell.arm == "teacher":
        components.student.model = copy.deepcopy(components.teacher.model)
    config, num_probed = config_of(cell), cell.num_probed
    seen: dict[str, Any] = {}
    if num_probed and cell.arm == "start":
        seen = {"choices": choices(components, config, num_probed)}
    is_recorded = num_probed > 0 and not isinstance(config.selection, AllTokens)
    before = own_choice(components, config, num_probed) if is_recorded else {}
    learned = {} if cell.arm in BASELINES else learn(components, config)
    if is_recorded:
        after = own_choice(components, config, num_probed)
        seen = {"choices": {"before": before, "after": after}}
    problems = measure(components, config, cell.num_problems, cell.kind == "tune")
    means = {name: fmean(values) for name, values in problems.items()}
    weights = digest(components.student)
    return {**learned, **means, **seen, "weights": weights, "problems": problems}


def learn(components: Components, config: Config) -> dict[str, float]:
    """Take all steps of a run and sum up what they trained on."""
    with stepping(components, config) as take:
        records = [take(step) for step in range(1, config.num_steps + 1)]
    return {"tokens_trained": sum(r["num_kept"] for r in records), **_of_teacher(records)}


def _of_teacher(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the steps tell of the teacher's side; nothing where they have no teacher forward."""
    first, last = records[0], records[-1]
    if first["reverse_kl_nats"] is None:
        return {}
    return {
        "kl_kept": fmean(r["kept_kl_share"] for r in records),
        "q3_kept_first": first["quadrants"]["q3"]["kept_share"],
        "q3_share_first": first["quadrants"]["q3"]["share"],
        "q3_kl_first": first["quadrants"]["q3"]["kl_mass"],
        "training_reverse_kl_first": first["reverse_kl_nats"],
        "training_reverse_kl_last": last["reverse_kl_nats"],
        "gate_share": fmean(r["gate_share"] or 0.0 for r in records),
    }


@contextmanager
def stepping(components: Components, config: Config) -> Iterator[Callable[[int], dict[str, Any]]]:
    """Takes the steps of a run with optimizer, rates and stored rollouts as `tutelage train` does.

    What it stores lies in a folder that goes afterwards.
    """
    with tempfile.TemporaryDirectory() as folder:
        student, masters = components.student, components.masters
        optimizer = build_optimizer(config.optimizer, student, masters, Path(folder))
        store = store_of(config, Path(folder), {})
        accelerator = Accelerator(cpu=components.device.type == "cpu")
        stepper = Step(config, components, accelerator, student, optimizer, store=store)
        if store is not None:
            fill = Fill(stepper, store, lambda: False, lambda _: None, no_phases)
            fill.begin(1)
            fill.run()

        def take(step: int) -> dict[str, Any]:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.optimizer, step, config.num_steps)
            return stepper.take(step)

        yield take


def measure(
    components: Components, config: Config, num_problems: int, is_tuning: bool = False
) -> dict[str, list[float]]:
    """One value a held-out problem of every figure; the same problems and draws for every arm.

    Rates are tuned on other problems than arms are judged on.
    """
    sampler = TransformersSampler(components.student.model, components.tokenizer, _EVALUATION_BATCH)
    sampling = SamplingConfig(num_samples=NUM_SAMPLES)
    problems = problems_of(components.task, num_problems, is_tuning)
    result = run_benchmark(
        Benchmark(
            components.task.name, problems, components.task.grade, config.sampling.max_new_tokens
        ),
        generate_with(sampler, sampling, (_EVALUATION_SEED, config.seed)),
        NUM_SAMPLES,
    )
    return {**graded(result, START.get(config.data.kind)), **compared(components, result)}


def problems_of(task: Task, num_problems: int, is_tuning: bool) -> tuple[Prompt, ...]:
    """Held-out problems: those that arms are judged on, or others to tune rates on.

    No two that arms are judged on ask the same thing, and none that rates are tuned on asks what
    one of them does; these may repeat one another, as the coins task holds few purchases out.

    Raises:
        ValueError: the task holds out too few different problems.
    """
    judged: dict[str, Prompt] = {}
    for prompt in task.held_out(_SEARCHED * num_problems):
        if len(judged) < num_problems:
            judged.setdefault(asked(prompt), prompt)
    found = list(judged.values())
    if is_tuning:
        others = task.held_out(_SEARCHED * num_problems, seed=1)
        found = [prompt for prompt in others if asked(prompt) not in judged][:num_problems]
    if len(found) < num_problems:
        raise ValueError(f"{task.name} holds out {len(found)} such problems, not {num_problems}.")
    return tuple(found)


def asked(prompt: Prompt) -> str:
    """What a prompt asks, whatever its sentences."""
    return str(parse_purchase(prompt) or prompt.content)


def graded(result: Result, has_start: HasStart | None = None) -> dict[str, list[float]]:
    """Accuracy and diversity of every problem, plain and with a hidden start.

    Hidden start: of the right completions only those count that begin with one particular item,
    which the prompt does not tell. The teacher begins anywhere; a student that knows one order
    of work can only ever solve the problems whose hidden start is its own.

    Args:
        result: completions with verdicts.
        has_start: whether a right completion begins as its prompt's hash wants; None for a task
            without hidden starts.
    """
    names = ["mean", "pass", "distinct", *(["hidden_mean", "hidden_pass"] if has_start else [])]
    figures: dict[str, list[float]] = {name: [] for name in names}
    for first in range(0, len(result.rollouts), NUM_SAMPLES):
        mine = slice(first, first + NUM_SAMPLES)
        pairs = zip(result.rollouts[mine], result.is_correct[mine], strict=True)
        right = [r for r, is_correct in pairs if is_correct]
        figures["mean"].append(len(right) / NUM_SAMPLES)
        figures["pass"].append(float(bool(right)))
        figures["distinct"].append(float(len({r.completion_ids for r in right})))
        if has_start:
            lucky = sum(has_start(r.prompt, r.text) for r in right)
            figures["hidden_mean"].append(lucky / NUM_SAMPLES)
            figures["hidden_pass"].append(float(lucky > 0))
    return figures


def one_of(prompt: Prompt, choices: Sequence[str]) -> str:
    """One of several by a hash of the prompt's name."""
    digest = hashlib.blake2b(prompt.id.encode(), digest_size=8).digest()
    return choices[int.from_bytes(digest, "big") % len(choices)]


def ledger_start(prompt: Prompt, text: str) -> bool:
    """Whether a completion begins with the letter of the item that it has to begin with."""
    assert isinstance(prompt.content, str)
    letters = [item[0] for item in prompt.content.rstrip(";>").split(";")]
    return text[0] == one_of(prompt, letters)


HasStart: TypeAlias = Callable[[Prompt, str], bool]
START: dict[str, HasStart] = {"ledger": ledger_start}
"""Hidden starts by kind of data."""


def compared(components: Components, result: Result) -> dict[str, list[float]]:
    """Mean over tokens, problem by problem, of divergences and entropy of the student's text."""
    rollouts = [r for r in result.rollouts if r.sample < _SAMPLES_SCORED]
    rows = score(components, rollouts)
    stats, problem = rows.stats, rows.completion // _SAMPLES_SCORED
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
