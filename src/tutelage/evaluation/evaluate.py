"""From a request to results: which problems, which model or server, where samples are saved."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.config.sampling import SamplingConfig, VLLMEngine
from tutelage.data.columns import notes_of
from tutelage.data.types import Prompt, Rollout
from tutelage.envs.environment import opened
from tutelage.errors import ConfigError
from tutelage.evaluation.agents import cuts, fitted, limits_of
from tutelage.evaluation.benchmark import (
    Benchmark,
    Generate,
    Result,
    generate_with,
    run_benchmark,
)
from tutelage.evaluation.folder import EvaluationFolder
from tutelage.evaluation.problems import (
    benchmarks_of,
    embedded,
    held_out,
    rendering_of,
    run_config,
    sampling_of,
    suite_of,
    suite_of_run,
)
from tutelage.evaluation.request import (
    HELD_OUT,
    EvaluationRequest,
    is_url,
    refuse_unused,
    student_of,
)
from tutelage.evaluation.tables import as_markdown, summarize
from tutelage.models.chat.template import printed_date_of
from tutelage.models.chat.tool_format import format_of
from tutelage.models.chat.tool_prompt import with_tools
from tutelage.models.chat.turn_template import turn_template
from tutelage.models.device import find_device
from tutelage.models.load import load_model, load_tokenizer
from tutelage.models.reference import resolve_model
from tutelage.models.tokenizers import encode_prompt, refuse_thinking, stop_ids
from tutelage.rollout.sampler import Sampler, TransformersSampler
from tutelage.rollout.vllm_engine import VLLMSampler
from tutelage.setup.inputs import prompt_format, thinking
from tutelage.setup.manifest import at_the_date_of_the_run
from tutelage.setup.numerics import plain_arithmetic
from tutelage.setup.phases import PhaseCallback, no_log, no_phases
from tutelage.setup.run_folder import RunFolder, environment
from tutelage.setup.shares import ALONE, Shares

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CHUNKS_OF_BATCHES = 4
"""Batches in a chunk: more keeps a batch full for longer, and loses more when it is cut off."""


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured, and where it lies."""

    results: list[Result]
    conditions: str
    """In words: how prompts are rendered, the grader, the dtype and the device."""
    record: dict[str, Any]
    table: str
    folder: Path | None
    """Samples and tables of a suite; None without a suite, which saves nothing."""


@dataclass(frozen=True)
class _Plan:
    """A request with every open value filled in."""

    benchmarks: list[Benchmark]
    sampling: SamplingConfig
    generate: Generate
    settings: dict[str, Any]
    conditions: str
    sent: Callable[[], dict[str, Any]]
    """Sampling settings as they were used in the end, by their names in requests."""
    close: Callable[[], None] = lambda: None
    """Gives back what the engine holds."""


