"""What the process's allocator of main memory does with memory that has been freed."""

from __future__ import annotations

import ctypes
import gc
import sys

import torch

_LARGEST_KEPT = (32 << 20) - (1 << 16)
"""Bytes just below the largest block for which glibc learns."""


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks below 32 MiB, so that every step finds its memory mapped.

    glibc returns a block to the system until it has once seen one as large come and go; then it
    keeps up to twice that much. Which of a run's blocks teaches it is chance, and memory that is
    taken anew is a page fault every 4 KiB. The block here is never written, so it takes no memory.
    Elsewhere than on Linux with glibc nothing changes.
    """
    torch.empty(_LARGEST_KEPT, dtype=torch.uint8)


def give_back() -> None:
    """Return memory that has been freed to the system, where the allocator would keep it (glibc).

    Taking it again costs time, so this is for runs that were asked to save memory.
    """
    gc.collect()  # models refer to themselves, so counting references does not free them
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):  # not in musl
            library.malloc_trim(0)
