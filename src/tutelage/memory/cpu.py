"""What a run will need of memory in each phase, before it starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tutelage.config.schema import Config
from tutelage.core._block import chunk_budget
from tutelage.core.kernels import is_supported
from tutelage.models.forward import backbone, foreign
from tutelage.models.limits import context_limit
from tutelage.setup.components import Components
from tutelage.setup.objective import needs_scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tutelage.models.teacher import Teacher

_PROBE_TOKENS, _CACHE_PROBE_TOKENS = 64, 8
"""Length of a forward pass that is measured, beside one of half the length; caches grow evenly."""
STATE_BYTES = {
    "adamw": 8.0,
    "adamw_on_disk": 8.0,
    "adamw_8bit": 2.1,
    "paged_adamw_8bit": 2.1,
    "adafactor": 0.1,
}
"""Bytes of optimizer state for each trained weight."""
_KNOBS = {
    "student": 'student.dtype = "bfloat16" or a smaller student',
    "masters": "optimizer.offload = true",
    "optimizer": 'optimizer.kind = "adamw_on_disk" or "adamw_8bit", optimizer.offload = true or '
    "[student.lora]",
    "teacher": 'teacher.mode = "offload" or "reload", or teacher.quantization = "8bit"',
    "hidden states": "teacher.hidden_budget_bytes or prompts_per_step",
    "file": 'teacher.mode = "offload"',
    "checkpoint copy": 'checkpoint_writer = "inline"',
    "float32 weights": "[student.lora] or a smaller student",
    "float32 gradients": "[student.lora] or a smaller student",
    "moments": 'optimizer.kind = "adamw_on_disk" or "adafactor"',
    "teacher weights": 'teacher.mode = "reload"',
    "vLLM": "engine.gpu_memory_utilization",
    "prefill": "data.max_prompt_tokens",
    "decoding step": "sampling_batch_size",
    "recorded states": 'scoring = "forward"',
    "KV cache": "sampling_batch_size, sampling.max_new_tokens or, with tools, "
    "data.max_inserted_tokens",
    "sampled logits": "sampling_batch_size",
    "activations": "micro_batch_tokens or student.activation_checkpointing = true",
    "head": "[student.lora], whose head is frozen",
    "gradients": "[student.lora]",
    "read at once": "a model folder with safetensors in the configured dtype",
}
"""What to turn when a part is the largest of a phase that does not fit."""


UNCOUNTED = ("context", "allocator")
"""Parts that are no tensors of a device."""


@dataclass(frozen=True)
class Phase:
    """Bytes of everything that is alive at the peak of a phase, by name."""

    name: str
    parts: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """Their sum."""
        return sum(self.parts.values())

    @property
    def allocated_bytes(self) -> int:
        """What tensors take of them, which torch's allocator counts."""
        return sum(size for name, size in self.parts.items() if name not in UNCOUNTED)

    def line(self) -> str:
        """One line: the total, and the parts from large to small."""
        large = sorted(self.parts.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {_mib(size)}" for name, size in large if size >= 1 << 20)
        return f"{self.name:8} {_mib(self.total_bytes):>10}: {shown}"


@dataclass(frozen=True)
class MemoryPlan:
    """Phases of a run on one device."""

    phases: tuple[Phase, ...]
    available_bytes: int
    host: MemoryPlan | None = None
    """The same of main memory, where the phases are those of a device of its own."""
    what: str = "memory"

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total_bytes)

    def lines(self) -> Iterator[str]:
        """The plan as text, with a warning and what to turn if it does not fit."""
        for phase in self.phases:
            yield f"{self.what}: {phase.line()}"
        peak, available = self.peak, self.available_bytes
        needed = _mib(peak.total_bytes)
        yield f"{self.what}: peak {needed} in {peak.name}, {_mib(available)} available"
        if peak.total_bytes > available:
            largest = max((x for x in peak.parts if x in _KNOBS), key=peak.parts.__getitem__)
            yield (
                f"warning: {peak.name} needs {_mib(peak.total_bytes - available)} more than there "
                f"is; its largest part is {largest}. Turn to {_KNOBS[largest]}."
            )
        if self.host is not None:
            yield from self.host.lines()


