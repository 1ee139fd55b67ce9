"""Doing one cell on a real language model: take the steps of a run, measure the student."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from claims_choices import choices, own_choice
from claims_lm_design import BASELINES, OTHER_TOKENS, SCALES, Cell, Pair, Scale, config_of, source
from claims_work import digest, stepping, with_own_student
from tutelage.config.sampling import SamplingConfig
from tutelage.config.schema import Config
from tutelage.data.batch import micro_batches
from tutelage.data.prompts import load_prompts
from tutelage.data.tasks import Task
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import DataError
from tutelage.evaluation.benchmark import Benchmark, generate_with, run_benchmark
from tutelage.grading.number import grade_number
from tutelage.models.tokenizers import pad_id
from tutelage.rollout.sampler import TransformersSampler
from tutelage.setup.components import Components, build_components

_EVALUATION_SEED = 424242
_OTHER_BATCH = 8
CHOICE_PROMPTS = 96
"""Problems whose completions' tokens the rules choose from."""
DIGITS = 4
"""Decimals that are kept of the figures of a problem."""

Values = dict[str, list[float]]


def do(cell: Cell, pair: Pair, device: str) -> dict[str, Any]:
    """The record of one cell as plain JSON values; a pure function of cell, pair and device."""
    start = time.perf_counter()
    components, config = fresh(cell, pair, device)
    if cell.arm == "teacher":
        components.student.model = copy.deepcopy(components.teacher.model)
    learned = {} if cell.arm in BASELINES else learn(components, config)
    components.sampler.close()
    trained = time.perf_counter()
    values = measure(components, pair, cell)
    means = {name: fmean(found) for name, found in values.items() if found}
    weights = digest(components.student.cpu())
    problems = {name: [round(x, DIGITS) for x in found] for name, found in values.items()}
    seconds = {"train_s": trained - start, "measure_s": time.perf_counter() - trained}
    seconds = {name: round(value, 1) for name, value in seconds.items()}
    identity = {"key": cell.key(pair, device), "source": source(), **asdict(cell)}
    return {**identity, **learned, **means, "weights": weights, "problems": problems, **seconds}


def choices_of(cells: Sequence[Cell], pair: Pair, device: str) -> dict[str, Any]:
    """Which tokens the rules keep of the untrained student's completions, and how arms' own
    choices move with training; as `claims_choices` has them for the embedded tasks."""
    start = replace(cells[0], kind="arm", arm="all")
    found = {"start": choices(*_choosing(start, pair, device), CHOICE_PROMPTS)}
    for cell in cells:
        components, config = _choosing(cell, pair, device)
        before = own_choice(components, config, CHOICE_PROMPTS)
        learn(components, config)
        found[cell.arm] = {
            "before": before,
            "after": own_choice(components, config, CHOICE_PROMPTS),
        }
        components.sampler.close()
    return found


def _choosing(cell: Cell, pair: Pair, device: str) -> tuple[Components, Config]:
    """An untouched student with the problems that rates are tuned on as its held-out prompts."""
    components, config = fresh(cell, pair, device)
    problems = problems_of(replace(cell, kind="tune"), pair)
    return replace(components, task=_Problems(components.task, problems)), config


@dataclass(frozen=True)
class _Problems:
    """A task whose held-out prompts are given."""

    task: Task
    problems: tuple[Prompt, ...]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def held_out(self, num_prompts: int, seed: int = 0) -> list[Prompt]:
        return list(self.problems[:num_prompts])


def fresh(cell: Cell, pair: Pair, device: str) -> tuple[Components, Config]:
    """Models of a pair, the student an untouched copy, and the run of a cell."""
    config = config_of(cell, pair, device)
    return with_own_student(_loaded(pair, device), config), config


@cache
def _loaded(pair: Pair, device: str) -> Components:
    scale = next(iter(SCALES))
    return build_components(
        config_of(Cell("arm", pair.task, scale, "exact", "all", 0, 0), pair, device)
    )


def learn(components: Components, config: Config) -> dict[str, Any]:
    """Take all steps of a run and sum up what they trained on."""
    with stepping(components, config) as take:
        records = [take(number) for number in range(1, config.num_steps + 1)]
    return {
        "tokens_trained": sum(r["num_kept"] for r in records),
        "tokens_sampled": sum(r["num_rows"] for r in records),
        "kl_kept": _mean(records, "kept_kl_share"),
        "training_kl_first": records[0]["reverse_kl_nats"],
        "training_kl_last": records[-1]["reverse_kl_nats"],
        "skipped_updates": sum(r["num_skipped_updates"] for r in records),
    }


