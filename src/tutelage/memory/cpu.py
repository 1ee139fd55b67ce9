"""What a run will need of memory in each phase, before it starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tutelage.config.rollouts import has_teacher_prefix
from tutelage.config.schema import Config
from tutelage.config.self_teacher import SelfTeacher
from tutelage.core._block import chunk_budget
from tutelage.core.kernels import is_supported
from tutelage.memory.plan import MemoryPlan, Phase
from tutelage.memory.shards import Shards, TeacherParts
from tutelage.memory.stored import of_steps
from tutelage.memory.teacher_weights import told_bytes
from tutelage.models.forward import backbone, foreign
from tutelage.models.limits import context_limit
from tutelage.setup.components import Components
from tutelage.setup.objective import needs_scoring, needs_teacher
from tutelage.setup.process_counts import ONE_PROCESS, ProcessCounts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tutelage.models.teacher_protocol import AnyTeacher

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


def plan_memory(
    config: Config,
    components: Components,
    prompt_tokens: int,
    processes: ProcessCounts = ONE_PROCESS,
) -> MemoryPlan:
    """What each phase of a step needs on the device of the run.

    Weights are counted, what the backward pass keeps is measured on a short forward pass of this
    very model, and the process itself is measured as it is now.

    Args:
        config: the run.
        components: its models, loaded and at rest.
        prompt_tokens: length of the longest prompt.
        processes: of the run, of which one is planned.

    Raises:
        ConfigError: the processes cannot share models or prompts evenly.
    """
    sizes = Sizes(config, prompt_tokens, processes)
    model, teacher = components.student.model, components.teacher
    shards = shards_of(config, model, processes)
    parts = _parts_of(config, teacher, processes)
    weights = list(model.parameters())
    loaded = _bytes(weights) + _bytes(_own_masters(components)) + teacher.resting_bytes
    on_cpu = components.device.type == "cpu"
    base = {
        "process": max(0, status_bytes("VmRSS") - loaded) if on_cpu else 0,
        "student": _bytes(weights) if shards is None else shards.stored_bytes,
        "masters": 0
        if shards is not None or (config.optimizer.offload and not on_cpu)
        else _bytes(_own_masters(components)),
    }
    trained = sum(w.numel() for w in components.masters.weights)
    if shards is not None:
        trained = shards.trained_numel
    state = int(trained * STATE_BYTES[config.optimizer.kind])
    is_elsewhere = config.optimizer.state_is_on_disk or (config.optimizer.offload and not on_cpu)
    base["optimizer"] = 0 if is_elsewhere else state
    full = teacher.full_bytes if parts is None else parts.stored_bytes + parts.head_bytes
    reads = needs_teacher(config)
    resting = full if teacher.mode == "resident" else teacher.head_bytes * reads
    if teacher.mode == "offload" and on_cpu:
        resting = full
    rest = base | {"teacher": resting}
    hidden = sizes.rows * teacher.head_shape[1] * teacher.itemsize * reads
    kept = min(hidden, config.teacher.hidden_budget_bytes) if on_cpu else 0
    read = _copied_bytes(config, teacher) if on_cpu and teacher.mode == "reload" else 0
    recorded = 0
    if needs_scoring(config) and config.scoring == "recorded":
        recorded = sizes.rows * model.get_output_embeddings().weight.shape[1] * model.dtype.itemsize
    base["recorded states"] = rest["recorded states"] = recorded
    whole = 0 if shards is None else shards.whole_bytes + shards.gathering_bytes
    reading = {"teacher": full, "gathered weights": 0 if parts is None else parts.gathered_bytes}
    of_teacher = base | _teacher(components, sizes) | reading
    told = {"log-probabilities": sizes.rows * told_bytes(config) * reads * on_cpu}
    given = {"hidden states": kept} | told
    phases = [
        *_prefix(config, teacher, sizes, base | {"teacher": full, "recorded states": 0}),
        Phase("rollout", rest | _rollout(model, sizes) | {"whole weights": whole}),
        *([Phase("teacher", of_teacher | given | {"file": read})] if reads else []),
        Phase("learn", rest | _learn(config, components, sizes, shards) | given),
    ]
    phases = [of_steps(config, phase, teacher.head_bytes) for phase in phases]
    available = available_bytes(components.device)
    if on_cpu:
        phases.insert(0, Phase("load", {"read at once": status_bytes("VmHWM")}))
        available //= processes.per_host
    return MemoryPlan(tuple(phases), available, title=processes.title(config))


def shards_of(config: Config, student: PreTrainedModel, processes: ProcessCounts) -> Shards | None:
    """The shards of a student that processes hold together; None where each has it whole."""
    group = processes.student_group(config)
    return Shards.of(student, student, group) if group > 1 else None


def _parts_of(config: Config, teacher: AnyTeacher, processes: ProcessCounts) -> TeacherParts | None:
    group = processes.teacher_group(config)
    if group == 1:
        return None
    with teacher.on_device():
        return TeacherParts.of(teacher.model, config.teacher.sharding, group)


def _copied_bytes(config: Config, teacher: AnyTeacher) -> int:
    """Pages of weight files that are resident while another dtype is made of them.

    Weights of the same dtype stay in their files, which are mapped, and are counted as the teacher.
    """
    files = Path(config.teacher.model).glob("*.safetensors")
    size = sum(file.stat().st_size for file in files)
    return 0 if abs(size - teacher.full_bytes) < 0.01 * size else size


class Sizes:
    """Tokens and sequences at the peak of each phase."""

    def __init__(
        self, config: Config, prompt_tokens: int, processes: ProcessCounts = ONE_PROCESS
    ) -> None:
        self.completions = completions = processes.prompts(config) * config.sampling.num_samples
        evaluation = config.evaluation
        problems = -(-evaluation.num_problems // processes.count)
        self.evaluated = problems * evaluation.num_samples
        """Completions of an evaluation that one process has."""
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


def _prefix(
    config: Config, teacher: AnyTeacher, sizes: Sizes, rest: dict[str, int]
) -> Iterator[Phase]:
    """The teacher samples the first tokens of completions, where it does."""
    if has_teacher_prefix(config.rollouts):
        with teacher.on_device():
            yield Phase("prefix", rest | _rollout(teacher.model, sizes))


def _teacher(components: Components, sizes: Sizes) -> dict[str, int]:
    """The widest tensors of a forward pass without gradient."""
    teacher = components.teacher
    width = 8 * teacher.head_shape[1]
    return {"activations": sizes.micro_batch * width * teacher.itemsize}


def _learn(
    config: Config, components: Components, sizes: Sizes, shards: Shards | None
) -> dict[str, int]:
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
    gathered = reduced = 0
    if shards is not None:
        gathered = max(shards.first_bytes, shards.forward_bytes)
        reduced = max(shards.summing_bytes, shards.last_sum_bytes - shards.root.trained_bytes)
        gradients = shards.trained_bytes + shards.root.trained_bytes
    return {
        "activations": sizes.micro_batch * activations,
        "gradients": gradients,
        "gathered weights": gathered,
        "summed gradients": reduced,
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
    here = pinned_bytes if device.type == "cuda" else int
    beside = int if config.optimizer.offload else here
    half = STATE_BYTES[config.optimizer.kind] / 2
    total = 0
    for weight in weights:
        total += here(weight.nbytes) + 2 * beside(int(half * weight.numel()))
        if weight.itemsize < 4:
            total += beside(4 * weight.numel())
        if isinstance(config.teacher, SelfTeacher) and config.teacher.weights == "ema":
            total += here(4 * weight.numel())
    return total


def pinned_bytes(num_bytes: int) -> int:
    """What torch takes of main memory to pin so many bytes: a power of two."""
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
