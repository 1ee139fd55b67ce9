"""The checks of `check` and `train` before any weights are loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from tutelage.config.bounds import LARGEST_COUNT
from tutelage.config.conversations import ConversationData
from tutelage.config.evaluation import IS_MORE_BETTER
from tutelage.config.rollouts import given_path, stores_teacher
from tutelage.config.sampling import VLLMEngine, VLLMServer
from tutelage.config.schema import Config, FileData
from tutelage.data.completions import GivenCompletions
from tutelage.data.prompts import FileTask
from tutelage.envs.environment import AgentTask
from tutelage.errors import ConfigError, DataError, MissingExtraError, RunError
from tutelage.models.chat.tool_format import format_of
from tutelage.models.chat.turn_template import TurnTemplate
from tutelage.models.tokenizers import control_ids
from tutelage.rollout.nccl_transfer import require_nccl
from tutelage.rollout.replicas import replica_addresses
from tutelage.setup.inputs import Inputs, load_inputs, pick_device, prompt_format
from tutelage.setup.manifest import refuse_another_run, refuse_other_inputs
from tutelage.setup.objective import graded_by, needs_teacher
from tutelage.setup.process_counts import ProcessCounts
from tutelage.setup.run_folder import RunFolder
from tutelage.setup.teacher import has_states
from tutelage.setup.trackers import require_trackers
from tutelage.setup.warnings import input_warnings

_MOST_COMPLETIONS = 16 * LARGEST_COUNT


def validate(
    config: Config, folder: Path, num_processes: int = 1, allow_change: tuple[str, ...] = ()
) -> Inputs:
    """Load the inputs of a run and check that they fit the configuration and each other.

    Args:
        config: the run.
        folder: its run folder, which need not exist.
        num_processes: processes that share the run.
        allow_change: keys that may differ from the run being continued.

    Returns:
        The inputs, with warnings about settings that are seldom intended.

    Raises:
        TutelageError: the run cannot be trained as configured.
    """
    ProcessCounts(num_processes).refuse_uneven(config)
    refuse_engine(config, num_processes)
    _refuse_teacher_draws(config, num_processes)
    _refuse_stored_teacher(config, num_processes)
    _refuse_too_many_completions(config)
    require_trackers(config)
    _refuse_layers(config)
    if isinstance(config.engine, VLLMServer):
        replica_addresses(config.engine.urls)
        if config.engine.transfer == "nccl":
            require_nccl(pick_device(config.device))
    _require_packages(config)
    earlier = RunFolder(folder, is_writer=False).read_manifest()
    refuse_another_run(config, folder, earlier, allow_change)
    _require_folder(folder)
    inputs = load_inputs(config, not has_states(config, folder))
    refuse_other_inputs(config, inputs, earlier, allow_change)
    _refuse_optimizer(config, inputs)
    _refuse_ungraded(config, inputs)
    _refuse_unread_states(config)
    _refuse_nothing_held_out(config, inputs)
    _refuse_too_few_completions(config, inputs)
    if isinstance(config.data, ConversationData) and isinstance(inputs.task, AgentTask):
        _refuse_template(config.data, inputs)
        _refuse_thinking(config.data, inputs)
    prompts = inputs.measure_prompts(config)
    return replace(inputs, prompts=prompts, warnings=tuple(input_warnings(config, inputs, prompts)))


def _refuse_template(data: ConversationData, inputs: Inputs) -> None:
    """Refuses a chat template that cannot be continued turn by turn, or has unknown calls."""
    tokenizer = inputs.tokenizer
    ends = control_ids(tokenizer) - {tokenizer.unk_token_id}  # which of them are, the model says
    TurnTemplate(tokenizer, ends, data.enable_thinking)
    format_of(tokenizer, data.tool_format)


def _refuse_thinking(data: ConversationData, inputs: Inputs) -> None:
    wanted, tokenizer = data.enable_thinking, inputs.tokenizer
    if wanted is not None and "enable_thinking" not in str(tokenizer.chat_template):
        raise ConfigError(
            f"data.enable_thinking = {str(wanted).lower()} has no effect: the chat template of "
            f"{tokenizer.name_or_path!r} does not read it. Leave it out."
        )


def refuse_engine(config: Config, num_processes: int) -> None:
    """Refuses an engine that several processes cannot share.

    Raises:
        ConfigError: it is one.
    """
    if num_processes > 1 and isinstance(config.engine, VLLMEngine):
        raise ConfigError(
            f"engine.kind {config.engine.kind!r} works with one process, got "
            f'{num_processes}. Use engine.kind = "transformers" or "vllm_server".'
        )


def _refuse_teacher_draws(config: Config, num_processes: int) -> None:
    """Nothing is drawn from a teacher that several processes hold together."""
    measured, kind = config.evaluation, config.teacher.sharding
    if num_processes > 1 and kind != "none" and measured.teacher and measured.num_problems:
        raise ConfigError(
            f"evaluation.teacher must be false with teacher.sharding = {kind!r}, got true: no "
            "process has all of its weights to sample completions."
        )


def _refuse_stored_teacher(config: Config, num_processes: int) -> None:
    """One process stores the teacher's states."""
    if num_processes > 1 and stores_teacher(config.rollouts):
        raise ConfigError(
            f"rollouts.teacher_states works with one process, got {num_processes}. Leave it out: "
            "the teacher then runs in every step."
        )


