"""A function of static memory, captured once and replayed: one launch instead of hundreds."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch


class Graph(Protocol):
    """Something that has been captured."""

    def replay(self) -> None:
        """Run it once more on what its memory holds now."""


Capture = Callable[[Callable[[], None]], Graph]
"""Runs a function at least once, and captures it."""


class EagerGraph:
    """Calls the function itself: what runs where nothing can be captured."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run
        run()

    def replay(self) -> None:
        """Run it once more."""
        self._run()


class CudaGraph:
    """A CUDA graph. The function must allocate nothing, and never wait for the device."""

    def __init__(self, run: Callable[[], None], pool: Any = None) -> None:
        self._run = run  # holds the memory that the graph works on
        self._graph = torch.cuda.CUDAGraph()
        stream = _side_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled and libraries make their plans
                run()
            stream.synchronize()
            gc.collect()  # what it would end in the middle of a capture
            # Other threads may go on allocating: only this one has to keep still.
            shared = {} if pool is None else {"pool": pool}
            self._graph.capture_begin(capture_error_mode="thread_local", **shared)
            try:
                run()
            finally:
                self._graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def replay(self) -> None:
        """Run it once more."""
        self._graph.replay()


@cache
def _side_stream(device: int) -> Any:
    """The one stream that graphs are captured on, for cuBLAS keeps memory for every stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
