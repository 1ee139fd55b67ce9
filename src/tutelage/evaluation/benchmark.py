"""`tutelage eval --suite`: benchmarks, files or a run's own held-out part, here or on a server."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.config.parse import parse_saved_config
from tutelage.config.sampling import SamplingConfig
from tutelage.config.schema import Config
from tutelage.data.columns import notes_of
from tutelage.data.formats import PromptFormat, is_file_name
from tutelage.data.prompts import FileTask, Grader, fitting_grader, load_prompts
from tutelage.data.suites import BENCHMARKS, Suite, find_suite
from tutelage.data.types import Prompt
from tutelage.errors import ConfigError
from tutelage.evaluation.folder import EvaluationFolder
from tutelage.evaluation.scores import voting_of
from tutelage.evaluation.suite import Benchmark, Complete, Completion, Result, run_benchmark
from tutelage.evaluation.tables import as_markdown, summarise
from tutelage.models.chat_template import printed_date_of
from tutelage.models.device import find_device
from tutelage.models.load import load_model, load_tokenizer
from tutelage.models.reference import resolve_model
from tutelage.models.tokenizers import encode_prompt, refuse_thinking
from tutelage.rollout.request import RolloutRequest
from tutelage.rollout.sampler import TransformersSampler
from tutelage.setup.inputs import (
    build_task,
    grader_of,
    prompt_format,
    thinking,
    without_long_prompts,
)
from tutelage.setup.manifest import at_the_date_of_the_run
from tutelage.setup.numerics import plain_arithmetic
from tutelage.setup.phases import PhaseCallback, no_phases
from tutelage.setup.run_folder import RunFolder, environment

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD_OUT = "held-out"
_CHUNKS_OF_BATCHES = 4
"""Batches in a chunk: more keeps a batch full for longer, and loses more when it is cut off."""


@dataclass(frozen=True)
class SuiteRequest:
    """What `tutelage eval MODEL --suite SUITE` is asked for; None takes the suite's own value."""

    model: str
    suite: str
    model_name: str | None = None
    """Name of the model on a server; None asks the server, which must have one only."""
    num_problems: int | None = None
    num_samples: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    grader: Grader | None = None
    """How answers of a file are compared; None takes `fitting_grader`. Benchmarks have theirs."""
    chat: bool | None = None
    """Use the chat template; None does if the model has one, or as a held-out part's run did."""
    thinking: bool | None = None
    """Passed to the chat template as enable_thinking; None leaves it to the template, or takes a
    held-out part's run's own."""
    suffix: str | None = None
    batch_size: int = 64
    seed: int = 424242
    device: str | None = None
    """Of a model here; None takes CUDA where it is."""
    dtype: str | None = None
    """Of the weights of a model here; None is float32."""
    out: str | None = None


@dataclass(frozen=True)
class SuiteResult:
    """Everything that was measured, and where it lies."""

    results: list[Result]
    record: dict[str, Any]
    table: str
    folder: Path


@dataclass(frozen=True)
class _Plan:
    """A request with every open value filled in."""

    benchmarks: list[Benchmark]
    sampling: SamplingConfig
    complete: Complete
    settings: dict[str, Any]
    sent: Callable[[], dict[str, Any]]
    """Sampling settings as they were used in the end, by their names in requests."""