def _mean(records: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [r[name] for r in records if r[name] is not None]
    return fmean(values) if values else None


def problems_of(cell: Cell, pair: Pair) -> tuple[Prompt, ...]:
    """The first problems of the test; to tune a rate on, the last ones.

    Raises:
        DataError: the test has too few problems for both.
    """
    path, count = pair.folder / "data" / "test.jsonl", SCALES[cell.scale].num_problems
    prompts = load_prompts(path)
    if len(prompts) < 2 * count:
        raise DataError(f"{path} needs {2 * count} problems, got {len(prompts)}. Build it again.")
    return tuple(prompts[-count:] if cell.kind == "tune" else prompts[:count])


def measure(components: Components, pair: Pair, cell: Cell) -> Values:
    """One value a problem (or text) of every figure; the same ones and draws for every arm."""
    scale, problems = SCALES[cell.scale], problems_of(cell, pair)

    def grade(prompt: Prompt, text: str, is_truncated: bool) -> bool:
        return grade_number(text, prompt.answer or "", is_truncated)

    k, model = scale.num_samples, components.student.model.eval()
    sampler = TransformersSampler(model, components.tokenizer, scale.evaluation_batch)
    result = run_benchmark(
        Benchmark(pair.task, problems, grade, pair.max_new_tokens),
        generate_with(sampler, SamplingConfig(num_samples=k), (_EVALUATION_SEED, cell.seed)),
        k,
    )
    sampler.close()
    rollouts = result.rollouts
    right = [float(bool(verdict)) for verdict in result.is_correct]
    return {
        "mean": _by_problem(right, k, fmean),
        "pass": _by_problem(right, k, max),
        "tokens": _by_problem([float(len(r.completion_ids)) for r in rollouts], k, fmean),
        "truncated": _by_problem([float(r.is_truncated) for r in rollouts], k, fmean),
        **compared(components, rollouts[: scale.num_scored * k : k], scale),
        "other_loss": other_loss(components, pair, scale.num_other_texts),
    }


def _by_problem(values: list[float], k: int, summed: Callable[[list[float]], float]) -> list[float]:
    return [float(summed(values[start : start + k])) for start in range(0, len(values), k)]


def compared(components: Components, rollouts: Sequence[Rollout], scale: Scale) -> Values:
    """Mean over the tokens of each completion of divergences from the teacher and of entropy."""
    names = ("reverse_kl", "forward_kl", "entropy")
    sums = torch.zeros(len(names), len(rollouts), dtype=torch.float64)
    count = torch.zeros(len(rollouts), dtype=torch.float64)
    pad = pad_id(components.tokenizer, components.student.vocab_size)
    student, teacher = components.student, components.teacher
    with torch.no_grad(), teacher.on_device():
        for batch in micro_batches(rollouts, 64, pad, max_tokens=scale.micro_batch_tokens):
            here = batch.to(student.model.device)
            stats = student(here, teacher.to_device(teacher.forward(batch)))
            rows = batch.completion.cpu()
            count.index_add_(0, rows, torch.ones(len(rows), dtype=torch.float64))
            for place, name in enumerate(names):
                sums[place].index_add_(0, rows, getattr(stats, name).double().cpu())
    means: list[list[float]] = (sums / count.clamp(min=1)).tolist()
    return dict(zip(names, means, strict=True))


def other_loss(components: Components, pair: Pair, num_texts: int) -> list[float]:
    """Mean cross-entropy of each text of another kind, nats a token; empty without such texts."""
    if pair.others is None:
        return []
    model = components.student.model
    lines = pair.others.read_text(encoding="utf-8").splitlines()[:num_texts]
    texts = [json.loads(line)["problem"] for line in lines]
    encoded = [components.tokenizer(text)["input_ids"][:OTHER_TOKENS] for text in texts]
    found: list[float] = []
    for start in range(0, len(encoded), _OTHER_BATCH):
        found += _losses(model, encoded[start : start + _OTHER_BATCH])
    return found


@torch.no_grad()
def _losses(model: Any, encoded: Sequence[list[int]]) -> list[float]:
    longest = max(map(len, encoded))
    ids = torch.zeros(len(encoded), longest, dtype=torch.long)
    targets = torch.full_like(ids, -100)
    for row, text in enumerate(encoded):
        ids[row, : len(text)] = torch.tensor(text)
        targets[row, : len(text) - 1] = torch.tensor(text[1:])
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits.float()
    targets = targets.to(model.device)
    nats: Tensor = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return [float(x) for x in (nats.sum(1) / (targets != -100).sum(1)).double().cpu()]