def _refuse_too_many_completions(config: Config) -> None:
    """Those of a step, and of an evaluation, are in memory together."""
    measured = config.evaluation
    for prompts, count, samples, key in (
        ("prompts_per_step", config.prompts_per_step, config.sampling.num_samples, "sampling"),
        ("evaluation.num_problems", measured.num_problems, measured.num_samples, "evaluation"),
    ):
        if count * samples > _MOST_COMPLETIONS:
            raise ConfigError(
                f"{prompts} times {key}.num_samples must be at most {_MOST_COMPLETIONS}, got "
                f"{count} times {samples}. Lower one of them."
            )


def _refuse_too_few_completions(config: Config, inputs: Inputs) -> None:
    """Refuses a file of completions that lacks those of a prompt of some step."""
    if (path := given_path(config.rollouts)) is not None:
        given = GivenCompletions.read(path, prompt_format(config.data))
        size, steps = config.prompts_per_step, range(config.num_steps)
        prompts = [p for step in steps for p in inputs.task.prompts(step, size, config.seed)]
        given.require(prompts, config.sampling.num_samples)


def _require_packages(config: Config) -> None:
    for package, extra, purpose in _packages(config):
        if find_spec(package.replace("-", "_")) is None:
            raise MissingExtraError(package, extra, purpose)


def _packages(config: Config) -> Iterator[tuple[str, str, str]]:
    """Optional packages that a run needs, the extra that installs each, and what for."""
    if config.student.lora is not None:
        yield "peft", "lora", "student.lora"
    if config.student.layers == "liger":
        yield "liger-kernel", "liger", "student.layers = 'liger'"
    teachers = {f"teachers.{name}": teacher for name, teacher in config.teachers.items()}
    sides = {"student": config.student, "teacher": config.teacher, **teachers}
    for who, side in sides.items():
        if side.quantization != "none":
            yield "bitsandbytes", "lowbit", f"{who}.quantization = {side.quantization!r}"
    if config.optimizer.kind in ("adamw_8bit", "paged_adamw_8bit"):
        yield "bitsandbytes", "lowbit", f"optimizer.kind = {config.optimizer.kind!r}"
    if isinstance(config.engine, VLLMEngine):
        yield "vllm", "vllm", "engine.kind = 'vllm'"
    if isinstance(config.data, FileData) and config.data.grader == "math":
        yield "math-verify", "math", "data.grader = 'math'"


def _refuse_optimizer(config: Config, inputs: Inputs) -> None:
    kind, is_on_cpu = config.optimizer.kind, inputs.device.type == "cpu"
    if kind == "paged_adamw_8bit" and is_on_cpu:
        raise ConfigError(
            "optimizer.kind 'paged_adamw_8bit' pages between CUDA and main memory, and there is "
            "no CUDA device. Use adamw_8bit."
        )
    if config.optimizer.state_is_on_disk and not (is_on_cpu or config.optimizer.offload):
        raise ConfigError(
            "optimizer.kind 'adamw_on_disk' updates weights in main memory, got a run on "
            f"{inputs.device.type}. Set optimizer.offload = true."
        )


def _refuse_layers(config: Config) -> None:
    if config.student.layers == "liger" and (kind := pick_device(config.device).type) != "cuda":
        raise ConfigError(
            f"student.layers 'liger' runs on CUDA, got a run on {kind}. "
            'Use student.layers = "transformers".'
        )


def _require_folder(folder: Path) -> None:
    """The nearest existing parent has to be a writable folder: missing ones are made."""
    nearest = folder.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        reason = f"{nearest} is not a folder"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        reason = f"{nearest} is not writable"
    else:
        return
    raise RunError(
        f"run folder {folder} cannot be written: {reason}. Choose another with out=FOLDER."
    )


def _refuse_ungraded(config: Config, inputs: Inputs) -> None:
    """Refuses methods that need verdicts where the task cannot grade every completion."""
    task, setting = inputs.task, graded_by(config)
    if setting is None or not isinstance(task, FileTask):
        return
    what = setting.partition(".")[0]
    if task.grader == "none":
        raise ConfigError(
            f"{setting} needs a verdict on every completion, but data.grader is "
            f"'none'. Set data.grader, or use another {what}."
        )
    ungraded = [prompt.id for prompt in task.training if prompt.answer is None]
    if ungraded:
        raise DataError(
            f"{setting} needs a verdict on every completion, but "
            f"{len(ungraded)} of {len(task.training)} prompts have no reference answer, first "
            f"{ungraded[0]!r}. Set data.answer_column, or use another {what}."
        )


def _refuse_unread_states(config: Config) -> None:
    if stores_teacher(config.rollouts) and not needs_teacher(config):
        raise ConfigError(
            "rollouts.teacher_states has no effect: steps with objective.kind = "
            f"{config.objective.kind!r} have no teacher forward. Set "
            'rollouts.teacher_states = "none".'
        )


def _refuse_nothing_held_out(config: Config, inputs: Inputs) -> None:
    wanted = config.evaluation.num_problems
    if wanted and not inputs.task.held_out(wanted):
        raise ConfigError(
            f"evaluation.num_problems is {wanted}, but data.num_held_out is 0: there is nothing "
            "to evaluate on. Raise data.num_held_out, or set evaluation.num_problems = 0."
        )
    deciding = {"keep_best": config.keep_best, "stop_when.metric": config.stop_when.metric}
    for key, metric in deciding.items():
        if not IS_MORE_BETTER.get(metric, False) or not isinstance(inputs.task, FileTask):
            continue
        if all(prompt.answer is None for prompt in inputs.task.held_out(wanted)):
            raise DataError(
                f"{key} = {metric} needs graded problems, but none of the {wanted} held-out "
                "prompts has a reference answer. Set data.answer_column, or another metric."
            )
