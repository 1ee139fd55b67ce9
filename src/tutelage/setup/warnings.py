"""Warnings of `check` and `train` about settings that are valid but seldom intended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from fractions import Fraction
from typing import TYPE_CHECKING

import torch

from tutelage.config.conversations import ConversationData
from tutelage.config.method import GRPOObjective, OPSAObjective
from tutelage.config.models import TeacherConfig
from tutelage.config.schema import Config, FileData
from tutelage.config.selection import AllTokens, ExtremeTokens, FirstTokens, InfluenceTokens
from tutelage.config.self_teacher import SelfTeacher
from tutelage.data.columns import notes_of
from tutelage.data.prompts import FileTask
from tutelage.errors import ConfigError
from tutelage.models.head import head_form
from tutelage.models.limits import context_limit, has_position_table
from tutelage.models.load import DTYPES, file_dtype
from tutelage.models.reference import resolve_model
from tutelage.models.tokenizers import stop_ids
from tutelage.setup.inputs import Inputs, PromptStats, is_aligned
from tutelage.setup.unused_options import unused_warnings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LARGE_RATE = 0.05
"""Adam moves every weight by about the learning rate in each update."""
_SMALL_RATE = 1e-8
_SMALL_LORA_RATE = 1e-5
_UNKNOWN_SHARE = 0.1
_OF_SAMPLED_TOKENS = ("lowest_logprob", "probability_gap", "extreme_advantage")
"""Rules whose score of a token depends on which one was sampled."""
_FILE_ENDINGS = (".jsonl", ".json", ".parquet")


def input_warnings(config: Config, inputs: Inputs, prompts: PromptStats) -> Iterator[str]:
    """Warnings that need no weights."""
    yield from _sampling_warnings(config)
    yield from _turn_warnings(config)
    yield from _optimizer_warnings(config)
    yield from _keep_warnings(config)
    yield from unused_warnings(config)
    if isinstance(config.data, FileData) and isinstance(inputs.task, FileTask):
        yield from _file_warnings(config, config.data, inputs, inputs.task)
    share = prompts.num_unknown / max(1, prompts.num_tokens)
    if share > _UNKNOWN_SHARE:
        yield (
            f"{share:.0%} of the prompts' tokens are unknown to the student's tokenizer "
            f"({prompts.unknown!r}). Use prompts in its alphabet, or other models"
        )
    if prompts.num_ended:
        yield (
            f"{prompts.num_ended} prompts end with the end-of-sequence token "
            f"{inputs.tokenizer.eos_token!r}: the student's chat template opens no turn for the "
            "answer. Add one where add_generation_prompt is set"
        )
    is_other = inputs.tokenizer.chat_template != inputs.teacher_tokenizer.chat_template
    if is_other and prompts.is_chat and not is_aligned(config):
        yield (
            "student and teacher have different chat templates; prompts are rendered with the "
            "student's, which the teacher may not be trained on"
        )


def _sampling_warnings(config: Config) -> Iterator[str]:
    sampling = config.sampling
    if (sampling.temperature, sampling.top_p, sampling.top_k) != (1.0, 1.0, 0):
        yield (
            "completions are not sampled from the distribution that is trained "
            "(sampling.temperature, top_p or top_k differ from 1, 1, 0)"
        )


def _turn_warnings(config: Config) -> Iterator[str]:
    data, most = config.data, config.sampling.max_new_tokens
    if isinstance(data, ConversationData) and data.max_turn_tokens > most:
        yield (
            f"data.max_turn_tokens = {data.max_turn_tokens} has no effect: all turns of a "
            f"conversation together have at most sampling.max_new_tokens = {most}. Lower the one "
            "or raise the other"
        )


def _optimizer_warnings(config: Config) -> Iterator[str]:
    optimizer, lora = config.optimizer, config.student.lora
    rate = optimizer.learning_rate
    if rate > _LARGE_RATE:
        yield (
            f"optimizer.learning_rate = {rate:g} moves every weight by about as much in each "
            "update, which destroys the student. 1e-6 to 1e-3 is usual"
        )
    elif lora is not None and rate < _SMALL_LORA_RATE:
        yield (
            f"optimizer.learning_rate = {rate:g} hardly changes an adapter, whose updates start "
            "at 0. 1e-4 is usual with student.lora"
        )
    elif rate < _SMALL_RATE:
        yield f"optimizer.learning_rate = {rate:g} changes next to nothing. 1e-6 is usual"
    if optimizer.kind == "adafactor" and (optimizer.beta1, optimizer.beta2) != (0.9, 0.95):
        yield "optimizer.beta1 and beta2 have no effect: adafactor has no moments. Leave them out"
    if optimizer.warmup_steps > config.num_steps:
        highest = rate * config.num_steps / optimizer.warmup_steps
        yield (
            f"optimizer.warmup_steps = {optimizer.warmup_steps} outlast the run of num_steps = "
            f"{config.num_steps}: the learning rate ends at {highest:g}. Lower warmup_steps"
        )


def _keep_warnings(config: Config) -> Iterator[str]:
    selection = config.selection
    if isinstance(config.objective, OPSAObjective) and selection.rule not in _OF_SAMPLED_TOKENS:
        yield (
            f"objective.kind = 'opsa' with selection.rule = {selection.rule!r} lowers sampled "
            "tokens whether they are likely or not, which has no effect on average. Set "
            "selection.rule = 'lowest_logprob'"
        )
    if isinstance(selection, AllTokens | FirstTokens):
        return
    keeps = {field.name: field.default for field in fields(selection)}
    if selection.keep == keeps["keep"] and isinstance(selection, ExtremeTokens | InfluenceTokens):
        return  # their budgets are meant to be one token of most completions
    tokens = config.sampling.max_new_tokens
    where = "a completion"
    if selection.scope == "batch":
        tokens *= config.prompts_per_step * config.sampling.num_samples
        where = "the batch"
    if Fraction(str(selection.keep)) * tokens < 1:
        is_both = isinstance(selection, ExtremeTokens) and selection.end == "both"
        kept = "1 is kept at each end" if is_both else "1 is kept"
        yield (
            f"selection.keep = {selection.keep:g} of at most {tokens} tokens of {where} rounds to "
            f"0, so {kept}. Raise selection.keep"
        )


def _file_warnings(config: Config, data: FileData, inputs: Inputs, task: FileTask) -> Iterator[str]:
    yield from notes_of([*task.pool, *task.held_out_prompts])
    template = inputs.tokenizer.chat_template
    if template and not data.chat and any(isinstance(p.content, str) for p in task.pool):
        yield (
            f"student {config.student.model!r} has a chat template, which data.chat = false leaves "
            "out. Set data.chat = true if it is a chat model"
        )
    if data.enable_thinking is not None:
        yield from _thinking_warnings(data, str(template), task)
    if data.path.endswith(_FILE_ENDINGS) and (data.split != "train" or data.subset is not None):
        yield (
            f"data.path = {data.path!r} is a file, which has no splits and no subsets: data.split "
            "and data.subset have no effect. Leave them out"
        )
    if task.num_dropped:
        yield f"{task.num_dropped} prompts over data.max_prompt_tokens left out"
    count = config.evaluation.num_problems
    held_out = task.held_out(count)
    if len(held_out) < count:
        yield (
            f"evaluation.num_problems = {count}, but the number of held-out prompts is "
            f"{len(held_out)}. Raise data.num_held_out or lower evaluation.num_problems"
        )
    missing = sum(prompt.answer is None for prompt in held_out)
    if task.grader != "none" and missing:
        yield (
            f"data.grader = {task.grader!r}, but {missing} of {len(held_out)} held-out prompts "
            f"have no reference answer, so {_unmeasured(missing, held_out)}. Set "
            "data.answer_column"
        )
    if task.grader == "none" and held_out and not missing:
        yield (
            "held-out prompts have reference answers, but data.grader = 'none': accuracy is not "
            "measured. Set data.grader"
        )


def _thinking_warnings(data: FileData, template: str, task: FileTask) -> Iterator[str]:
    name = f"data.enable_thinking = {str(data.enable_thinking).lower()}"
    if all(isinstance(prompt.content, str) for prompt in task.pool):
        yield f"{name} has no effect: no prompt is rendered with a chat template. Leave it out"
    elif "enable_thinking" not in template:
        yield f"{name} has no effect: the student's chat template does not read it. Leave it out"


def _unmeasured(missing: int, held_out: Sequence[object]) -> str:
    return "no accuracy is measured" if missing == len(held_out) else "they do not count"


def model_warnings(
    config: Config,
    inputs: Inputs,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    vocab_size: int,
) -> Iterator[str]:
    """Warnings that need both models, whose shared vocabulary has `vocab_size` ids.

    Raises:
        ConfigError: a model has no positions for the longest prompt and completion.
    """
    if inputs.prompts is not None:
        longest = inputs.prompts.longest
        theirs = inputs.prompts.longest_told if is_aligned(config) else longest
        sides = [("student", student, longest), ("teacher", teacher, theirs)]
        yield from context_warnings(config, sides)
    stops = stop_ids(student, inputs.tokenizer)
    if not any(i < vocab_size for i in stops):
        beyond = f" among its {vocab_size} ids, only {sorted(stops)}" if stops else ""
        yield (
            f"student {config.student.model!r} has no end-of-sequence token{beyond}, so that every "
            "completion runs to sampling.max_new_tokens. Add eos_token_id to its "
            "generation_config.json"
        )
    yield from _stop_class_warnings(config, inputs.device, student)
    # the teacher may be a reference, or unused
    is_without = isinstance(config.objective, GRPOObjective | OPSAObjective)
    if isinstance(config.teacher, SelfTeacher):
        yield from _self_warnings(config, config.teacher, inputs.prompts, student)
    elif is_without:
        return
    elif config.student.num_layers is None and _is_same(config, student, teacher):
        yield (
            "student and teacher have the same weights: the KL is 0 on every token. Choose "
            "another teacher.model"
        )
    elif (
        isinstance(config.teacher, TeacherConfig)
        and config.student.quantization == config.teacher.quantization == "none"
    ):
        sizes = [_size(model) for model in (student, teacher)]
        if sizes[1] < sizes[0]:
            yield (
                f"the teacher has {sizes[1]:,} parameters and the student {sizes[0]:,}: it is "
                "smaller than the student. Check student.model and teacher.model"
            )


def _stop_class_warnings(
    config: Config, device: torch.device, student: PreTrainedModel
) -> Iterator[str]:
    """What the fused kernels do not compute: two vocabularies, and a class above a soft cap."""
    if is_aligned(config) and device.type == "cuda":
        yield (
            "teacher.vocabulary = 'aligned' leaves the objective to torch, without the fused "
            "kernels: it is slower and takes more memory"
        )
    if config.teacher.stop_token != "class" or device.type != "cuda":
        return
    if head_form(student).softcap is not None:
        yield (
            "teacher.stop_token = 'class' with logits that have a soft cap leaves the objective to "
            "torch, without the fused kernels: it is slower and takes more memory. 'map' uses them"
        )


def _self_warnings(
    config: Config, teacher: SelfTeacher, prompts: PromptStats | None, student: PreTrainedModel
) -> Iterator[str]:
    """Of a student that teaches itself.

    Raises:
        ConfigError: what the teacher reads is longer than the student's positions.
    """
    if not teacher.context and not isinstance(config.objective, GRPOObjective | OPSAObjective):
        when = "in every step" if teacher.weights == "live" else "in the first step, and later"
        yield (
            f"the teacher is the student with weights = {teacher.weights!r} and without a context: "
            f"loss and gradient are 0 {when} unless something else moves the weights. Set "
            "teacher.context"
        )
    limit = context_limit(student)
    if prompts is None or limit is None:
        return
    new, told = config.max_completion_tokens, prompts.longest_told
    if told + new > limit:
        raise ConfigError(
            f"with teacher.context prompt {prompts.longest_told_id!r} has {told} tokens and "
            f"sampling.max_new_tokens is {new}: more than the {limit} positions of the student. "
            "Shorten the context, leave the prompt out, or lower sampling.max_new_tokens."
        )


def pair_warnings(
    config: Config,
    inputs: Inputs,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    vocab_size: int,
    first: PreTrainedModel | None,
) -> tuple[str, ...]:
    """`model_warnings`, and `copy_warnings` of the student `first`."""
    return (
        *model_warnings(config, inputs, student, teacher, vocab_size),
        *copy_warnings(config, first, teacher),
    )


def copy_warnings(
    config: Config, student: PreTrainedModel | None, teacher: PreTrainedModel
) -> Iterator[str]:
    """Of models that are to lie in parts, but that each process first copies to main memory.

    Args:
        config: the run.
        student: as it was loaded; None where it goes on from a checkpoint, which has its dtype.
        teacher: as it was loaded.
    """
    models = (("student", config.student, student), ("teacher", config.teacher, teacher))
    for who, side, model in models:
        if side.sharding == "none" or model is None:
            continue
        found = file_dtype(side.model)
        if found is None or found == DTYPES[side.dtype]:
            continue
        name = str(found).removeprefix("torch.")
        size = sum(weight.nbytes for weight in model.parameters()) / 1e9
        yield (
            f"{who}.dtype = {side.dtype!r}, but the files of {side.model!r} have {name}: each "
            f"process copies all of it, {size:,.1f} GB, to main memory before it keeps its part. "
            f"{who}.dtype = {name!r} copies nothing"
        )


def _size(model: PreTrainedModel) -> int:
    """Parameters, those of an adapter aside."""
    return sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)


def _is_same(config: Config, student: PreTrainedModel, teacher: PreTrainedModel) -> bool:
    """Whether the run starts with equal weights, by name of the model or number by number."""
    if resolve_model(config.student.model) == resolve_model(config.teacher.model):
        return True
    if config.student.lora is not None or type(student) is not type(teacher):
        return False
    ours, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
    return ours.keys() == theirs.keys() and all(
        ours[name].shape == weight.shape
        and ours[name].dtype == weight.dtype
        and torch.equal(ours[name].to(weight.device), weight)
        for name, weight in theirs.items()
    )


def context_warnings(
    config: Config, sides: Sequence[tuple[str, PreTrainedModel, int]]
) -> Iterator[str]:
    """Of models with fewer positions than the longest prompt and completion have tokens.

    Args:
        config: the run.
        sides: name and model of each side, and the tokens of its longest prompt.

    Raises:
        ConfigError: a model cannot have more positions.
    """
    new = config.max_completion_tokens
    inserted = new - config.sampling.max_new_tokens
    limits = [
        (limit, not has_position_table(model), who, longest)
        for who, model, longest in sides
        if (limit := context_limit(model)) is not None and longest + new > limit
    ]
    if not limits:
        return
    limit, can_exceed, who, longest = min(limits, key=lambda found: (found[1], found[0]))
    text = (
        f"the longest prompt has {longest} tokens and {_length_keys(inserted)} is {new}: more than "
        f"the {limit} positions of the {who}"
    )
    remedy = f"Lower {_length_keys(inserted)} to {limit - longest}"
    if longest >= limit:
        remedy = f"Set data.max_prompt_tokens below {limit}"
    if not can_exceed:
        raise ConfigError(f"{text}, which has no more. {remedy}.")
    yield f"{text}, which was trained on no more. {remedy}"


def _length_keys(num_inserted: int) -> str:
    """What limits the tokens behind a prompt."""
    return "sampling.max_new_tokens" + " + data.max_inserted_tokens" * bool(num_inserted)
