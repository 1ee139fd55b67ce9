"""The device of the parts, and what it holds; a CPU stands in where parts are tried at toy size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

DEVICE = "cuda"
MIB = 1 << 20


@dataclass
class Peak:
    """Bytes at the peak of what ran."""

    allocated: int = 0
    """Of tensors."""
    reserved: int = 0
    """What torch's allocator held for them."""
    used: int = 0
    """Of the device afterwards, by whomever."""

    def described(self) -> dict[str, float]:
        """In MiB."""
        return {f"{name}_mib": round(value / MIB, 3) for name, value in vars(self).items()}


def is_cuda() -> bool:
    """Whether a card is measured."""
    return DEVICE == "cuda"


def synchronize() -> None:
    """Wait for the device."""
    if is_cuda():
        torch.cuda.synchronize()


def empty_cache() -> None:
    """Give unused memory back to the device."""
    if is_cuda():
        torch.cuda.empty_cache()


def reset_peak() -> None:
    """Look for the peak from here on."""
    if is_cuda():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """Largest allocation since; 0 without a card."""
    return torch.cuda.max_memory_allocated() if is_cuda() else 0


def phases_of(metrics: dict[str, Any]) -> dict[str, int]:
    """The peak of each phase of a step; of the process, without a card."""
    found: dict[str, int] = metrics.get("peak_device_bytes") or metrics["peak_rss_bytes"]
    return found


def kernel_milliseconds(run: Callable[[], object], most: int = 25) -> dict[str, float]:
    """Time of the device's kernels by name, those that take most of it; empty without a card."""
    from torch.profiler import ProfilerActivity, profile

    if not is_cuda():
        run()
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        synchronize()
    kernels = {e.key: e.self_device_time_total / 1e3 for e in seen.key_averages()}
    busiest = sorted(kernels.items(), key=lambda item: -item[1])[:most]
    return {"all": round(sum(kernels.values()), 2)} | {k[:120]: round(v, 2) for k, v in busiest}


@contextmanager
def measured() -> Iterator[Peak]:
    """The peak of what runs inside, filled in at the end, however it ends."""
    peak = Peak()
    if not is_cuda():
        from tutelage.memory.meta_model import Live

        with Live(()) as live:
            yield peak
        peak.allocated = peak.reserved = peak.used = live.peak
        return
    synchronize()
    empty_cache()
    reset_peak()
    try:
        yield peak
    finally:
        synchronize()
        peak.allocated = torch.cuda.max_memory_allocated()
        peak.reserved = torch.cuda.max_memory_reserved()
        free, total = torch.cuda.mem_get_info()
        peak.used = total - free
