"""Looking without training: evaluate a model, or score every token of its completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tutelage.core import TokenStats, quadrant_table, quadrants
from tutelage.data.batch import micro_batches
from tutelage.data.prompts import FileTask, Grader, PromptFormat, load_prompts
from tutelage.data.tasks import LedgerTask
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import ConfigError
from tutelage.evaluation.evaluate import Evaluation, Grade, evaluate
from tutelage.models.load import load_model, load_tokenizer
from tutelage.models.sampling import SamplingConfig, sample
from tutelage.models.tokenizers import pad_id
from tutelage.run.config import Config
from tutelage.run.setup import build


@dataclass(frozen=True)
class Inspection:
    """What `tutelage eval` and `tutelage sample` are asked for."""

    model: str
    prompts: str | None = None
    """JSONL file; None for the ledger task's held-out prompts."""
    grader: Grader = "number"
    chat: bool = False
    suffix: str = ""
    num_prompts: int = 64
    num_samples: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 64
    seed: int = 424242
    device: str = "cpu"


def evaluate_model(request: Inspection) -> Evaluation:
    """Sample and grade a model on held-out prompts.

    Raises:
        TutelageError: the model, the prompts or a setting cannot be used.
    """
    if request.num_prompts < 1:
        raise ConfigError(f"--num-prompts must be at least 1, got {request.num_prompts}.")
    sampling = SamplingConfig(
        request.temperature, request.top_p, 0, request.max_new_tokens, request.num_samples
    )
    prompts, grade = _problems(request)
    return evaluate(
        load_model(request.model, device=request.device),
        load_tokenizer(request.model),
        grade,
        prompts,
        sampling,
        (request.seed,),
        request.batch_size,
    )


def _problems(request: Inspection) -> tuple[Sequence[Prompt], Grade]:
    if request.prompts is None:
        ledger = LedgerTask()
        return ledger.held_out(request.num_prompts), ledger.grade
    columns = PromptFormat(chat=request.chat, suffix=request.suffix)
    prompts = load_prompts(request.prompts, columns, limit=request.num_prompts)
    return prompts, FileTask("prompts", tuple(prompts), request.grader).grade


def score(config: Config, num_prompts: int) -> tuple[list[dict[str, Any]], str]:
    """Statistics of every token that the student writes to held-out prompts, and a quadrant table.

    Args:
        config: names student, teacher, data and sampling.
        num_prompts: held-out prompts to complete.

    Returns:
        One plain record a token, and the table as text.
    """
    parts = build(config)
    prompts = parts.task.held_out(num_prompts)
    rollouts = sample(
        parts.student.model,
        parts.tokenizer,
        prompts,
        config.sampling,
        (config.seed, 0),
        config.sampling_batch_size,
    )
    tables = []
    for batch in micro_batches(rollouts, config.micro_batch_size, pad_id(parts.tokenizer)):
        batch = batch.to(parts.device)
        with parts.teacher.awake(), torch.no_grad():
            view = parts.teacher.view(parts.teacher.read(batch))
            tables.append(parts.student(batch, view))
    stats = TokenStats.cat(tables)
    quadrant = quadrants(stats.entropy, stats.reverse_kl, config.quadrant_thresholds)
    rows = _token_rows(parts.tokenizer, rollouts, stats, quadrant, parts.student.vocab_size)
    return rows, _table(quadrant, stats, config.quadrant_thresholds)


def _token_rows(
    tokenizer: Any,
    rollouts: list[Rollout],
    stats: TokenStats,
    quadrant: torch.Tensor,
    vocab_size: int,
) -> list[dict[str, Any]]:
    columns = {
        "entropy_nats": stats.entropy,
        "normalized_entropy": stats.entropy / torch.log(torch.tensor(float(vocab_size))),
        "reverse_kl_nats": stats.reverse_kl,
        "forward_kl_nats": stats.forward_kl,
        "teacher_entropy_nats": stats.teacher_entropy,
        "quadrant": quadrant,
    }
    values = [
        dict(zip(columns, row, strict=True))
        for row in zip(*map(torch.Tensor.tolist, columns.values()), strict=True)
    ]
    places = [
        {
            "prompt_id": rollout.prompt.id,
            "sample": rollout.sample,
            "position": position,
            "token_id": token,
            "token": tokenizer.decode([token]),
        }
        for rollout in rollouts
        for position, token in enumerate(rollout.completion_ids)
    ]
    return [place | value for place, value in zip(places, values, strict=True)]


def _table(quadrant: torch.Tensor, stats: TokenStats, thresholds: Any) -> str:
    everything = torch.ones(len(stats), dtype=torch.bool)
    table = quadrant_table(quadrant, stats.reverse_kl, everything)
    cut = "medians" if thresholds == "median" else f"{thresholds[0]} and {thresholds[1]} nats"
    lines = [f"quadrant  tokens  KL mass   (cuts: {cut})"]
    lines += [
        f"{name.upper():8}  {100 * row['share']:5.1f}%  {100 * row['kl_mass']:6.1f}%"
        for name, row in table.items()
    ]
    return "\n".join(lines)
