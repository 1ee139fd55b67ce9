"""Loads what a run needs besides weights: device, task and tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tutelage.config.conversations import (
    ConversationData,
    LedgerToolsData,
    ShoppingData,
    TravelData,
)
from tutelage.config.models import TeacherConfig
from tutelage.config.schema import CoinsData, Config, DataConfig, FileData, LedgerData
from tutelage.config.self_teacher import SelfTeacher
from tutelage.config.suggest import did_you_mean_value
from tutelage.config.verifiers import VerifiersData
from tutelage.data.prompts import FileTask, PromptFormat, load_prompts
from tutelage.data.tasks import CoinsTask, LedgerTask, Task
from tutelage.data.types import Prompt
from tutelage.envs.environment import AgentTask, opened
from tutelage.envs.ledger_tools import LedgerToolsTask
from tutelage.envs.shopping import ShoppingTask
from tutelage.envs.travel import TravelTask
from tutelage.envs.verifiers import Loading, VerifiersTask, Worker
from tutelage.errors import ConfigError, DataError
from tutelage.models.chat.tool_format import format_of
from tutelage.models.chat.tool_prompt import with_tools
from tutelage.models.device import find_device
from tutelage.models.load import load_tokenizer
from tutelage.models.privileged import PrivilegedReading
from tutelage.models.reference import tokenizer_place
from tutelage.models.tokenizers import encode_prompt, eos_remap, refuse_different_vocabularies

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptStats:
    """Tokens of the prompts that a run uses."""

    shortest: int
    longest: int
    num_tokens: int
    num_unknown: int
    """Tokens, of all, that stand for text which the tokenizer does not know."""
    unknown: str | None
    """The text of that token; None where the tokenizer has none."""
    is_chat: bool
    """Whether any of them is rendered with the chat template."""
    num_ended: int = 0
    """Prompts that end with the end-of-sequence token, spaces aside."""
    longest_told: int = 0
    """Tokens of the longest prompt of a teacher that is told more, or that has another tokenizer;
    0 where none is."""
    longest_told_id: str = ""
    """The prompt that it belongs to."""

    @property
    def longest_read(self) -> int:
        """Tokens of the longest prompt that either model reads."""
        return max(self.longest, self.longest_told)


@dataclass(frozen=True)
class Inputs:
    """Everything that is loaded before any weights."""

    device: torch.device
    task: Task
    tokenizer: PreTrainedTokenizerBase
    """The student's."""
    teacher_tokenizer: PreTrainedTokenizerBase
    remap: tuple[int, int] | None
    """End-of-sequence ids of student and teacher where they differ."""
    prompts: PromptStats | None = None
    """Known once the prompts were validated."""
    has_teacher: bool = True
    """False where all that the steps need of the teacher is stored: its tokenizer is not read."""
    warnings: tuple[str, ...] = ()

    def measure_prompts(self, config: Config) -> PromptStats:
        """Encode every prompt that the run uses: of a generated task, those of the first step.

        Raises:
            DataError: one of them cannot be encoded.
        """
        thinks = thinking(config.data)
        unknown = self.tokenizer.unk_token_id
        prompts = _used_prompts(self.task, config)
        if isinstance(self.task, AgentTask) and isinstance(config.data, ConversationData):
            tool_format = format_of(self.tokenizer, config.data.tool_format)
            prompts = [opened(self.task.environment(), prompt) for prompt in prompts]
            prompts = [with_tools(self.tokenizer, prompt, tool_format) for prompt in prompts]
        counts, num_ended, longest_told = [], 0, (0, "")
        reading = privileged_reading(config, self.tokenizer)
        for prompt in prompts:
            if reading is not None:
                longest_told = max(longest_told, (len(reading.prompt_ids(prompt)), prompt.id))
            elif is_aligned(config):
                theirs = encode_prompt(self.teacher_tokenizer, prompt, thinks)
                longest_told = max(longest_told, (len(theirs), prompt.id))
            ids = encode_prompt(self.tokenizer, prompt, thinks)
            counts.append((len(ids), 0 if unknown is None else ids.count(unknown)))
            num_ended += _is_ended(self.tokenizer, ids)
        lengths = [length for length, _ in counts]
        is_chat = any(not isinstance(prompt.content, str) for prompt in prompts)
        num_unknown = sum(number for _, number in counts)
        name = self.tokenizer.unk_token
        counted = (min(lengths), max(lengths), sum(lengths), num_unknown)
        return PromptStats(*counted, name, is_chat, num_ended, *longest_told)


def _is_ended(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> bool:
    end = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] == tokenizer.eos_token_id), None)
    return end is not None and not tokenizer.decode(ids[end + 1 :]).strip()


def _used_prompts(task: Task, config: Config) -> list[Prompt]:
    """Prompts of all steps, or of the first where they are generated, and held-out ones."""
    held_out = task.held_out(max(config.evaluation.num_problems, config.recording.num_prompts))
    size = config.prompts_per_step
    if not isinstance(task, FileTask):
        return [*task.prompts(0, size, config.seed), *held_out]
    if config.num_steps * size >= len(task.training):
        return [*task.training, *held_out]
    steps = range(config.num_steps)
    return [p for step in steps for p in task.prompts(step, size, config.seed)] + held_out


