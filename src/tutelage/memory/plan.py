"""A plan of memory: bytes of each phase of a run, and what to turn where they do not fit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tutelage.config.schema import Config
from tutelage.errors import ConfigError

_SHARDING = 'over several processes, student.sharding = "fsdp2"'
_KNOBS = {
    "student": ('student.dtype = "bfloat16"', "a smaller student", _SHARDING),
    "masters": ("optimizer.offload = true", _SHARDING),
    "optimizer": (
        'optimizer.kind = "adamw_on_disk"',
        'optimizer.kind = "adamw_8bit"',
        "optimizer.offload = true",
        "[student.lora]",
        _SHARDING,
    ),
    "teacher": (
        'teacher.mode = "offload"',
        'teacher.mode = "reload"',
        'teacher.quantization = "8bit"',
        'over several processes, teacher.sharding = "fsdp2"',
        'over several processes, teacher.sharding = "tp"',
    ),
    "hidden states": ("teacher.hidden_budget_bytes", "prompts_per_step"),
    "log-probabilities": ("teacher.num_logprobs", "prompts_per_step"),
    "file": ('teacher.mode = "offload"',),
    "checkpoint copy": ('checkpoint_writer = "inline"',),
    "float32 weights": ("[student.lora]", "a smaller student"),
    "float32 gradients": ("[student.lora]", "a smaller student"),
    "moments": ('optimizer.kind = "adamw_on_disk"', 'optimizer.kind = "adafactor"'),
    "teacher weights": ('teacher.mode = "reload"',),
    "vLLM": ("engine.gpu_memory_utilization",),
    "prefill": ("data.max_prompt_tokens",),
    "decoding step": ("sampling_batch_size",),
    "recorded states": ('scoring = "forward"',),
    "KV cache": (
        "sampling_batch_size",
        "sampling.max_new_tokens",
        "with tools, data.max_inserted_tokens",
    ),
    "sampled logits": ("sampling_batch_size",),
    "activations": ("micro_batch_tokens", "student.activation_checkpointing = true"),
    "head": ("[student.lora], whose head is frozen",),
    "whole weights": (
        'engine.kind = "vllm_server", whose servers hold the caches',
        "a smaller student",
    ),
    "gradients": ("[student.lora]",),
    "read at once": ("a model folder with safetensors in the configured dtype",),
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

    def lines(self, config: Config) -> Iterator[str]:
        """The plan as text, with a warning and what to turn if it does not fit.

        Args:
            config: the run's; what it has already, or would refuse, is not named.
        """
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
                f"is; its largest part is {largest}.{_advice(config, largest)}"
            )
        if self.host is not None:
            yield from self.host.lines(config)


def _advice(config: Config, part: str) -> str:
    """What to turn where this part is too large; empty where all of it was turned."""
    *others, last = [knob for knob in _KNOBS[part] if _is_left(config, knob)] or [""]
    return f" Turn to {', '.join(others)}{' or ' if others else ''}{last}." if last else ""


def _is_left(config: Config, knob: str) -> bool:
    """Whether a configuration lacks the setting or the table that a text names, and may have it."""
    if table := re.search(r"\[(\w+)\.(\w+)\]", knob):
        return getattr(getattr(config, table[1]), table[2]) is None
    setting = re.search(r"(?:(\w+)\.)?(\w+) = (\w+|\"\w+\")", knob)
    if setting is None:
        return True
    name, value = setting[2], json.loads(setting[3])
    whole: Any = config
    side = getattr(whole, setting[1]) if setting[1] else whole
    if name == "sharding" and side.sharding != "none":
        return False
    try:
        turned = replace(side, **{name: value})
        turned = replace(whole, **{setting[1]: turned}) if setting[1] else turned
    except ConfigError:
        return False
    return bool(turned != config)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.0f} MiB"
