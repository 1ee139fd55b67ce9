"""From a configuration to models, tokenizer and task that are known to fit each other."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tutelage.data.batch import Batch
from tutelage.data.prompts import FileTask, PromptFormat, load_prompts
from tutelage.data.tasks import LedgerTask, Task
from tutelage.errors import ConfigError, ModelError
from tutelage.models.head import head, hidden_rows
from tutelage.models.load import load_model, load_tokenizer
from tutelage.models.prune import prune_layers
from tutelage.models.student import Student
from tutelage.models.teacher import Teacher
from tutelage.models.tokenizers import encode_prompt, shared_vocabulary, stop_swap
from tutelage.run.config import Config, FileData, LedgerData

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Parts:
    """Everything a run works with."""

    student: Student
    teacher: Teacher
    tokenizer: PreTrainedTokenizerBase
    task: Task
    device: torch.device


def build_task(data: LedgerData | FileData) -> Task:
    """The task of a `[data]` table."""
    if isinstance(data, LedgerData):
        return LedgerTask(data.num_items)
    prompts = load_prompts(data.path, prompt_format(data), split=data.split, subset=data.subset)
    name = Path(data.path).stem
    return FileTask(name, tuple(prompts), data.grader, num_held_out=data.num_held_out)


def prompt_format(data: LedgerData | FileData) -> PromptFormat:
    """How records of a file become prompts."""
    if isinstance(data, LedgerData):
        return PromptFormat()
    return PromptFormat(data.prompt_column, data.answer_column, data.chat, data.suffix)


def _without_long_prompts(task: Task, limit: int, tokenizer: PreTrainedTokenizerBase) -> Task:
    if not limit or not isinstance(task, FileTask):
        return task
    return task.without(lambda prompt: len(encode_prompt(tokenizer, prompt)) > limit)


def pick_device(name: str) -> torch.device:
    """The device of a configuration: `auto` takes CUDA where it is, else the CPU.

    Raises:
        ConfigError: the device is unknown or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and not (name == "cuda" and torch.cuda.is_available()):
        raise ConfigError(f"device must be auto, cpu or cuda and be present, got {name!r}.")
    return torch.device(name)


def _student(config: Config, saved: str | None, teacher: PreTrainedModel) -> PreTrainedModel:
    """The student's weights: saved ones as they are, or the configured start, perhaps pruned."""
    start = config.student
    if saved is not None:
        return load_model(saved, start.dtype)
    if (start.model, start.dtype) == (config.teacher.model, config.teacher.dtype):
        model = copy.deepcopy(teacher)  # reading a GGUF file twice takes many seconds
    else:
        model = load_model(start.model, start.dtype)
    return model if start.num_layers is None else prune_layers(model, start.num_layers)


def warnings_of(config: Config) -> list[str]:
    """What a user should know before the run: legal settings that seldom do what is meant."""
    sampling, found = config.sampling, []
    if (sampling.temperature, sampling.top_p, sampling.top_k) != (1.0, 1.0, 0):
        found.append(
            "completions are not drawn from the distribution that is trained "
            "(sampling.temperature, top_p or top_k differ from 1, 1, 0)"
        )
    if config.student.dtype == "bfloat16":
        found.append(
            "bfloat16 weights round away updates below about 1/256 of a weight; "
            "use float32, or a learning rate of 1e-4 and more"
        )
    return found


def _check_head(model: PreTrainedModel, who: str, vocab_size: int) -> None:
    """Refuses an architecture whose logits are more than its head says (unknown multipliers)."""
    ids = torch.arange(4, device=model.device)[None] % vocab_size
    place = torch.arange(4, device=model.device)
    batch = Batch(ids, torch.ones_like(ids), place[None], place, ids[0], ids[0] * 0, place)
    with torch.no_grad():
        ours = head(model, hidden_rows(model, batch), vocab_size).block(0, 4)
        theirs = model(input_ids=ids, use_cache=False).logits[0, :, :vocab_size].to(ours)
    gap, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
    if gap > 0.02 * max(size, 1e-6):
        raise ModelError(
            f"the {who}'s logits are not its head times its hidden states: {type(model).__name__} "
            f"differs by {gap:.3g} of {size:.3g}. This architecture is not supported yet."
        )


def build(config: Config, student_model: str | None = None) -> Parts:
    """Load both models, shake hands over their tokenizers and build the task.

    Args:
        config: the run's configuration.
        student_model: where the student's weights are; None for the configured start.

    Raises:
        TutelageError: a model, a tokenizer or the data cannot be used together.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    task = build_task(config.data)  # the cheapest thing that can be wrong comes first
    device = pick_device(config.device)
    tokenizer = load_tokenizer(config.student.model)
    if isinstance(config.data, FileData):
        task = _without_long_prompts(task, config.data.max_prompt_tokens, tokenizer)
    teacher_tokenizer = load_tokenizer(config.teacher.model)
    resting = "cpu" if config.teacher.offload else str(device)
    teacher = load_model(config.teacher.model, config.teacher.dtype, resting)
    student = _student(config, student_model, teacher).to(device)
    vocab_size = shared_vocabulary(
        tokenizer,
        teacher_tokenizer,
        student.get_output_embeddings().weight.shape[0],
        teacher.get_output_embeddings().weight.shape[0],
    )
    _check_head(student, "student", vocab_size)
    if not config.teacher.offload:  # half precision on the CPU may lack kernels
        _check_head(teacher, "teacher", vocab_size)
    return Parts(
        Student(student, vocab_size),
        Teacher(
            teacher,
            vocab_size,
            device,
            config.teacher.offload,
            stop_swap(tokenizer, teacher_tokenizer, config.teacher.stop_token),
        ),
        tokenizer,
        task,
        device,
    )