@plain_arithmetic()
@at_the_date_of_the_run
def evaluate_suite(
    request: SuiteRequest,
    on_phase: PhaseCallback = no_phases,
    log: Callable[[str], None] | None = None,
) -> SuiteResult:
    """Measure a model on a suite; an earlier evaluation with the same settings is continued.

    Args:
        request: the model, the suite and how to sample.
        on_phase: told what is being done.
        log: receives a line for every sampling setting that a server does not know.

    Returns:
        Scores, one JSON record, a Markdown table and the folder with all samples.

    Raises:
        TutelageError: model, data, server or a setting cannot be used.
    """
    for name in ("num_problems", "num_samples", "max_new_tokens", "batch_size"):
        value = getattr(request, name)
        if value is not None and value < 1:
            flag = name.replace("_", "-")
            raise ConfigError(
                f"--{flag} must be at least 1, got {value}. Leave it out or raise it."
            )
    _refuse_unused(request)
    plan = _server_plan(request, log) if is_url(request.model) else _model_plan(request, on_phase)
    notes = [f"{b.name}: {note}" for b in plan.benchmarks for note in notes_of(b.prompts)]
    if log is not None:
        for note in notes:
            log(note)
    folder = Path(request.out) if request.out else _default_folder(request, plan)
    results = []
    with EvaluationFolder(folder, plan.settings) as saved, printed_date_of(saved.started):
        for benchmark in plan.benchmarks:
            k = plan.sampling.num_samples
            chunk_size = max(1, _CHUNKS_OF_BATCHES * request.batch_size // k)
            told = partial(on_phase, f"{benchmark.name}: problems")
            results.append(run_benchmark(benchmark, plan.complete, k, chunk_size, saved, told))
        head = {"model": request.model, "suite": request.suite, "folder": str(folder)}
        record = summarise(results, head | {"sampling": plan.sent()})
        stated = ", ".join(f"{name} {value}" for name, value in plan.sent().items())
        title = f"`{request.model}` on {request.suite}, seed {request.seed}; sampled with {stated}"
        table = as_markdown(results, title)
        saved.finish(record | {"settings": plan.settings} | environment(), table)
    return SuiteResult(results, record, table, folder)


def _refuse_unused(request: SuiteRequest) -> None:
    """Every option that was given is used, or refused in one line."""
    is_server, is_held_out = is_url(request.model), request.suite == HELD_OUT
    uses = {
        "model_name": (is_server, "names a model on a server"),
        "device": (not is_server, "is for a model here, not on a server"),
        "dtype": (not is_server, "is for a model here, not on a server"),
        "grader": (is_file_name(request.suite), "is for the problems of a file"),
        "chat": (not is_held_out, "is decided by the run whose part is held out"),
        "suffix": (not is_held_out, "is decided by the run whose part is held out"),
    }
    for name, (is_used, what) in uses.items():
        value = getattr(request, name)
        if value is not None and not is_used:
            raise ConfigError(
                f"{option(name, value)} {what}, got model {request.model!r} and suite "
                f"{request.suite!r}. Leave it out."
            )


def option(name: str, value: object) -> str:
    """An option as it was given, --no-chat for one."""
    return f"--{'no-' if value is False else ''}{name.replace('_', '-')}"


def is_url(model: str) -> bool:
    """Whether a model is given as the address of a server."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", model) is not None


def student_of(model: str) -> str:
    """The student inside a run folder; any other reference as it is."""
    path = Path(model).expanduser()
    is_run = (path / "manifest.json").is_file() and (path / "student").is_dir()
    return str(path / "student") if is_run else model


# --- what to ask ----------------------------------------------------------------------------------


def _model_plan(request: SuiteRequest, on_phase: PhaseCallback) -> _Plan:
    """Problems first, since they are the cheapest thing that can be wrong; then the model."""
    device, dtype = find_device(request.device or "auto"), request.dtype or "float32"
    run = _run_config(request) if request.suite == HELD_OUT else None
    suite = _run_suite(run) if run else _suite(request)
    sampling = _sampling(request, suite)
    source = student_of(request.model)
    tokenizer = load_tokenizer(source)
    chat = bool(tokenizer.chat_template) if request.chat is None else request.chat
    if run is not None:
        chat = prompt_format(run.data).chat
        if request.thinking is None:
            request = replace(request, thinking=thinking(run.data))
    benchmarks = [_held_out(request, run, tokenizer)] if run else _benchmarks(request, suite, chat)
    if run is None or request.thinking != thinking(run.data):
        refuse_thinking(request.thinking, [p for b in benchmarks for p in b.prompts], tokenizer)
    on_phase(f"loading {request.model}")
    model = load_model(source, dtype, str(device))
    benchmarks = [_within_context(request, b, model, tokenizer) for b in benchmarks]

    def complete(prompts: Sequence[Prompt], max_new_tokens: int) -> list[Completion]:
        config = _limited(sampling, max_new_tokens)
        sampler = TransformersSampler(model, tokenizer, request.batch_size, request.thinking)
        rollouts = sampler.sample(RolloutRequest(prompts, config, (request.seed,))).rollouts
        return [
            Completion(r.prompt, r.sample, r.text, r.is_truncated, len(r.completion_ids), r.thought)
            for r in rollouts
        ]

    content = _content_digest(source)
    settings = _settings(request, benchmarks, sampling, chat)
    settings |= {"model_content": content, "device": device.type, "dtype": dtype}
    sent = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    return _Plan(benchmarks, sampling, complete, settings, lambda: sent)


def _server_plan(request: SuiteRequest, log: Callable[[str], None] | None) -> _Plan:
    from tutelage.evaluation.server import Server

    if request.suite == HELD_OUT:
        raise ConfigError("--suite held-out needs a run folder, got a server. Name the run.")
    suite = _suite(request)
    sampling = _sampling(request, suite)
    chat = request.chat is not False
    benchmarks = _benchmarks(request, suite, chat)
    refuse_thinking(request.thinking, [p for b in benchmarks for p in b.prompts])
    server = Server(
        request.model,
        sampling,
        request.model_name or "",
        request.seed,
        request.thinking,
        request.batch_size,
        log=log,
    )
    settings = _settings(request, benchmarks, sampling, chat)
    settings |= {"model_name": server.model_name, "sent": server.sent}
    settings |= {"device": None, "dtype": None}
    return _Plan(benchmarks, sampling, server.complete, settings, lambda: server.sent)


def _suite(request: SuiteRequest) -> Suite:
    return Suite(()) if is_file_name(request.suite) else find_suite(request.suite)


def _run_suite(run: Config) -> Suite:
    """A run's held-out part is sampled as the run sampled it."""
    settings = run.evaluation
    return Suite((), settings.num_samples, settings.temperature, settings.top_p)


def _sampling(request: SuiteRequest, suite: Suite) -> SamplingConfig:
    temperature = suite.temperature if request.temperature is None else request.temperature
    top_p = suite.top_p if request.top_p is None else request.top_p
    return SamplingConfig(temperature, top_p, num_samples=request.num_samples or suite.num_samples)


def _limited(sampling: SamplingConfig, max_new_tokens: int) -> SamplingConfig:
    return SamplingConfig(
        sampling.temperature,
        sampling.top_p,
        max_new_tokens=max_new_tokens,
        num_samples=sampling.num_samples,
    )


def _benchmarks(request: SuiteRequest, suite: Suite, chat: bool) -> list[Benchmark]:
    columns = PromptFormat(chat=chat, suffix=request.suffix)
    limit = request.num_problems
    if is_file_name(request.suite):
        prompts = tuple(load_prompts(request.suite, columns, limit=limit))
        grader = request.grader or fitting_grader(prompts)
        length = request.max_new_tokens or 1024
        return [_graded(Path(request.suite).stem, prompts, grader, length)]
    return [_benchmark(name, columns, request) for name in suite.benchmarks]


def _benchmark(name: str, columns: PromptFormat, request: SuiteRequest) -> Benchmark:
    prompts = tuple(load_prompts(name, columns, limit=request.num_problems))
    length = request.max_new_tokens or BENCHMARKS[name].max_new_tokens
    # GSM8K's own rule: without a mark, the last number is the answer.
    return _graded(name, prompts, "number" if name == "gsm8k" else "math", length)


def _graded(name: str, prompts: tuple[Prompt, ...], grader: Grader, length: int) -> Benchmark:
    grade = FileTask(name, prompts, grader).grade
    return Benchmark(name, prompts, grade, length, grader, voting_of(grader))


def _run_config(request: SuiteRequest) -> Config:
    manifest = RunFolder(Path(request.model).expanduser()).read_manifest()
    if manifest is None:
        raise ConfigError(
            f"--suite held-out needs a run folder, got {request.model!r}, which has no manifest. "
            "Name the folder that `tutelage train` wrote."
        )
    return parse_saved_config(manifest["config"])


def _held_out(request: SuiteRequest, run: Config, tokenizer: PreTrainedTokenizerBase) -> Benchmark:
    task = without_long_prompts(build_task(run.data), run.data, tokenizer)
    count = request.num_problems or run.evaluation.num_problems or 64
    length = request.max_new_tokens or run.sampling.max_new_tokens
    prompts = tuple(task.held_out(count))
    grader = grader_of(task)
    return Benchmark(HELD_OUT, prompts, task.grade, length, grader, voting_of(grader))


def _within_context(
    request: SuiteRequest,
    benchmark: Benchmark,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Benchmark:
    """A default length is cut to what the model's context leaves after the longest prompt."""
    context = model.config.to_dict().get("max_position_embeddings")
    if request.max_new_tokens is not None or context is None:
        return benchmark
    longest = max(
        (len(encode_prompt(tokenizer, p, request.thinking)) for p in benchmark.prompts), default=0
    )
    if longest >= context:
        raise ConfigError(
            f"{benchmark.name} has a prompt of {longest} tokens, the model's context is {context}. "
            "Choose another model, or other problems."
        )
    length = min(benchmark.max_new_tokens, context - longest)
    fields = benchmark.__dict__ | {"max_new_tokens": length}
    return Benchmark(**fields)


# --- what identifies an evaluation ----------------------------------------------------------------


def _settings(
    request: SuiteRequest, benchmarks: list[Benchmark], sampling: SamplingConfig, chat: bool
) -> dict[str, Any]:
    """Everything that decides the saved rows."""
    return {
        "model": request.model,
        "suite": request.suite,
        "benchmarks": {
            b.name: {
                "num_problems": len(b.prompts),
                "problems": b.fingerprint(),
                "max_new_tokens": b.max_new_tokens,
                "grader": b.grader,
            }
            for b in benchmarks
        },
        "num_samples": sampling.num_samples,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "chat": chat,
        "thinking": request.thinking,
        "batch_size": request.batch_size,
        "seed": request.seed,
    }


def _content_digest(source: str) -> str | None:
    """A hash of parts of the weights, quick and different for another model; None on the hub."""
    found = resolve_model(source)
    if not found.is_local:
        return None
    folder = Path(found.source)
    names = [folder / found.gguf_file] if found.gguf_file else sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in names:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for part in range(64):
                file.seek(size * part // 64)
                digest.update(file.read(65536))
    return digest.hexdigest()[:16]


def _default_folder(request: SuiteRequest, plan: _Plan) -> Path:
    content = json.dumps(plan.settings, sort_keys=True).encode()
    model = re.sub(r"[^\w.-]+", "-", Path(request.model.rstrip("/")).name or "model")
    suite = re.sub(r"[^\w.-]+", "-", Path(request.suite).stem)
    return Path("evaluations") / f"{model}-{suite}-{hashlib.sha256(content).hexdigest()[:8]}"
