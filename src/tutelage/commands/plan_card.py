"""`tutelage check --card-gib`: the memory plan of cards that are not here, without any weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tutelage.config.schema import Config, FileData
from tutelage.errors import ConfigError
from tutelage.memory.cuda import plan_cuda
from tutelage.memory.facts import Facts
from tutelage.memory.meta_model import shapes
from tutelage.memory.plan import UNKNOWN_BYTES
from tutelage.models.load import load_model_config
from tutelage.models.reference import resolve_model
from tutelage.setup.process_counts import ProcessCounts

_CAPABILITY = (9, 0)
"""Of Hopper, whose libraries take more of a card than those before it."""


def plan_card(config: Config, card_gib: float, processes: ProcessCounts) -> Iterator[str]:
    """Lines on what each process of a run takes of a card and of main memory.

    Only the configurations of the models are read. Prompts are as long as they may be.

    Args:
        config: the run.
        card_gib: memory of a card, GiB.
        processes: of the run, one a card.

    Raises:
        TutelageError: the plan cannot be made.
    """
    prompt_tokens = config.data.max_prompt_tokens if isinstance(config.data, FileData) else 0
    if not prompt_tokens:
        raise ConfigError(
            f"--card-gib needs the longest prompt, got data.max_prompt_tokens = {prompt_tokens}. "
            "Set it, or leave --card-gib out to plan the machine that is here."
        )
    size, room = int(card_gib * (1 << 30)), UNKNOWN_BYTES * processes.per_host
    facts = Facts(size, size, _CAPABILITY, has_kernels=True, host_bytes=room)
    sides = (config.student, config.teacher)
    found = [load_model_config(resolve_model(side.model)) for side in sides]
    dtypes = [getattr(torch, side.dtype) for side in sides]
    student = shapes(found[0], dtypes[0], config.student)
    teacher = shapes(found[1], dtypes[1], quantization=config.teacher.quantization)
    yield "plan of cards that are not here, from the models' configurations; nothing was checked"
    copied = processes.copied_bytes(config, student, teacher)
    yield from plan_cuda(config, student, teacher, facts, prompt_tokens, processes, copied).lines()
