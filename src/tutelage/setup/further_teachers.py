"""Loads the further teachers of a run and gathers them with the first one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tutelage.config.schema import Config, FileData
from tutelage.models.head import output_embeddings
from tutelage.models.load import load_tokenizer
from tutelage.models.teacher_protocol import AnyTeacher
from tutelage.models.tokenizers import (
    eos_remap,
    refuse_different_vocabularies,
    refuse_remap_beyond,
    shared_vocabulary,
)
from tutelage.setup.inputs import PromptStats
from tutelage.setup.phases import PhaseCallback
from tutelage.setup.teacher import build_teacher, load_teacher, try_teacher
from tutelage.setup.warnings import context_warnings
from tutelage.teachers.group import TeacherGroup

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class FurtherTeacher:
    """One of `[teachers.NAME]`, loaded."""

    name: str
    config: Config
    """The run as if it had no other teacher."""
    load: Callable[[], PreTrainedModel]
    model: PreTrainedModel
    vocab_size: int
    """Ids that it shares with the student."""
    remap: tuple[int, int] | None
    """End-of-sequence ids of the student and of it where they differ."""


def load_further_teachers(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    num_student_ids: int,
    device: torch.device,
    on_phase: PhaseCallback,
) -> list[FurtherTeacher]:
    """Every one of `[teachers.NAME]`, whose tokenizer agrees with the student's.

    Args:
        config: the run.
        tokenizer: the student's.
        num_student_ids: rows of the student's head.
        device: the run's.
        on_phase: receives which model is being loaded.

    Raises:
        TutelageError: a model cannot be loaded, or a tokenizer differs.
    """
    found, data = [], config.data
    if isinstance(data, FileData):
        data = replace(data, teacher_column=None)
    for name, teacher in config.teachers.items():
        alone = replace(config, teacher=teacher, teachers={}, data=data)
        other = load_tokenizer(teacher.model)
        refuse_different_vocabularies(tokenizer, other)
        remap = eos_remap(tokenizer, other, teacher.stop_token)
        on_phase(f"loading the teacher {name}, {teacher.model}")
        load = load_teacher(alone, device)
        model = load()
        num_ids = output_embeddings(model).weight.shape[0]
        vocab_size = shared_vocabulary(tokenizer, other, num_student_ids, num_ids)
        found.append(FurtherTeacher(name, alone, load, model, vocab_size, remap))
    return found


def few_positions(
    config: Config, prompts: PromptStats | None, further: Sequence[FurtherTeacher]
) -> Iterator[str]:
    """Warnings of teachers with too few positions for the longest prompt and completion.

    Raises:
        ConfigError: one cannot have more.
    """
    if prompts is not None:
        sides = [(f"teacher {one.name}", one.model, prompts.longest) for one in further]
        yield from context_warnings(config, sides)


def gathered(
    config: Config,
    first: AnyTeacher | None,
    further: Sequence[FurtherTeacher],
    vocab_size: int,
    device: torch.device,
    scratch: Path | None,
    is_run: bool,
) -> tuple[AnyTeacher | None, list[str]]:
    """The first teacher and the others as one, tried, with warnings; alone it stays itself.

    Raises:
        ModelError: one of them does not compute what it should.
    """
    if first is None:
        return None, []
    is_tried = is_run or config.teacher.sharding == "none"
    teachers, notes = {"": first}, try_teacher(config, first) if is_tried else []
    for one in further:
        refuse_remap_beyond(one.remap, vocab_size)
        loading = (one.load, vocab_size, device, one.remap, scratch, is_run)
        teachers[one.name] = build_teacher(one.config, one.model, *loading)
        notes += [f"teacher {one.name}: {n}" for n in try_teacher(one.config, teachers[one.name])]
    return (TeacherGroup(teachers) if further else first), notes
