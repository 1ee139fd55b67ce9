"""`tutelage check --dry-run`: one real step of a recipe on tiny random models of its kinds."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tutelage.data.formats import find_file, is_file_name
from tutelage.data.prompts import load_prompts
from tutelage.data.suites import SETS
from tutelage.data.types import Prompt
from tutelage.errors import DataError, RunError
from tutelage.models.tiny import architecture, save_tiny_model, tiny_tokenizer
from tutelage.models.tokenizers import vocabulary_size
from tutelage.run.config import Config, FileData, TransformersEngine
from tutelage.run.inputs import pick_device, prompt_format
from tutelage.run.parse import flat_values, to_table
from tutelage.run.train import train

_NUM_PROMPTS = 16
_NUM_READ = 256
_PADDING = (8, 136)
"""Rows of a tiny head that no token uses: of the smaller vocabulary, and of a larger one."""
_LEAST_NORM = 1e-6
"""A smaller gradient is rounding; those of the tiny models are about one."""
_BUILT_IN = (
    Prompt("dry/1", "What is 17 + 25?", "42"),
    Prompt("dry/2", "A train has 6 cars with 48 seats each. How many seats are there?", "288"),
    Prompt("dry/3", "Find x if 3x - 4 = 11.", "5"),
)


def dry_run(config: Config) -> Iterator[str]:
    """Lines on what was scaled and what one step of the run did.

    The step keeps the recipe's selection, objective, weighting, optimizer, dtypes and memory modes.

    Raises:
        TutelageError: the recipe does not run.
    """
    with tempfile.TemporaryDirectory(prefix="tutelage-dry-run-") as name:
        folder = Path(name)
        yield from _models(config, folder)
        prompts, source = _prompts(config)
        _write(prompts, folder / "prompts.jsonl")
        yield f"data: {len(prompts)} prompts of {source}"
        small = _scaled(config, folder)
        yield from (f"scaled: {line}" for line in _changes(config, small))
        steps: list[dict[str, Any]] = []
        train(small, say=_say_nothing, on_step=steps.append)
        yield _outcome(steps)


def _models(config: Config, folder: Path) -> Iterator[str]:
    found = [architecture(side.model) for side in (config.student, config.teacher)]
    rows = [side.config.vocab_size for side in found]
    num_ids = vocabulary_size(tiny_tokenizer())
    sides = (("student", config.student.model), ("teacher", config.teacher.model))
    for seed, ((who, ref), side) in enumerate(zip(sides, found, strict=True)):
        num_rows = num_ids + _PADDING[rows[seed] > min(rows)]
        kind = save_tiny_model(side, num_rows, seed, folder / who)
        tied = "tied" if side.config.tie_word_embeddings else "untied"
        yield (
            f"{who}: a tiny random {kind}, {tied} head of {num_rows} rows, for {ref} "
            f"({side.origin}: {rows[seed]:,} rows)"
        )


def _prompts(config: Config) -> tuple[list[Prompt], str]:
    """Short prompts of the recipe's own data where they lie here, else built-in ones."""
    data = config.data
    if not isinstance(data, FileData):
        return list(_BUILT_IN), "a built-in list"
    try:
        if data.path in SETS:
            is_here = SETS[data.path].local_file() is not None
        else:
            is_here = is_file_name(data.path) and find_file(data.path).is_file()
    except DataError:
        is_here = False
    if not is_here:
        return list(_BUILT_IN), f"a built-in list; {data.path} is not here"
    every = load_prompts(data.path, prompt_format(data), limit=_NUM_READ)
    shortest = sorted(every, key=lambda prompt: len(json.dumps(prompt.content)))
    return shortest[:_NUM_PROMPTS], f"{data.path}, the shortest of its first {len(every)}"


def _write(prompts: list[Prompt], path: Path) -> None:
    records = (
        {"id": p.id, "prompt": p.content, "answer": p.answer, "tools": p.tools} for p in prompts
    )
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


def _scaled(config: Config, folder: Path) -> Config:
    """The run with the tiny models, few and short completions, and one step."""
    student = replace(config.student, model=str(folder / "student"))
    if student.num_layers is not None:
        student = replace(student, num_layers=1)
    if student.quantization == "4bit" and pick_device(config.device).type == "cpu":
        student = replace(student, quantization="none")
    path = str(folder / "prompts.jsonl")
    data = config.data if isinstance(config.data, FileData) else FileData("file", path, chat=False)
    updates, sampling = config.updates_per_step, config.sampling
    return replace(
        config,
        student=student,
        teacher=replace(config.teacher, model=str(folder / "teacher")),
        data=replace(
            data,
            path=path,
            subset=None,
            prompt_column="prompt",
            answer_column="answer",
            suffix=None,
            max_prompt_tokens=0,
            num_held_out=0,
        ),
        sampling=replace(
            sampling,
            num_samples=min(2, sampling.num_samples),
            max_new_tokens=min(16, sampling.max_new_tokens),
        ),
        engine=TransformersEngine(),
        evaluation=replace(config.evaluation, num_problems=0),
        num_steps=1,
        prompts_per_step=updates if updates > 1 else min(2, config.prompts_per_step),
        trackers=(),
        out=str(folder / "run"),
    )


def _changes(before: Config, after: Config) -> Iterator[str]:
    """What was scaled, apart from where models, data and results are."""
    old, new = flat_values(to_table(before)), flat_values(to_table(after))
    for key in sorted(old.keys() & new.keys()):
        is_place = key == "out" or key.endswith((".model", ".path", "_column", ".subset"))
        if old[key] != new[key] and not is_place:
            yield f"{key} {old[key]} -> {new[key]}"


def _outcome(steps: list[dict[str, Any]]) -> str:
    (metrics,) = steps
    if not math.isfinite(metrics["loss"]) or not metrics["grad_norm"] > _LEAST_NORM:
        raise RunError(
            f"the dry run's step taught nothing: loss {metrics['loss']}, gradient norm "
            f"{metrics['grad_norm']}. Check the objective and the selection."
        )
    return (
        f"one step ran: loss {metrics['loss']:.4f}, gradient norm {metrics['grad_norm']:.3g}, "
        f"{metrics['num_kept']} of {metrics['num_rows']} tokens taught"
    )


def _say_nothing(_: str) -> None:
    """A dry run keeps its run's voice to itself."""
