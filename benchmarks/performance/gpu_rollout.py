"""Rollouts on one GPU: correctness, milliseconds a step, and how far the memory's speed is.

`PARTS` maps names to functions; each makes its models on the device with random weights, prints
short lines, and returns what a JSON file can hold. Without a GPU the parts run tiny models in
torch, which shows only that the code runs.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tutelage.config.sampling import SamplingConfig
from tutelage.data.types import Prompt, Rollout
from tutelage.models.tokenizers import stop_ids
from tutelage.rollout.cuda import blocks, generate, kv_slots, triton_operators
from tutelage.rollout.cuda.cuda_graph import CudaGraph, EagerGraph
from tutelage.rollout.cuda.generate import GraphGenerator
from tutelage.rollout.cuda.kv_slots import Device, cuda_device, make_token_sampling
from tutelage.rollout.cuda.operators import TorchOperators
from tutelage.rollout.generate import generate as generate_rollouts
from tutelage.rollout.request import (
    CompletionRequest,
    OpenRollout,
    RolloutRequest,
    completion_requests,
)

IS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if IS_CUDA else "cpu")
SIZES: dict[str, dict[str, int]] = {
    "0.6b": {"hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072}
    | {"num_attention_heads": 16},
    "1.7b": {"hidden_size": 2048, "num_hidden_layers": 28, "intermediate_size": 6144}
    | {"num_attention_heads": 16},
    "4b": {"hidden_size": 2560, "num_hidden_layers": 36, "intermediate_size": 9728}
    | {"num_attention_heads": 32},
}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 560}
ATTENTION = ((64, 4, 3), (32, 4, 3), (64, 4, 2), (128, 8, 2), (64, 2, 3), (32, 2, 4))
"""Columns of a block, warps and stages that are tried."""
PROMPT, NEW = (128, 256) if IS_CUDA else (6, 12)


def say(*words: object) -> None:
    """Print one line at once."""
    print(*words, flush=True)


def make_model(
    size: str, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> tuple[Any, Any, int]:
    """A random Qwen3 on the device, a tokenizer of as many words, and their number."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes: dict[str, Any] = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
    sizes |= SIZES[size]
    if not IS_CUDA:
        sizes, dtype = dict(TINY), torch.float32
    sizes |= {"tie_word_embeddings": True, "max_position_embeddings": 40960} | options
    config = Qwen3Config(bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with DEVICE:
            model = Qwen3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    num_words = min(config.vocab_size, 151669)
    return model.requires_grad_(False), make_tokenizer(num_words), num_words


def make_tokenizer(num_words: int) -> Any:
    """Words w3, w4, …, whose ids are their numbers."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, num_words))]
    core = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def make_prompts(count: int, num_words: int, lengths: Sequence[int]) -> list[Prompt]:
    """Random words, with these numbers of them in turn."""
    generator = torch.Generator().manual_seed(1)
    prompts = []
    for i in range(count):
        ids = torch.randint(3, num_words, (lengths[i % len(lengths)],), generator=generator)
        prompts.append(Prompt(f"p{i}", " ".join(f"w{j}" for j in ids.tolist())))
    return prompts


@contextmanager
def timed() -> Iterator[list[float]]:
    """A list that holds the seconds that the block took, device included."""
    _wait()
    seconds: list[float] = []
    start = time.perf_counter()
    yield seconds
    _wait()
    seconds.append(time.perf_counter() - start)


def _wait() -> None:
    if IS_CUDA:
        torch.cuda.synchronize()


def _clear() -> None:
    generate._SLOTS.clear()
    gc.collect()
    if IS_CUDA:
        torch.cuda.empty_cache()


def open_generator(
    model: Any,
    tokenizer: Any,
    config: SamplingConfig,
    batch_size: int,
    requests: Sequence[CompletionRequest],
) -> GraphGenerator:
    """The generator that `generate` takes on a GPU; on a CPU the same without a graph."""
    if IS_CUDA:
        device = cuda_device(DEVICE)
    else:
        device = Device(TorchOperators(), EagerGraph, 4)
    generator = GraphGenerator(model, tokenizer, config, batch_size, False, device)
    if not generator.open_slots(requests):
        raise RuntimeError("a step does not give the model's own hidden states.")
    return generator


def generate_all(
    generator: GraphGenerator, requests: Sequence[CompletionRequest]
) -> list[OpenRollout]:
    """Every completion, in the order of the requests."""
    with torch.no_grad():
        done = [row for finished in generator.generate(requests) for row in finished]
    return sorted(done, key=lambda row: row.request.index)


def _requests(
    tokenizer: Any, prompts: Sequence[Prompt], seed: tuple[int, ...]
) -> list[CompletionRequest]:
    return completion_requests(tokenizer, RolloutRequest(prompts, SamplingConfig(), seed))


def _own_step(model: Any, tokenizer: Any, request: RolloutRequest) -> list[Rollout]:
    """Rollouts by the model's own forward pass."""
    return generate_rollouts(model, tokenizer, request, 16, is_fast=False)


def copy_speed() -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty((2 << 30) if IS_CUDA else 1 << 20, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (time_calls(lambda: target.copy_(source)) / 1e3)


def time_calls(call: Callable[[], object], count: int = 10) -> float:
    """Median milliseconds of a call."""
    taken = []
    for i in range(count + 2):
        with timed() as seconds:
            call()
        if i > 1:
            taken.append(seconds[0] * 1e3)
    return median(taken)


def time_graph(run: Callable[[], None], count: int = 10) -> float:
    """Median milliseconds of a captured function."""
    graph: Any = CudaGraph(run) if IS_CUDA else EagerGraph(run)
    return time_calls(graph.replay, count)


# --- correctness ----------------------------------------------------------------------------------


def correctness_small() -> dict[str, Any]:
    """Float32, 4 layers: the same tokens as the model's own forward on this device and on a CPU."""
    small = {"num_hidden_layers": 4, "vocab_size": 32000, "initializer_range": 0.05}
    torch.backends.cuda.matmul.allow_tf32 = False
    ways = {
        "sampled": SamplingConfig(max_new_tokens=32),
        "temperature 0.6, top-k 20, top-p 0.95": SamplingConfig(0.6, 0.95, 20, 32),
        "top-p 0.9": SamplingConfig(1.0, 0.9, 0, 32),
        "greedy": SamplingConfig(0.0, max_new_tokens=32),
    }
    result: dict[str, Any] = {}
    for window in (None, 24):
        options: dict[str, Any] = dict(small) if IS_CUDA else {}
        if window:
            options |= {"use_sliding_window": True, "sliding_window": window}
            options |= {"max_window_layers": 1}
        model, tokenizer, num_words = make_model("0.6b", torch.float32, **options)
        prompts = make_prompts(24, num_words, (5, 17, 40))
        for name, config in ways.items():
            requests = _requests(tokenizer, prompts, (7,))
            generator = open_generator(model, tokenizer, config, 16, requests)
            ours = generate_all(generator, requests)
            own = _own_step(model, tokenizer, RolloutRequest(prompts, config, (7,)))
            result[f"{name}, window {window}"] = _compared(ours, own)
        _clear()
    for name, numbers in result.items():
        say(name, numbers)
    return result


def _compared(ours: Sequence[OpenRollout], own: list[Rollout]) -> dict[str, float]:
    pairs = [(a, b) for a, b in zip(ours, own, strict=True)]
    same = [tuple(a.tokens) == b.completion_ids for a, b in pairs]
    first = [a.tokens[0] == b.completion_ids[0] for a, b in pairs]
    gaps = [
        abs(x - y)
        for (a, b), is_same in zip(pairs, same, strict=True)
        if is_same
        for x, y in zip(a.logprobs, b.logprobs or (), strict=True)
    ]
    return {
        "same completions": sum(same) / len(same),
        "same first tokens": sum(first) / len(first),
        "largest log-prob gap of these": max(gaps, default=float("nan")),
    }


def correctness_large() -> dict[str, Any]:
    """bf16, 1.7B: log-probs of what was drawn, by one forward of the whole sequences in float32."""
    model, tokenizer, num_words = make_model("1.7b", initializer_range=0.03)
    prompts = make_prompts(16, num_words, (PROMPT, PROMPT // 2))
    config = SamplingConfig(max_new_tokens=min(NEW, 64))
    requests = _requests(tokenizer, prompts, (3,))
    generator = open_generator(model, tokenizer, config, 16, requests)
    ours = generate_all(generator, requests)
    own = _own_step(model, tokenizer, RolloutRequest(prompts, config, (3,)))
    result: dict[str, Any] = {"against the own step": _compared(ours, own)}
    drawn = [(row.request.ids, tuple(row.tokens), row.logprobs) for row in ours]
    theirs = [(r.prompt_ids, r.completion_ids, list(r.logprobs or ())) for r in own]
    result["step against the model's own"] = step_error(model, generator, requests)
    _clear()
    exact = model.float()
    for name, rows in (("captured step", drawn), ("own step", theirs)):
        gaps = torch.cat([_gaps(exact, *row) for row in rows])
        result[f"log-prob gaps to float32, {name}"] = {
            "mean": float(gaps.abs().mean()),
            "largest": float(gaps.abs().max()),
            "bias": float(gaps.mean()),
        }
    for name, numbers in result.items():
        say(name, numbers)
    return result


@torch.no_grad()
def _gaps(model: Any, prompt: Sequence[int], tokens: Sequence[int], got: Sequence[float]) -> Tensor:
    ids = torch.tensor([[*prompt, *tokens]], device=DEVICE)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
    num_ids = min(model.config.vocab_size, 151669)
    logits = hidden @ model.lm_head.weight[:num_ids].t()
    expected = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)
    gaps: Tensor = torch.tensor(got, device=DEVICE) - expected
    return gaps


@torch.no_grad()
def step_error(
    model: Any, generator: GraphGenerator, requests: Sequence[CompletionRequest]
) -> dict[str, float]:
    """Relative error of one step's hidden states against the model's own, each to float32's."""
    slots, ids = generator.slots, list(requests[0].ids)
    own, read = slots.prefill(model, [tuple(ids)], 0)
    rows = slots.rows.first(min(8, slots.num_slots))
    count, length = len(rows.token), len(ids) - 1
    slots.copy_prompts(read, [0] * count, list(range(count)))
    rows.slot.copy_(torch.arange(count))
    rows.token.fill_(ids[-1])
    rows.position.fill_(length)
    rows.done.zero_()
    rows.column.zero_()
    slots.step.feed(rows, make_memory(slots, count, generator.num_ids), slots.cache, slots.turn)
    expected = own[0, -1].float()
    errors = (rows.hidden.float() - expected).norm(dim=1) / expected.norm()
    return {"largest of the rows": float(errors.max()), "smallest": float(errors.min())}


def make_memory(slots: Any, count: int, num_ids: int) -> Any:
    """Memory of a step of the rollouts measured here."""
    return slots.work(count, slots.num_splits(count, PROMPT + NEW), num_ids)


# --- speed ----------------------------------------------------------------------------------------


def natural(
    size: str, batches: Sequence[int], peers: Sequence[int], profiles: bool = False
) -> dict[str, Any]:
    """Completions of equal length at several batch sizes, against `generate` and the memory."""
    model, tokenizer, num_words = make_model(size)
    speed = copy_speed()
    result: dict[str, Any] = {"copy TB/s": round(speed / 1e12, 3)}
    say(size, result)
    for batch in batches:
        prompts = make_prompts(batch, num_words, (PROMPT,))
        entry = _ours(model, tokenizer, prompts, batch, speed)
        if batch in peers:
            entry |= _peer(model, prompts, tokenizer)
            entry["times generate"] = entry["generate ms/step"] / entry["ms/step"]
        result[f"batch {batch}"] = entry
        say(size, "batch", batch, json.dumps({k: _short(v) for k, v in entry.items()}))
        if profiles and batch == batches[0]:
            result["profile"] = _profile(generate._SLOTS[model])
        _clear()
    return result


def _ours(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], batch: int, speed: float
) -> dict[str, Any]:
    config = SamplingConfig(max_new_tokens=NEW)
    entry: dict[str, Any] = {}
    walls = []
    for i in range(3):
        requests = _requests(tokenizer, prompts, (i,))
        with timed() as seconds:
            generator = open_generator(model, tokenizer, config, batch, requests)
            rows = generate_all(generator, requests)
        walls.append(seconds[0])
    slots = generator.slots
    graph: Any = next(iter(slots._graphs.values()))
    rows_now = slots.rows
    rows_now.done.zero_()
    rows_now.position.fill_(PROMPT + NEW // 2)
    taken = []
    for _ in range(8):
        rows_now.column.zero_()
        with timed() as seconds:
            for _ in range(kv_slots.STEPS):
                graph.replay()
        taken.append(seconds[0] * 1e3 / kv_slots.STEPS)
    # Weights of all products once, and keys and values of every row's tokens.
    weights = sum(p.nbytes for n, p in model.named_parameters() if "embed" not in n)
    weights += slots.step.head.nbytes
    sizes = slots.sizes
    per_token = sizes.num_layers * 2 * sizes.num_groups * sizes.head_dim * slots.cache.itemsize
    limit = (weights + batch * (PROMPT + NEW / 2) * per_token) / speed * 1e3
    tokens = sum(len(row.tokens) for row in rows)
    entry["first draw s"], entry["draw s"] = walls[0], min(walls[1:])
    entry["tokens/s"] = tokens / min(walls[1:])
    entry["ms/step"] = min(walls[1:]) * 1e3 / NEW
    entry["graph ms/step"] = median(taken)
    entry["limit ms/step"] = limit
    entry["share of the limit"] = limit / entry["ms/step"]
    with timed() as seconds, torch.no_grad():
        count = len(slots.rows.token)
        slots._capture(
            count, slots.num_splits(count, PROMPT + NEW), config, generator.num_ids, (2,)
        )
    entry["capture s"] = seconds[0]
    entry["cache GB"] = slots.cache.nbytes / 1e9
    return entry


@torch.no_grad()
def _peer(model: Any, prompts: Sequence[Prompt], tokenizer: Any) -> dict[str, Any]:
    ids = torch.tensor(
        [request.ids for request in _requests(tokenizer, prompts, (0,))], device=DEVICE
    )
    mask = torch.ones_like(ids)
    new = NEW // 2

    def draw(count: int) -> None:
        model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0,
            min_new_tokens=count, max_new_tokens=count, pad_token_id=0,
        )  # fmt: skip

    walls = []
    for _ in range(2):  # the first has every width of the cache before it for the first time
        with timed() as seconds:
            draw(new)
        walls.append(seconds[0] * 1e3 / new)
    return {"generate ms/step": walls[1], "generate ms/step, new widths": walls[0]}


def _profile(slots: Any) -> list[dict[str, Any]]:
    """The kernels of one replay, the longest first."""
    if not IS_CUDA:
        return []
    from torch.profiler import ProfilerActivity, profile

    graph = next(iter(slots._graphs.values()))
    slots.rows.column.zero_()
    slots.rows.done.zero_()
    slots.rows.position.fill_(PROMPT + NEW // 2)
    graph.replay()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        graph.replay()
        torch.cuda.synchronize()
    events = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    table = [
        {"kernel": e.key[:90], "us": round(e.self_device_time_total, 1), "count": e.count}
        for e in events
    ]
    say("kernels", sum(e["count"] for e in table), "us", round(sum(e["us"] for e in table), 1))
    for entry in table[:15]:
        say(f"{entry['us']:9.1f} us {entry['count']:4d} {entry['kernel']}")
    return table[:25]


def ragged() -> dict[str, Any]:
    """Completions that end at random, 64 at a time, against `generate` in batches of 64."""
    model, tokenizer, num_words = make_model("1.7b")
    count, batch = (192, 64) if IS_CUDA else (12, 8)
    ends = list(range(3, 3 + num_words // 148))
    model.generation_config.eos_token_id = ends
    prompts = make_prompts(count, num_words, (PROMPT, PROMPT // 2, PROMPT // 4, PROMPT // 3))
    config = SamplingConfig(max_new_tokens=NEW)
    walls = []
    for _ in range(2):
        requests = _requests(tokenizer, prompts, (0,))
        with timed() as seconds:
            generator = open_generator(model, tokenizer, config, batch, requests)
            rows = generate_all(generator, requests)
        walls.append(seconds[0])
    tokens = sum(len(row.tokens) for row in rows)
    result: dict[str, Any] = {
        "first draw s": walls[0],
        "draw s": walls[1],
        "tokens": tokens,
        "tokens/s": tokens / walls[1],
        "looks": generator.num_transfers,
        "stop ids": len(stop_ids(model, tokenizer)),
    }
    say({k: _short(v) for k, v in result.items()})
    _clear()
    result |= _ragged_peer(model, tokenizer, prompts, batch)
    result["times generate"] = result["tokens/s"] / result["generate tokens/s"]
    say({k: _short(v) for k, v in result.items()})
    return result


@torch.no_grad()
def _ragged_peer(model: Any, tokenizer: Any, prompts: Any, batch: int) -> dict[str, Any]:
    requests = _requests(tokenizer, prompts, (0,))
    ends = torch.tensor(model.generation_config.eos_token_id, device=DEVICE)
    counts, walls = [], []
    for start in range(0, len(requests), batch):
        with timed() as seconds:
            ids = [request.ids for request in requests[start : start + batch]]
            width = max(map(len, ids))
            padded = torch.tensor([[0] * (width - len(x)) + list(x) for x in ids], device=DEVICE)
            mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in ids], device=DEVICE)
            out: Tensor = model.generate(
                input_ids=padded, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0,
                max_new_tokens=NEW, pad_token_id=0,
            )[:, width:]  # fmt: skip
            is_end = torch.isin(out, ends)
            before = is_end.long().cumsum(1) - is_end.long()
            counts.append(int((before == 0).sum()))
        walls.append(seconds[0])
    # The first batch has every width of the cache before it for the first time.
    return {
        "generate s": walls,
        "generate tokens": counts,
        "generate tokens/s": sum(counts[1:]) / sum(walls[1:]),
    }


def variants() -> dict[str, Any]:
    """Milliseconds of a whole step for ways to run its attention, and of each product alone."""
    model, tokenizer, num_words = make_model("1.7b")
    result: dict[str, Any] = {}
    config = SamplingConfig(max_new_tokens=NEW)
    for batch in (64, 8) if IS_CUDA else (8,):
        prompts = make_prompts(batch, num_words, (PROMPT,))
        requests = _requests(tokenizer, prompts, (0,))
        slots = open_generator(model, tokenizer, config, batch, requests).slots
        result |= _products(slots, batch)
        for block, warps, stages in ATTENTION:
            blocks.COLUMN_BLOCK = block
            triton_operators.ATTEND.update(num_warps=warps, num_stages=stages)
            name = f"batch {batch}, attention {block} {warps} {stages}, us a layer"
            result[name] = _attention(slots, batch)
            say(name, _short(result[name]))
        blocks.COLUMN_BLOCK, warps, stages = ATTENTION[0]
        triton_operators.ATTEND.update(num_warps=warps, num_stages=stages)
        result |= _sampling(slots, batch, num_words)
        _clear()
    return result


@torch.no_grad()
def _products(slots: Any, batch: int) -> dict[str, float]:
    work = make_memory(slots, batch, 1000)
    pairs = {
        "qkv": (work.normed, work.qkv),
        "o": (work.mixed, work.y),
        "gate_up": (work.normed, work.gate_up),
        "down": (work.opened, work.y),
    }
    found = {}
    for name, (source, target) in pairs.items():
        source.normal_()
        calls = [layer.__dict__[name] for layer in slots.step.layers]

        def run(calls: Any = calls, source: Any = source, target: Any = target) -> None:
            for call in calls:
                call(source, target)

        key = f"batch {batch}, product {name}, us"
        found[key] = time_graph(run) * 1e3 / len(calls)
        rate = calls[0].weight.nbytes / found[key] / 1e6
        say(key, _short(found[key]), "TB/s", _short(rate))
    slots.rows.hidden.normal_()
    hidden = slots.rows.hidden[:batch]
    found[f"batch {batch}, head, us"] = (
        time_graph(lambda: slots.step._project(hidden, work.logits)) * 1e3
    )
    say("head us", _short(found[f"batch {batch}, head, us"]))
    return found


@torch.no_grad()
def _attention(slots: Any, batch: int) -> float:
    work, rows = make_memory(slots, batch, 1000), slots.rows.first(batch)
    work.qkv.normal_()
    rows.slot.copy_(torch.arange(batch))
    rows.position.fill_(PROMPT + NEW // 2)
    rows.done.zero_()
    step = slots.step

    def run() -> None:
        for i, layer in enumerate(step.layers):
            cache = (slots.cache[i, 0], slots.cache[i, 1])
            step.operators.attend(rows, work, layer.heads, cache, slots.turn)

    return time_graph(run) * 1e3 / len(step.layers)


@torch.no_grad()
def _sampling(slots: Any, batch: int, num_words: int) -> dict[str, float]:
    work, rows = make_memory(slots, batch, num_words), slots.rows.first(batch)
    work.logits.normal_()
    rows.column.zero_()
    rows.uniform.uniform_()
    found = {}
    for name, config in {
        "sampled": SamplingConfig(),
        "greedy": SamplingConfig(0.0),
        "top-k 20, top-p 0.95": SamplingConfig(0.6, 0.95, 20),
        "top-p 0.95": SamplingConfig(1.0, 0.95),
    }.items():
        sampling = make_token_sampling(config, num_words, [2], DEVICE)
        key = f"batch {batch}, {name}, us"
        found[key] = (
            time_graph(lambda p=sampling: slots.step.operators.sample(rows, work, p)) * 1e3  # type: ignore[misc]
        )
        say(key, _short(found[key]))
    return found


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "rollout_correctness_small": correctness_small,
    "rollout_correctness_large": correctness_large,
    "rollout_64": lambda: natural("1.7b", (64,), (64,), profiles=True),
    "rollout_variants": variants,
    "rollout_8_256": lambda: natural("1.7b", (8, 256), (8,), profiles=True),
    "rollout_ragged": ragged,
    "rollout_0.6b": lambda: natural("0.6b", (64,), ()),
    "rollout_4b": lambda: natural("4b", (64,), ()),
}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        say("==", part)
        say(json.dumps(PARTS[part](), default=float))
