"""`tutelage check`: load a run's models and data, check that they fit, and plan its memory."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.commands.decontaminate import ALL, decontaminate
from tutelage.commands.dry_run import dry_run
from tutelage.commands.plan_card import plan_card
from tutelage.config.conversations import ConversationData
from tutelage.config.rollouts import LiveRollouts
from tutelage.config.schema import Config
from tutelage.config.selection import AllTokens, ExtremeTokens, FirstTokens
from tutelage.config.self_teacher import SelfTeacher
from tutelage.config.teachers import HiddenServerTeacher, LogprobServerTeacher
from tutelage.envs.environment import AgentTask
from tutelage.errors import ConfigError
from tutelage.memory.cuda import plan_run
from tutelage.memory.stored import stored_rollout_bytes, stored_state_bytes
from tutelage.models.chat.tool_format import format_of
from tutelage.models.teacher_shards import require_shardable_teacher
from tutelage.setup.components import Components, build_components
from tutelage.setup.inputs import Inputs, PromptStats
from tutelage.setup.process_counts import ONE_PROCESS, ProcessCounts
from tutelage.setup.run_folder import run_folder
from tutelage.setup.validate import validate
from tutelage.teachers.group import TeacherGroup
from tutelage.train.disk import plan_disk

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run(config: Config, arguments: argparse.Namespace) -> int:
    """Print what `check`, `--dry-run` and `--decontaminate` find."""
    allowed = tuple(arguments.allow_change)
    if arguments.dry_run and allowed:
        raise ConfigError(
            f"--allow-change {allowed[0]} is for continuing a run, and --dry-run has a run of its "
            "own. Give one of the two."
        )
    processes = ProcessCounts(arguments.processes or 1, arguments.hosts or 1)
    for line in _lines(config, arguments, processes):
        print(line, flush=True)
    if arguments.decontaminate is not None:
        for line in decontaminate(config, arguments.decontaminate or ALL):
            print(line)
    return 0


def _lines(
    config: Config, arguments: argparse.Namespace, processes: ProcessCounts
) -> Iterator[str]:
    """What was asked for.

    Raises:
        ConfigError: options that have no effect on one another.
    """
    allowed, card = tuple(arguments.allow_change), arguments.card_gib
    is_planned = arguments.processes or arguments.hosts or card
    if arguments.dry_run and is_planned:
        raise ConfigError(
            "--processes, --hosts and --card-gib are for the memory plan, and --dry-run makes "
            f"none, got {processes.count} processes. Give one of the two."
        )
    if card and allowed:
        raise ConfigError(
            f"--allow-change {allowed[0]} is for continuing a run, and --card-gib looks at none. "
            "Give one of the two."
        )
    if arguments.dry_run:
        return dry_run(config)
    if card:
        return plan_card(config, card, processes)
    return check(config, Path(arguments.config).stem, allowed, processes)


def check(
    config: Config,
    name: str,
    allow_change: tuple[str, ...] = (),
    processes: ProcessCounts = ONE_PROCESS,
) -> Iterator[str]:
    """Lines on models, tokenizers and data that fit each other, and on what the run will do.

    Args:
        config: the run.
        name: stem of the default folder's name.
        allow_change: keys that may differ from the run that is to be continued.
        processes: of the run whose memory is planned.

    Raises:
        TutelageError: something does not fit.
    """
    inputs = validate(config, run_folder(config, name), processes.count, allow_change)
    components = build_components(config, inputs=inputs, is_run=False)
    prompts = inputs.prompts or inputs.measure_prompts(config)
    yield _model_line("student", components.student.model)
    yield from _teacher_lines(config, components, prompts)
    yield from _sharding_lines(config, components, processes)
    yield _vocabulary_line(components)
    num_held_out = len(components.task.held_out(config.evaluation.num_problems))
    yield (
        f"data: task {components.task.name}, prompts of {prompts.shortest} to {prompts.longest} "
        f"tokens, {num_held_out} held out for evaluation"
    )
    if isinstance(config.data, ConversationData):
        yield _conversations_line(config, config.data, inputs)
    selection = config.selection
    kept = "every token"
    if isinstance(selection, FirstTokens):
        kept = f"the first {selection.num_tokens} tokens"
    elif not isinstance(selection, AllTokens):
        kept = f"{100 * selection.keep:.3g} % of tokens"
        if isinstance(selection, ExtremeTokens) and selection.end == "both":
            kept += " at each end"
    yield (
        f"run: {config.num_steps} steps of {config.prompts_per_step} prompts x "
        f"{config.sampling.num_samples} completions, rule {selection.rule} keeps {kept}"
    )
    yield from _stored_lines(config, components, run_folder(config, name), prompts.longest)
    yield from plan_run(config, components, prompts.longest_read, processes).lines(config)
    disk = plan_disk(config, components, run_folder(config, name), prompts.longest)
    yield f"run: {disk}"
    disk.require()
    yield from components.teacher.notices
    yield from (f"warning: {line}" for line in components.warnings)
    yield f"folder: {run_folder(config, name)} on {components.device}"


def _stored_lines(
    config: Config, components: Components, folder: Path, longest: int
) -> Iterator[str]:
    """What is stored of rollouts before the first step, if anything is."""
    if isinstance(config.rollouts, LiveRollouts):
        if length := config.rollouts.teacher_prefix_tokens:
            yield (
                f"rollouts: the teacher samples the first {length} tokens of each completion in "
                f"step 1, none after step {config.rollouts.teacher_prefix_steps}"
            )
        return
    size = stored_rollout_bytes(config, longest, config.num_steps)
    source = config.rollouts.path or "sampled by the initial student"
    yield (
        f"rollouts: {config.rollouts.source}, of all steps, {source}; about {size:,} bytes of "
        f"them in {folder / 'rollouts'} before the first step"
    )
    states = stored_state_bytes(config, components.teacher.head_shape[1])
    if states:
        size += states + components.teacher.head_bytes
        yield f"teacher: about {states:,} bytes of its hidden states are stored with them"
    if size > config.rollouts.max_bytes:
        most = config.rollouts.max_bytes
        yield f"warning: about {size:,} bytes are more than rollouts.max_bytes = {most:,}"


def _sharding_lines(
    config: Config, components: Components, processes: ProcessCounts
) -> Iterator[str]:
    """How processes are to hold the teacher together, if they are."""
    kind, size = config.teacher.sharding, config.teacher.sharding_group_size
    if kind == "none":
        return
    with components.teacher.on_device():
        who, count = f"teacher {config.teacher.model!r}", size or processes.count
        require_shardable_teacher(components.teacher.model, kind, who, count)
    yield (
        f"teacher: cut by {kind} over {size or 'all'} processes; its forward pass is tried when "
        "they start"
    )
    if config.evaluation.teacher and config.evaluation.num_problems:
        yield (
            "warning: several processes that hold the teacher together cannot evaluate it. Set "
            "evaluation.teacher = false"
        )


def _conversations_line(config: Config, data: ConversationData, inputs: Inputs) -> str:
    limits = [
        f"{data.max_turns} turns",
        f"{config.sampling.max_new_tokens} generated tokens",
        *([f"{data.max_turn_tokens} of them a turn"] if data.max_turn_tokens else []),
        f"{data.max_inserted_tokens} inserted tokens",
    ]
    how = "calls by the renderer"
    if isinstance(inputs.task, AgentTask):
        how = f"calls in the format {format_of(inputs.tokenizer, data.tool_format)}"
    return f"conversations: {how}; at most {', '.join(limits)}"


def _vocabulary_line(components: Components) -> str:
    size, shared = components.student.vocab_size, components.student.shared
    if shared is None:
        return f"vocabulary: {size:,} ids shared; tokenizers agree"
    return (
        f"vocabulary: {len(shared.pairs[0]):,} of the student's {size:,} ids shared with the "
        f"teacher's tokenizer, which has {shared.sizes[1]:,}"
    )


def _teacher_lines(config: Config, components: Components, prompts: PromptStats) -> Iterator[str]:
    """A line on each teacher."""
    if isinstance(config.teacher, SelfTeacher):
        yield _self_line(config.teacher, prompts)
        return
    loaded = components.teacher
    several = loaded.teachers if isinstance(loaded, TeacherGroup) else {"": loaded}
    for name, teacher in several.items():
        table = config.teachers[name] if name else config.teacher
        is_served = isinstance(table, HiddenServerTeacher | LogprobServerTeacher)
        who = f"teacher {name}" if name else "teacher"
        with teacher.on_device():
            line = _model_line(f"the {who}'s head" if is_served else who, teacher.model)
        yield line


def _self_line(teacher: SelfTeacher, prompts: PromptStats) -> str:
    kept = f", average of decay {teacher.ema_decay}" if teacher.ema_decay is not None else ""
    reads = "the student's prompts"
    if prompts.longest_told:
        reads = f"prompts of up to {prompts.longest_told} tokens with its context"
    return f"teacher: the student itself, weights {teacher.weights}{kept}; it reads {reads}"


def _model_line(who: str, model: PreTrainedModel) -> str:
    size = sum(p.numel() for p in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = f", {trained:,} trained" if 0 < trained < size else ""
    return f"{who}: {type(model).__name__}, {size:,} parameters, {dtype}{share}"