def load_inputs(config: Config, has_teacher: bool = True) -> Inputs:
    """Device, task and tokenizers of a run.

    Args:
        config: the run.
        has_teacher: False leaves the teacher's tokenizer out.

    Raises:
        TutelageError: one of them cannot be used, or the tokenizers differ.
    """
    task = build_task(config.data, told_fields(config))  # first, as it takes the least time
    device = pick_device(config.device)
    if config.student.quantization == "4bit" and device.type == "cpu":
        raise ConfigError(
            "student.quantization '4bit' needs CUDA: on a CPU, bitsandbytes gives no gradient "
            "through 4-bit weights. Use 8bit or none."
        )
    tokenizer = load_tokenizer(config.student.model)
    is_shared = not has_teacher or tokenizer_place(config.student.model) == tokenizer_place(
        config.teacher.model
    )
    teacher = tokenizer if is_shared else load_tokenizer(config.teacher.model)
    if not is_aligned(config):
        refuse_different_vocabularies(tokenizer, teacher)
    remap = eos_remap(tokenizer, teacher, config.teacher.stop_token)
    task = without_long_prompts(task, config.data, tokenizer)
    refuse_unknown_teachers(config, task)
    return Inputs(device, task, tokenizer, teacher, remap, has_teacher=has_teacher)


def is_aligned(config: Config) -> bool:
    """Whether the teacher has another tokenizer."""
    return isinstance(config.teacher, TeacherConfig) and config.teacher.vocabulary == "aligned"


def refuse_unknown_teachers(config: Config, task: Task) -> None:
    """Every prompt names a teacher that there is, and every teacher has a prompt.

    Raises:
        DataError: a prompt names another.
        ConfigError: no prompt to train on names one of `[teachers.NAME]`.
    """
    if not config.teachers or not isinstance(task, FileTask):
        return
    known = ", ".join(f"[teachers.{name}]" for name in config.teachers)
    for prompt in (*task.training, *task.held_out(len(task.training))):
        if prompt.teacher and prompt.teacher not in config.teachers:
            raise DataError(
                f"prompt {prompt.id!r} names the teacher {prompt.teacher!r}, but there are "
                f"{known}. Add its table, or change the record."
            )
    named = {prompt.teacher for prompt in task.training}
    for name in config.teachers:
        if name not in named:
            raise ConfigError(
                f"no prompt to train on names the teacher {name!r} in the column "
                f"{config.data.teacher_column!r}. Remove [teachers.{name}], or name it."  # type: ignore[union-attr]
            )


def told_fields(config: Config) -> tuple[str, ...]:
    """What a teacher with a context reads of each prompt's record."""
    return config.teacher.fields if isinstance(config.teacher, SelfTeacher) else ()


def privileged_reading(
    config: Config, tokenizer: PreTrainedTokenizerBase
) -> PrivilegedReading | None:
    """The prompts of a teacher that is told more; None for one that reads the student's."""
    teacher = config.teacher
    if not isinstance(teacher, SelfTeacher) or not teacher.context:
        return None
    return PrivilegedReading(tokenizer, teacher.context, teacher.fields, thinking(config.data))


def build_task(data: DataConfig, fields: tuple[str, ...] = ()) -> Task:
    """The task of a `[data]` table, with what else is read of each record of a file."""
    if isinstance(data, LedgerData):
        return LedgerTask(data.num_items)
    if isinstance(data, CoinsData):
        return CoinsTask()
    if isinstance(data, LedgerToolsData):
        return LedgerToolsTask(data.num_items)
    if isinstance(data, ShoppingData):
        return ShoppingTask(data.level, data.num_products, max_items=data.max_items)
    if isinstance(data, TravelData):
        return TravelTask(data.level)
    if isinstance(data, VerifiersData):
        return _verifiers_task(data)
    prompts = load_prompts(
        data.path, prompt_format(data, fields), split=data.split, subset=data.subset
    )
    name = Path(data.path).stem
    return FileTask(name, tuple(prompts), data.grader, num_held_out=data.num_held_out)


def _verifiers_task(data: VerifiersData) -> VerifiersTask:
    loading = Loading(
        data.environment,
        data.arguments,
        data.python,
        data.max_turns,
        data.num_tasks,
        data.timeout_s,
    )
    return VerifiersTask(Path(data.environment).stem, Worker(loading), data.num_held_out)


def grader_of(task: Task) -> str:
    """Name of a task's grader: a file's `grader`, or the task itself."""
    return task.grader if isinstance(task, FileTask) else task.name


def prompt_format(data: DataConfig, fields: tuple[str, ...] = ()) -> PromptFormat:
    """How records of a file become prompts."""
    if not isinstance(data, FileData):
        return PromptFormat()
    columns = (data.prompt_column, data.answer_column, data.chat, data.suffix)
    return PromptFormat(*columns, fields=fields, teacher_column=data.teacher_column)


def without_long_prompts(task: Task, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The task without prompts over `data.max_prompt_tokens`."""
    if not isinstance(data, FileData) or not isinstance(task, FileTask):
        return task
    limit, thinks = data.max_prompt_tokens, data.enable_thinking
    if not limit:
        return task
    return task.without(lambda prompt: len(encode_prompt(tokenizer, prompt, thinks)) > limit)


def thinking(data: DataConfig) -> bool | None:
    """What a `[data]` table passes to the chat template as `enable_thinking`."""
    return None if isinstance(data, LedgerData | CoinsData) else data.enable_thinking


def pick_device(name: str) -> torch.device:
    """The device of a configuration: `auto` takes CUDA where it is, else the CPU.

    Raises:
        ConfigError: the device is unknown or not there.
    """
    if name not in ("auto", "cpu", "cuda"):
        hint = did_you_mean_value(name, ("auto", "cpu", "cuda"))
        raise ConfigError(
            f"device must be auto, cpu or cuda, got {name!r}.{hint} auto takes cuda where it is."
        )
    return find_device(name)
