"""`tutelage check --card-gib`: the memory plan of cards that are not here, without any weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from tutelage.config.schema import Config, FileData
from tutelage.config.teachers import AnyTeacher, HiddenServerTeacher, LogprobServerTeacher
from tutelage.config.verifiers import VerifiersData
from tutelage.errors import ConfigError
from tutelage.memory.cuda import plan_cuda
from tutelage.memory.facts import Facts
from tutelage.memory.further_teachers import with_further
from tutelage.memory.meta_model import shadow, shapes
from tutelage.memory.plan import UNKNOWN_BYTES
from tutelage.models.head_model import head_shape_model
from tutelage.models.load import load_model_config, load_tokenizer
from tutelage.models.reference import resolve_model
from tutelage.setup.inputs import Inputs, build_task, told_fields
from tutelage.setup.process_counts import ProcessCounts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CAPABILITY = (9, 0)
"""Of Hopper, whose libraries take more of a card than those before it."""


def plan_card(config: Config, card_gib: float, processes: ProcessCounts) -> Iterator[str]:
    """Lines on what each process of a run takes of a card and of main memory.

    Only the configurations of the models are read. Prompts are as long as they may be, or as those
    of the first step where they are generated.

    Args:
        config: the run.
        card_gib: memory of a card, GiB.
        processes: of the run, one a card.

    Raises:
        TutelageError: the plan cannot be made.
    """
    prompt_tokens = _prompt_tokens(config)
    size, room = int(card_gib * (1 << 30)), UNKNOWN_BYTES * processes.per_host
    facts = Facts(size, size, _CAPABILITY, has_kernels=True, host_bytes=room)
    start = config.student
    found = load_model_config(resolve_model(start.model))
    student = shapes(found, getattr(torch, start.dtype), start)
    teacher = _shapes(config.teacher)
    further = {name: _shapes(one) for name, one in config.teachers.items()}
    yield "plan of cards that are not here, from the models' configurations; nothing was checked"
    if told_fields(config) and isinstance(config.data, FileData):
        yield "the tokens that teacher.context adds to a prompt are not counted"
    copied = processes.copied_bytes(config, student, teacher)
    plan = plan_cuda(config, student, teacher, facts, prompt_tokens, processes, copied)
    yield from with_further(config, plan, further).lines(config)


def _shapes(teacher: AnyTeacher) -> PreTrainedModel:
    """A teacher without numbers; of one on a server the head."""
    found = load_model_config(resolve_model(teacher.model))
    dtype = getattr(torch, teacher.dtype)
    if isinstance(teacher, HiddenServerTeacher | LogprobServerTeacher):
        return shadow(head_shape_model(found, dtype))
    return shapes(found, dtype, quantization=teacher.quantization)


def _prompt_tokens(config: Config) -> int:
    """Length of the longest prompt.

    Raises:
        TutelageError: a file's is not limited, or a generated task cannot be asked here.
    """
    data, instead = config.data, "leave --card-gib out to plan the machine that is here."
    if isinstance(data, FileData):
        if not data.max_prompt_tokens:
            raise ConfigError(
                "--card-gib needs the longest prompt, got data.max_prompt_tokens = 0. Set it, or "
                f"{instead}"
            )
        return data.max_prompt_tokens
    if isinstance(data, VerifiersData):
        raise ConfigError(
            f"--card-gib starts no environments, got data.kind = {data.kind!r}. Use a task that "
            f"comes with tutelage or data.kind = 'file', or {instead}"
        )
    tokenizer = load_tokenizer(config.student.model)
    inputs = Inputs(torch.device("cpu"), build_task(data), tokenizer, tokenizer, None)
    return inputs.measure_prompts(config).longest_read
