"""What each phase of a step takes: seconds and memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tutelage.memory.cpu import status_bytes


class Clock:
    """Seconds and peak memory of the phases of one step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._peak_bytes: dict[str, int] = {}

    @property
    def memory(self) -> dict[str, dict[str, int]]:
        """`peak_device_bytes` on an accelerator: the largest allocation within each phase.

        Elsewhere `peak_rss_bytes`: the most main memory that the process has held by the end of
        each phase. (Linux could forget an earlier peak, but would forget it for everybody.)
        """
        is_device = self.device.type == "cuda"
        return {"peak_device_bytes" if is_device else "peak_rss_bytes": self._peak_bytes}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to a phase, and looks at its memory.

        An accelerator works on after the calls have returned, so its queue is waited for on both
        sides: what a phase has started belongs to that phase.
        """
        self._finish()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._finish()
            key = f"{name}_s"
            self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start
            if peak := self._peak():  # 0: this system does not tell
                self._peak_bytes[name] = max(self._peak_bytes.get(name, 0), peak)

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return status_bytes("VmHWM")
