"""Looking without training: evaluate a model, or score every token of its completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tutelage.data.prompts import FileTask, Grader, PromptFormat, fitting_grader, load_prompts
from tutelage.data.tasks import LedgerTask
from tutelage.data.types import Prompt
from tutelage.errors import ConfigError
from tutelage.evaluation.evaluate import Evaluation, Grade, evaluate
from tutelage.evaluation.scores import voting_of
from tutelage.models.load import load_model, load_tokenizer
from tutelage.models.sampling import SamplingConfig
from tutelage.run.evaluation import is_url, student_of
from tutelage.run.numerics import plain_arithmetic
from tutelage.run.origin import at_the_date_of_the_run


@dataclass(frozen=True)
class Inspection:
    """What `tutelage eval` and `tutelage sample` are asked for."""

    model: str
    prompts: str | None = None
    """JSONL file; None for the ledger task's held-out prompts."""
    grader: Grader | None = None
    """How answers are compared; None takes `fitting_grader`."""
    chat: bool = False
    suffix: str = ""
    num_prompts: int = 64
    num_samples: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 64
    seed: int = 424242
    device: str = "cpu"


@plain_arithmetic()
@at_the_date_of_the_run
def evaluate_model(request: Inspection) -> Evaluation:
    """Sample and grade a model on held-out prompts.

    Raises:
        TutelageError: the model, the prompts or a setting cannot be used.
    """
    if request.num_prompts < 1:
        raise ConfigError(f"--num-prompts must be at least 1, got {request.num_prompts}.")
    sampling = SamplingConfig(
        request.temperature, request.top_p, 0, request.max_new_tokens, request.num_samples
    )
    if is_url(request.model):
        raise ConfigError("a server is measured with --suite, got none. Try --suite gsm8k.")
    prompts, grade, grader = _problems(request)
    source = student_of(request.model)
    return evaluate(
        load_model(source, device=request.device),
        load_tokenizer(source),
        grade,
        prompts,
        sampling,
        (request.seed,),
        request.batch_size,
        voting=voting_of(grader),
    )


def _problems(request: Inspection) -> tuple[Sequence[Prompt], Grade, str]:
    if request.prompts is None:
        ledger = LedgerTask()
        return ledger.held_out(request.num_prompts), ledger.grade, ledger.name
    columns = PromptFormat(chat=request.chat, suffix=request.suffix)
    prompts = load_prompts(request.prompts, columns, limit=request.num_prompts)
    grader = request.grader or fitting_grader(prompts)
    return prompts, FileTask("prompts", tuple(prompts), grader).grade, grader