@plain_arithmetic()
@at_the_date_of_the_run
def evaluate(
    request: EvaluationRequest,
    on_phase: PhaseCallback = no_phases,
    log: Callable[[str], None] = no_log,
    shares: Shares = ALONE,
) -> Evaluation:
    """Measure a model; an earlier evaluation of a suite with the same settings is continued.

    Args:
        request: the model, the problems and how to sample.
        on_phase: receives each phase as it begins.
        log: receives a line for what was left out of prompts, and for every sampling setting that
            a server does not know.
        shares: the processes that complete and grade the problems together; the main one alone
            writes files.

    Returns:
        Scores, one JSON record, a Markdown table and, of a suite, the folder with all samples; in
        processes that are not the main one, without any sample.

    Raises:
        TutelageError: model, data, server or a setting cannot be used.
    """
    refuse_unused(request)
    if is_url(request.model):
        _refuse_processes("a server does the work", shares)
        plan = _server_plan(request, log)
    else:
        plan = shares.apart(partial(_model_plan, request, on_phase, log, shares))
    for note in notes_of(prompt for benchmark in plan.benchmarks for prompt in benchmark.prompts):
        log(f"warning: {note}")
    folder = None
    if request.suite is not None:
        folder = Path(request.out) if request.out else _default_folder(request, plan)
    k = plan.sampling.num_samples
    at_once = request.batch_size * shares.count
    chunk_size = max(1, _CHUNKS_OF_BATCHES * at_once // k) if folder else None
    results = []
    with ExitStack() as stack:
        stack.callback(plan.close)
        saved = None
        if folder is not None:
            saved = EvaluationFolder(folder, plan.settings)
            shares.in_main(partial(stack.enter_context, saved))
            stack.enter_context(printed_date_of(shares.told(saved.started)))
        for benchmark in plan.benchmarks:
            total = len(benchmark.prompts) * k
            progress = shares.progress(on_phase, f"{benchmark.name}: completions", total)
            result = run_benchmark(benchmark, plan.generate, k, chunk_size, saved, progress, shares)
            results.append(result)
        if not shares.is_main:
            return Evaluation(results, plan.conditions, {}, "", folder)
        head = {"model": request.model, "suite": request.suite, "folder": str(folder)}
        record = summarize(results, head | {"sampling": plan.sent()})
        stated = ", ".join(f"{name} {value}" for name, value in plan.sent().items())
        title = f"`{request.model}` on {request.suite}, seed {request.seed}; sampled with {stated}"
        table = as_markdown(results, title)
        if saved is not None:
            saved.finish(record | {"settings": plan.settings} | environment(), table)
    return Evaluation(results, plan.conditions, record, table, folder)


# --- model or server ------------------------------------------------------------------------------


def _refuse_processes(why: str, shares: Shares) -> None:
    if shares.count > 1:
        raise ConfigError(
            f"{why}, so one process is enough, got {shares.count}. Start `tutelage eval` without "
            "the launcher."
        )


def _model_plan(
    request: EvaluationRequest,
    on_phase: PhaseCallback,
    log: Callable[[str], None],
    shares: Shares,
) -> _Plan:
    """Problems first, since they are the cheapest thing that can be wrong; then the model."""
    device, dtype = find_device(request.device or "auto"), request.dtype or "float32"
    run = run_config(request) if request.suite == HELD_OUT else None
    suite = suite_of_run(run) if run else suite_of(request)
    sampling = sampling_of(request, suite)
    source = student_of(request.model)
    tokenizer = load_tokenizer(source)
    chat = bool(tokenizer.chat_template) if request.chat is None else request.chat
    if run is not None:
        chat = prompt_format(run.data).chat
        if request.thinking is None:
            request = replace(request, thinking=thinking(run.data))
        benchmarks = [held_out(request, run, tokenizer)]
    elif request.is_embedded:
        benchmarks = [embedded(request, tokenizer)]
    else:
        benchmarks = benchmarks_of(request, suite, chat)
    if run is None or request.thinking != thinking(run.data):
        refuse_thinking(request.thinking, [p for b in benchmarks for p in b.prompts], tokenizer)
    on_phase(f"loading {request.model}")
    model = load_model(source, dtype, str(device))
    if any(benchmark.agent for benchmark in benchmarks):  # refuses a template without turns
        turn_template(tokenizer, stop_ids(model, tokenizer), request.thinking)
    if request.suite is not None:
        benchmarks = [_within_context(request, b, model, tokenizer, log) for b in benchmarks]
    sampler, engine = _sampler(request, model, tokenizer, log, shares)
    settings = _settings(request, benchmarks, sampling, chat)
    settings |= {
        "model_content": _content_digest(source) if request.suite and shares.is_main else None,
        "device": device.type,
        "dtype": dtype,
    }
    settings |= engine
    sent = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    return _Plan(
        benchmarks,
        sampling,
        generate_with(sampler, sampling, (request.seed,)),
        settings,
        f"{rendering_of(request, benchmarks)}, grader {benchmarks[0].grader}, {dtype} on {device}",
        lambda: sent,
        sampler.close,
    )


def _sampler(
    request: EvaluationRequest,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    log: Callable[[str], None],
    shares: Shares,
) -> tuple[Sampler, dict[str, str]]:
    """The engine and what settings record of it: vLLM for a run that sampled with it.

    Transformers is not recorded, so that folders of earlier versions have the same settings.
    """
    engine = _engine_of_run(request.model)
    kind = engine.get("kind", "transformers")
    if kind == "vllm" and model.device.type == "cuda" and _has_vllm():
        _refuse_processes("the run's engine vllm samples in a process of its own", shares)
        used = VLLMEngine(**engine)
        share = used.gpu_memory_utilization
        sampler = VLLMSampler(model, tokenizer, used.max_model_len, share, request.thinking)
        return sampler, {"engine": kind}
    if kind != "transformers":
        why = "needs vLLM and CUDA here" if kind == "vllm" else "serves a run's student alone"
        log(f"warning: the run's engine {kind} {why}: transformers samples instead")
    return TransformersSampler(model, tokenizer, request.batch_size, request.thinking), {}


def _has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def _engine_of_run(model: str) -> dict[str, Any]:
    """The table `engine` of a run folder's configuration; empty for any other reference."""
    if student_of(model) == model:
        return {}
    manifest = RunFolder(Path(model).expanduser(), is_writer=False).read_manifest() or {}
    engine: dict[str, Any] = manifest["config"].get("engine") or {}
    return engine


def _server_plan(request: EvaluationRequest, log: Callable[[str], None]) -> _Plan:
    from tutelage.evaluation.server import Server
    from tutelage.evaluation.server_conversation import converse

    if request.suite == HELD_OUT:
        raise ConfigError("--suite held-out needs a run folder, got a server. Name the run.")
    suite = suite_of(request)
    sampling = sampling_of(request, suite)
    chat = request.chat is not False
    benchmarks = benchmarks_of(request, suite, chat)
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

    def generate(
        benchmark: Benchmark, prompts: Sequence[Prompt], progress: Callable[[int], None]
    ) -> list[Rollout]:
        if benchmark.agent is not None:
            longest = benchmark.max_new_tokens
            return converse(server, benchmark.agent, prompts, longest, progress)
        return server.complete(prompts, benchmark.max_new_tokens, progress)

    return _Plan(benchmarks, sampling, generate, settings, "server", lambda: server.sent)


def _within_context(
    request: EvaluationRequest,
    benchmark: Benchmark,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    log: Callable[[str], None],
) -> Benchmark:
    """A suite's limits are cut to what the model's context leaves after the longest prompt.

    A length that was asked for is kept.
    """
    is_given = request.max_new_tokens is not None
    context = model.config.to_dict().get("max_position_embeddings")
    if context is None or (is_given and benchmark.agent is None):
        return benchmark
    prompts = benchmark.prompts
    if benchmark.agent is not None:
        agent = benchmark.agent
        tool_format = format_of(tokenizer, agent.limits.tool_format)
        told = (opened(agent.environment(), prompt) for prompt in prompts)
        prompts = tuple(with_tools(tokenizer, prompt, tool_format) for prompt in told)
    longest = max((len(encode_prompt(tokenizer, p, request.thinking)) for p in prompts), default=0)
    if longest >= context:
        raise ConfigError(
            f"{benchmark.name} has a prompt of {longest} tokens, the model's context is {context}. "
            "Choose another model, or other problems."
        )
    found = fitted(benchmark, context - longest, is_given)
    if cut := cuts(benchmark, found):
        log(f"{benchmark.name}: {cut}, to fit the model's context of {context}")
    return found


# --- what identifies an evaluation ----------------------------------------------------------------


def _settings(
    request: EvaluationRequest, benchmarks: list[Benchmark], sampling: SamplingConfig, chat: bool
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
                **limits_of(b),
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


def _default_folder(request: EvaluationRequest, plan: _Plan) -> Path:
    content = json.dumps(plan.settings, sort_keys=True).encode()
    model = re.sub(r"[^\w.-]+", "-", Path(request.model.rstrip("/")).name or "model")
    suite = re.sub(r"[^\w.-]+", "-", Path(str(request.suite)).stem)
    return Path("evaluations") / f"{model}-{suite}-{hashlib.sha256(content).hexdigest()[:8]}"
