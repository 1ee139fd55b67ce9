"""Devices by their names."""

from __future__ import annotations

import ctypes
import gc
import sys

import torch

from tutelage.errors import ConfigError


def find_device(name: str) -> torch.device:
    """A device by its name: cpu, cuda, cuda:N, or auto, which takes CUDA where it is.

    Raises:
        ConfigError: it is unknown or not there.
    """
    num_here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if num_here else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is unknown. Use auto, cpu or cuda.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported. Use auto, cpu or cuda.")
    if device.type == "cuda" and (device.index or 0) >= num_here:
        found = f"only {num_here} CUDA devices" if num_here else "no CUDA device"
        raise ConfigError(f"device {name!r} is not here: torch finds {found}. Use auto or cpu.")
    return device


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