def plan_memory(config: Config, components: Components, prompt_tokens: int) -> MemoryPlan:
    """What each phase of a step needs on the device of the run.

    Weights are counted, what the backward pass keeps is measured on a short forward pass of this
    very model, and the process itself is measured as it is now.

    Args:
        config: the run.
        components: its models, loaded and at rest.
        prompt_tokens: length of the longest prompt.
    """
    sizes = Sizes(config, prompt_tokens)
    model, teacher = components.student.model, components.teacher
    weights = list(model.parameters())
    loaded = _bytes(weights) + _bytes(_own_masters(components)) + teacher.resting_bytes
    on_cpu = components.device.type == "cpu"
    base = {
        "process": max(0, status_bytes("VmRSS") - loaded) if on_cpu else 0,
        "student": _bytes(weights),
        "masters": 0
        if config.optimizer.offload and not on_cpu
        else _bytes(_own_masters(components)),
    }
    trained = sum(w.numel() for w in components.masters.weights)
    state = int(trained * STATE_BYTES[config.optimizer.kind])
    is_elsewhere = config.optimizer.state_is_on_disk or (config.optimizer.offload and not on_cpu)
    base["optimizer"] = 0 if is_elsewhere else state
    resting = teacher.full_bytes if teacher.mode == "resident" else teacher.head_bytes
    if teacher.mode == "offload" and on_cpu:
        resting = teacher.full_bytes
    rest = base | {"teacher": resting}
    hidden = sizes.rows * teacher.head_shape[1] * teacher.itemsize
    kept = min(hidden, config.teacher.hidden_budget_bytes) if on_cpu else 0
    read = _copied_bytes(config, teacher) if on_cpu and teacher.mode == "reload" else 0
    recorded = 0
    if needs_scoring(config) and config.scoring == "recorded":
        recorded = sizes.rows * model.get_output_embeddings().weight.shape[1] * model.dtype.itemsize
    base["recorded states"] = rest["recorded states"] = recorded
    phases = [
        Phase("rollout", rest | _rollout(model, sizes)),
        Phase(
            "teacher", base | _teacher(components, sizes) | {"hidden states": kept, "file": read}
        ),
        Phase("learn", rest | _learn(config, components, sizes) | {"hidden states": kept}),
    ]
    if on_cpu:
        phases.insert(0, Phase("load", {"read at once": status_bytes("VmHWM")}))
    return MemoryPlan(tuple(phases), available_bytes(components.device))


def _copied_bytes(config: Config, teacher: Teacher) -> int:
    """Pages of weight files that are resident while another dtype is made of them.

    Weights of the same dtype stay in their files, which are mapped, and are counted as the teacher.
    """
    files = Path(config.teacher.model).glob("*.safetensors")
    size = sum(file.stat().st_size for file in files)
    return 0 if abs(size - teacher.full_bytes) < 0.01 * size else size


