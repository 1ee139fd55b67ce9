"""A plan of memory: bytes of each phase of a run, and what to turn where they do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_KNOBS = {
    "student": 'student.dtype = "bfloat16", a smaller student or, over several processes, '
    'student.sharding = "fsdp2"',
    "masters": 'optimizer.offload = true or, over several processes, student.sharding = "fsdp2"',
    "optimizer": 'optimizer.kind = "adamw_on_disk" or "adamw_8bit", optimizer.offload = true, '
    '[student.lora] or, over several processes, student.sharding = "fsdp2"',
    "teacher": 'teacher.mode = "offload" or "reload", teacher.quantization = "8bit" or, over '
    'several processes, teacher.sharding = "fsdp2" or "tp"',
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
    "whole weights": 'engine.kind = "vllm_server", whose servers hold the caches, or a smaller '
    "student",
    "gradients": "[student.lora]",
    "read at once": "a model folder with safetensors in the configured dtype",
}
"""What to turn when a part is the largest of a phase that does not fit."""


UNCOUNTED = ("context", "allocator")
"""Parts that are no tensors of a device."""

UNKNOWN_BYTES = 1 << 60
"""Stands for memory of which nobody knows how much there is."""


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
    title: str = ""
    """Of which processes it is; empty where there is one alone."""

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total_bytes)

    def lines(self) -> Iterator[str]:
        """The plan as text, with a warning and what to turn if it does not fit."""
        if self.title:
            yield f"{self.what}: {self.title}"
        for phase in self.phases:
            yield f"{self.what}: {phase.line()}"
        peak, available = self.peak, self.available_bytes
        needed = _mib(peak.total_bytes)
        there_is = "" if available >= UNKNOWN_BYTES else f", {_mib(available)} available"
        yield f"{self.what}: peak {needed} in {peak.name}{there_is}"
        if peak.total_bytes > available:
            largest = max((x for x in peak.parts if x in _KNOBS), key=peak.parts.__getitem__)
            yield (
                f"warning: {peak.name} needs {_mib(peak.total_bytes - available)} more than there "
                f"is; its largest part is {largest}. Turn to {_KNOBS[largest]}."
            )
        if self.host is not None:
            yield from self.host.lines()


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.0f} MiB"
