"""Memory in files without a name: gone with the process, however that ends."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor


class MappedFile:
    """Zeros in a file without a name, mapped into memory.

    The kernel keeps what is in use and writes the rest to the file whenever it needs the room;
    `release` takes pages out of this process at once.
    """

    def __init__(self, num_bytes: int, folder: Path | None = None) -> None:
        """Reserve the room.

        Args:
            num_bytes: Size, above 0.
            folder: A folder of the file system to use; None for the system's temporary one.

        Raises:
            OSError: the disk has no room for the file.
        """
        with tempfile.TemporaryFile(dir=folder) as file:
            # a sparse file on a full disk would end the process with a bus error
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            self._map = mmap.mmap(file.fileno(), num_bytes)

    def tensor(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """`count` numbers from byte `start` on `[count]`; they live as long as the tensor."""
        if not count:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start)

    def release(self, start: int, num_bytes: int) -> None:
        """Take pages out of this process's memory; `start` is the first byte of a page.

        Their numbers stay: they are read from the file, or the kernel's copy of it, when needed.
        """
        if num_bytes:
            self._map.madvise(mmap.MADV_DONTNEED, start, num_bytes)


def whole_pages(num_bytes: int) -> int:
    """Bytes of the pages that hold so many bytes."""
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