class Sizes:
    """Tokens and sequences at the peak of each phase."""

    def __init__(self, config: Config, prompt_tokens: int) -> None:
        completions = config.prompts_per_step * config.sampling.num_samples
        self.length = prompt_tokens + config.max_completion_tokens
        self.rows = completions * config.sampling.max_new_tokens
        self.decoded = min(config.sampling_batch_size, completions)
        most = min(config.micro_batch_size, completions) * self.length
        limit = config.micro_batch_tokens or most
        self.micro_batch = max(self.length, min(most, limit // self.length * self.length))
        self.new = config.sampling.max_new_tokens
        self.shortest = prompt_tokens + self.new
        """Tokens of a sequence with as many supervised ones as there can be, and no others."""
        self.most_rows = min(config.micro_batch_size, completions) * self.new
        self.micro_rows = self.rows_among(self.micro_batch)

    def rows_among(self, num_tokens: int) -> int:
        """Most supervised tokens of a micro-batch of so many."""
        return min(num_tokens * self.new // self.shortest, self.most_rows)


def _rollout(model: PreTrainedModel, sizes: Sizes) -> dict[str, int]:
    vocab_size = model.get_output_embeddings().weight.shape[0]
    return {
        "KV cache": sizes.decoded * sizes.length * _cache_bytes(model),
        # the logits in the model's dtype, then probabilities and their sums in float64
        "sampled logits": sizes.decoded * vocab_size * (16 + model.dtype.itemsize),
    }


def _teacher(components: Components, sizes: Sizes) -> dict[str, int]:
    """The teacher and the widest tensors of a forward pass without gradient."""
    teacher = components.teacher
    width = 8 * teacher.head_shape[1]
    return {
        "teacher": teacher.full_bytes,
        "activations": sizes.micro_batch * width * teacher.itemsize,
    }


def _learn(config: Config, components: Components, sizes: Sizes) -> dict[str, int]:
    model, masters = components.student.model, components.masters
    head = model.get_output_embeddings().weight
    per_token = _saved_bytes_per_token(model)
    layers = model.config.get_text_config().num_hidden_layers
    # while a layer is differentiated, its gradients are about as large as what it kept
    activations = per_token + per_token // layers
    if config.student.activation_checkpointing:
        width = head.shape[1] * model.dtype.itemsize
        activations = layers * width + 2 * per_token // layers
    logits, budget = 8 * sizes.micro_rows * head.shape[0], chunk_budget(components.device)
    # logits of one chunk wait for backward, where the head's gradient is not summed
    is_summed = not is_supported(components.device) or logits + logits // 32 > budget
    gradients = sum(4 * m.numel() for m in masters.masters)
    gradients += sum(w.nbytes for w, _ in masters.pairs)
    # the head's gradient is summed in float32 beside that of the backward pass
    summed = 4 * head.numel() if head.requires_grad and is_summed else 0
    return {
        "activations": sizes.micro_batch * activations,
        "gradients": gradients,
        "head": min(budget, logits) + summed + 2 * 4 * sizes.micro_rows * head.shape[1],
    }


def _saved_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes that autograd keeps for each token of a forward pass."""
    return _bytes_per_token(model, _saved_bytes, _PROBE_TOKENS)


def _saved_bytes(model: PreTrainedModel, num_tokens: int) -> int:
    weights = {w.untyped_storage().data_ptr() for w in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(1, num_tokens, dtype=torch.int64, device=model.device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = backbone(model)(input_ids=ids, use_cache=False)
    total = sum(found.values())
    del output  # until here it kept every tensor alive, so no address was counted twice
    return total


def _cache_bytes(model: PreTrainedModel) -> int:
    """Bytes that a cache keeps of one token."""
    return _bytes_per_token(model, _kept_bytes, _CACHE_PROBE_TOKENS)


def _bytes_per_token(
    model: PreTrainedModel, measure: Callable[[PreTrainedModel, int], int], length: int
) -> int:
    """What one more token costs, from two forward passes over `length` tokens and half of them."""
    most = min(length, context_limit(model) or length)
    less = max(1, most // 2)
    with foreign("cannot be run to measure its memory", model):
        return max(0, measure(model, most) - measure(model, less)) // max(1, most - less)


@torch.no_grad()
def _kept_bytes(model: PreTrainedModel, num_tokens: int) -> int:
    ids = torch.zeros(1, num_tokens, dtype=torch.int64, device=model.device)
    cache = backbone(model)(input_ids=ids, use_cache=True).get("past_key_values")
    found: dict[int, int] = {}
    # a recurrent model without layers of keys keeps as much of any length
    for layer in cache.layers if hasattr(cache, "layers") else ():
        tensors = (value for value in vars(layer).values() if isinstance(value, Tensor))
        found |= {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in tensors}
    return sum(found.values())


def copied_bytes(config: Config, weights: Iterable[Tensor], device: torch.device) -> int:
    """Main memory that a copy of a checkpoint takes: weights, float32 masters and moments.

    A copy of what lies on a CUDA device is pinned, and torch pins powers of two.
    """
    here = _pinned if device.type == "cuda" else int
    beside = int if config.optimizer.offload else here
    half = STATE_BYTES[config.optimizer.kind] / 2
    total = 0
    for weight in weights:
        total += here(weight.nbytes) + 2 * beside(int(half * weight.numel()))
        if weight.itemsize < 4:
            total += beside(4 * weight.numel())
    return total


def _pinned(num_bytes: int) -> int:
    return 1 << max(0, num_bytes - 1).bit_length()


def _own_masters(components: Components) -> list[Tensor]:
    return [master.detach() for _, master in components.masters.pairs]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def status_bytes(key: str) -> int:
    """A line of this process's status: VmRSS, resident now, or VmHWM, its largest so far."""
    file = Path("/proc/self/status")
    if not file.exists():  # not Linux: the process itself stays out of the plan
        return 0
    found = [line for line in file.read_text().splitlines() if line.startswith(key)]
    return int(found[0].split()[1]) * 1024 if found else 0


def available_bytes(device: torch.device) -> int:
    """Memory of a device that is free now."""
    if device.type == "cuda":
        # what torch holds already is there for it to use
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    file = Path("/proc/meminfo")
    if not file.exists():
        return 1 << 62
    line = next(x for x in file.read_text().splitlines() if x.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024 + status_bytes("VmRSS")


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.0f} MiB"
