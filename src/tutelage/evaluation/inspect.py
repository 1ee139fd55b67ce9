"""Looking without training: evaluate a model on a file's prompts, or on the ledger task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tutelage.config.sampling import SamplingConfig
from tutelage.data.columns import notes_of
from tutelage.data.prompts import FileTask, Grader, PromptFormat, fitting_grader, load_prompts
from tutelage.data.tasks import LedgerTask
from tutelage.data.tasks.ledger import ALPHABET
from tutelage.data.types import Prompt
from tutelage.errors import ConfigError
from tutelage.evaluation.benchmark import is_url, option, student_of
from tutelage.evaluation.evaluate import Evaluation, Grade, evaluate
from tutelage.evaluation.scores import voting_of
from tutelage.models.device import find_device
from tutelage.models.load import load_model, load_tokenizer
from tutelage.models.tokenizers import refuse_thinking
from tutelage.rollout.sampler import TransformersSampler
from tutelage.setup.manifest import at_the_date_of_the_run
from tutelage.setup.numerics import plain_arithmetic
from tutelage.setup.phases import PhaseCallback, counting, no_log, no_phases

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Inspection:
    """What `tutelage eval` without a suite and `tutelage sample` are asked for."""

    model: str
    prompts: str | None = None
    """JSONL or parquet file; None for the ledger task's held-out prompts, which is possible for
    models with its alphabet alone."""
    grader: Grader | None = None
    """How answers of a file are compared; None takes `fitting_grader`."""
    chat: bool | None = None
    """Render a file's texts with the chat template; None does if the model has one."""
    thinking: bool | None = None
    """Passed to the chat template as enable_thinking; None leaves it to the template."""
    suffix: str | None = None
    """Text appended to every prompt of a file."""
    num_problems: int = 64
    num_samples: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 64
    seed: int = 424242
    device: str = "auto"
    dtype: str = "float32"


@plain_arithmetic()
@at_the_date_of_the_run
def evaluate_model(
    request: Inspection, on_phase: PhaseCallback = no_phases, log: Callable[[str], None] = no_log
) -> tuple[Evaluation, str]:
    """Sample and grade a model on held-out prompts.

    Args:
        request: the model, the prompts and how to sample.
        on_phase: told what is being done.
        log: receives a line for what was left out of the prompts' records.

    Returns:
        The evaluation, and in words what was measured and how.

    Raises:
        TutelageError: the model, the prompts or a setting cannot be used.
    """
    if request.num_problems < 1:
        raise ConfigError(f"num_problems must be at least 1, got {request.num_problems}.")
    sampling = SamplingConfig(
        request.temperature, request.top_p, 0, request.max_new_tokens, request.num_samples
    )
    if is_url(request.model):
        raise ConfigError(
            "a server is measured with `tutelage eval URL --suite SUITE`, which also takes a file; "
            "got no suite."
        )
    device = find_device(request.device)
    source = student_of(request.model)
    tokenizer = load_tokenizer(source)
    prompts, grade, grader, rendering = _problems(request, tokenizer)
    for note in notes_of(prompts):
        log(f"warning: {note}")
    on_phase(f"loading {request.model}")
    model = load_model(source, request.dtype, str(device))
    sampler = TransformersSampler(model, tokenizer, request.batch_size, request.thinking)
    progress = counting(on_phase, "sampling: completions", len(prompts) * request.num_samples)
    voting = voting_of(grader)
    result = evaluate(sampler, grade, prompts, sampling, (request.seed,), progress, voting)
    return result, f"{rendering}, grader {grader}, {request.dtype} on {device}"


def _problems(
    request: Inspection, tokenizer: PreTrainedTokenizerBase
) -> tuple[Sequence[Prompt], Grade, str, str]:
    """Prompts, their grade, its name, and how they are rendered."""
    if request.prompts is None:
        _refuse_other_than_ledger(request, tokenizer)
        ledger = LedgerTask()
        return ledger.held_out(request.num_problems), ledger.grade, ledger.name, "ledger task"
    chat = bool(tokenizer.chat_template) if request.chat is None else request.chat
    columns = PromptFormat(chat=chat, suffix=request.suffix)
    prompts = load_prompts(request.prompts, columns, limit=request.num_problems)
    refuse_thinking(request.thinking, prompts, tokenizer)
    grader = request.grader or fitting_grader(prompts)
    num_chats = sum(not isinstance(prompt.content, str) for prompt in prompts)
    rendering = {0: "plain text", len(prompts): "chat template"}.get(num_chats, "texts and chats")
    return prompts, FileTask("prompts", tuple(prompts), grader).grade, grader, rendering


def _refuse_other_than_ledger(request: Inspection, tokenizer: PreTrainedTokenizerBase) -> None:
    """The ledger task is for models that know its characters and nothing else."""
    if tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens) != set(ALPHABET):
        raise ConfigError(
            f"no prompts were given for {request.model!r}, and the built-in ledger task is for the "
            "embedded models alone. Pass --prompts FILE, or --suite with eval (a run folder has "
            "--suite held-out)."
        )
    for name in ("grader", "chat", "thinking", "suffix"):
        value = getattr(request, name)
        if value is not None:
            raise ConfigError(
                f"{option(name, value)} is for the prompts of a file, got no --prompts. Add "
                "--prompts FILE or leave it out."
            )
