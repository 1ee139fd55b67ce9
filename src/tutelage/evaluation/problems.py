"""The problems that a request names, and how each of them is sampled and graded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.config.parse import parse_saved_config
from tutelage.config.sampling import SamplingConfig
from tutelage.config.schema import Config
from tutelage.config.verifiers import VerifiersData
from tutelage.data.formats import PromptFormat, is_file_name
from tutelage.data.prompts import FileTask, Grader, fitting_grader, load_prompts
from tutelage.data.suites import AGENT_BENCHMARKS, BENCHMARKS, Suite, find_suite
from tutelage.data.tasks import CoinsTask, LedgerTask, Task
from tutelage.data.tasks import coins as coins_task
from tutelage.data.tasks import ledger as ledger_task
from tutelage.data.types import Prompt
from tutelage.errors import ConfigError
from tutelage.evaluation.agents import agent_benchmark
from tutelage.evaluation.benchmark import Benchmark
from tutelage.evaluation.request import HELD_OUT, EvaluationRequest, option
from tutelage.evaluation.scores import voting_of
from tutelage.setup.components import agent_of
from tutelage.setup.inputs import build_task, grader_of, without_long_prompts
from tutelage.setup.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DEFAULT_LENGTH = 256
_DEFAULT_LENGTH_OF_SUITE_FILE = 1024
_DEFAULT_NUM_PROBLEMS = 64


def suite_of(request: EvaluationRequest) -> Suite:
    is_named = request.suite is not None and not is_file_name(request.suite)
    return find_suite(str(request.suite)) if is_named else Suite(())


def suite_of_run(run: Config) -> Suite:
    """A run's held-out part is sampled as the run sampled it."""
    settings = run.evaluation
    return Suite((), settings.num_samples, settings.temperature, settings.top_p)


def sampling_of(request: EvaluationRequest, suite: Suite) -> SamplingConfig:
    temperature = suite.temperature if request.temperature is None else request.temperature
    top_p = suite.top_p if request.top_p is None else request.top_p
    return SamplingConfig(temperature, top_p, num_samples=request.num_samples or suite.num_samples)


def benchmarks_of(request: EvaluationRequest, suite: Suite, chat: bool) -> list[Benchmark]:
    columns = PromptFormat(chat=chat, suffix=request.suffix)
    if request.file is None:
        _refuse_unused_by_agents(request, suite)
        return [_benchmark(name, columns, request) for name in suite.benchmarks]
    is_suite = request.suite is not None
    limit = request.num_problems or (None if is_suite else _DEFAULT_NUM_PROBLEMS)
    default = _DEFAULT_LENGTH_OF_SUITE_FILE if is_suite else _DEFAULT_LENGTH
    prompts = tuple(load_prompts(request.file, columns, limit=limit))
    grader = request.grader or fitting_grader(prompts)
    length = request.max_new_tokens or default
    return [_graded(Path(request.file).stem, prompts, grader, length)]


def _refuse_unused_by_agents(request: EvaluationRequest, suite: Suite) -> None:
    agents = [name for name in suite.benchmarks if name in AGENT_BENCHMARKS]
    for name in ("chat", "suffix"):
        value = getattr(request, name)
        if agents and value is not None:
            raise ConfigError(
                f"{option(name, value)} is not for conversations, whose messages the environment "
                f"writes, got --suite {request.suite!r} with {agents[0]}. Leave it out."
            )


def _benchmark(name: str, columns: PromptFormat, request: EvaluationRequest) -> Benchmark:
    if name in AGENT_BENCHMARKS:
        return agent_benchmark(name, request)
    prompts = tuple(load_prompts(name, columns, limit=request.num_problems))
    length = request.max_new_tokens or BENCHMARKS[name].max_new_tokens
    # GSM8K's own rule: without a mark, the last number is the answer.
    return _graded(name, prompts, "number" if name == "gsm8k" else "math", length)


def _graded(name: str, prompts: tuple[Prompt, ...], grader: Grader, length: int) -> Benchmark:
    grade = FileTask(name, prompts, grader).grade
    return Benchmark(name, prompts, grade, length, grader, voting_of(grader))


def embedded(request: EvaluationRequest, tokenizer: PreTrainedTokenizerBase) -> Benchmark:
    """The embedded tasks are for models that know their pieces of text and nothing else."""
    known = tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)
    tasks: tuple[tuple[Task, set[str]], ...] = (
        (LedgerTask(), set(ledger_task.ALPHABET)),
        (CoinsTask(), set(coins_task.vocabulary())),
    )
    task = next((task for task, pieces in tasks if pieces == known), None)
    if task is None:
        raise ConfigError(
            f"no prompts were given for {request.model!r}, and the built-in tasks ledger and coins "
            "are for the embedded models of them alone. Pass --prompts FILE, or --suite with eval "
            "(a run folder has --suite held-out). Conversations are led by eval --suite alone, "
            "such as ledger-tools; sample leads none."
        )
    prompts = tuple(task.held_out(request.num_problems or _DEFAULT_NUM_PROBLEMS))
    length = request.max_new_tokens or _DEFAULT_LENGTH
    return Benchmark(task.name, prompts, task.grade, length, task.name, voting_of(task.name))


def run_config(request: EvaluationRequest) -> Config:
    manifest = RunFolder(Path(request.model).expanduser()).read_manifest()
    if manifest is None:
        raise ConfigError(
            f"--suite held-out needs a run folder, got {request.model!r}, which has no manifest. "
            "Name the folder that `tutelage train` wrote."
        )
    return parse_saved_config(manifest["config"])


def held_out(
    request: EvaluationRequest, run: Config, tokenizer: PreTrainedTokenizerBase
) -> Benchmark:
    if isinstance(run.data, VerifiersData):
        raise ConfigError(
            f"--suite held-out cannot lead the conversations of {request.model!r}, whose data.kind "
            "is verifiers. Use the evaluations that the run made itself, in its report."
        )
    task = without_long_prompts(build_task(run.data), run.data, tokenizer)
    count = request.num_problems or run.evaluation.num_problems or _DEFAULT_NUM_PROBLEMS
    length = request.max_new_tokens or run.sampling.max_new_tokens
    prompts = tuple(task.held_out(count))
    grader = grader_of(task)
    agent = agent_of(run, task)
    return Benchmark(HELD_OUT, prompts, task.grade, length, grader, voting_of(grader), agent)


def rendering_of(request: EvaluationRequest, benchmarks: list[Benchmark]) -> str:
    """How prompts become text."""
    if request.is_embedded:
        return f"{benchmarks[0].name} task"
    prompts = [prompt for benchmark in benchmarks for prompt in benchmark.prompts]
    num_chats = sum(not isinstance(prompt.content, str) for prompt in prompts)
    return {0: "plain text", len(prompts): "chat template"}.get(num_chats, "texts and chats")
