"""Files of a student whose weights lie in shards: each process writes some of them.

Every process computes the same plan from names, shapes and dtypes. File i of a kind is gathered to
process i mod N and written by it, so that no process holds more than one file in main memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tutelage.files.atomic import new_folder, sync
from tutelage.files.checksums import checksum
from tutelage.models.sharding import is_shard, padded_rows
from tutelage.train.agreement import in_all, in_main

FILE_BYTES = 5 * 10**9
"""Most bytes of tensors in one file; a layer, or a tensor outside layers, may be larger."""


@dataclass(frozen=True)
class Part:
    """What this process holds of a tensor that is written to a file."""

    own: Tensor
    like: Tensor
    """The sharded weight that the tensor is cut as; `own` itself where each process has all."""
    dtype: torch.dtype
    """In the file."""

    @property
    def num_bytes(self) -> int:
        """Of the whole tensor."""
        return self.like.numel() * self.dtype.itemsize

    def rounded(self) -> Tensor:
        """This process's numbers in the dtype of the file."""
        return self.own.detach().to(self.dtype)

    def gathered_to(self, process: int) -> Tensor | None:
        """The whole tensor in the main memory of one process, None in others.

        Every process has to call it at the same point.
        """
        own = self.rounded()
        is_here = process == torch.distributed.get_rank()
        if not is_shard(self.like):
            return own.cpu() if is_here else None
        shard: Any = self.like
        mesh = shard.device_mesh
        group = mesh.get_group(mesh.ndim - 1)
        members = torch.distributed.get_process_group_ranks(group)
        if process not in members:
            return None  # another group holds the same numbers
        rows = padded_rows(own, self.like)
        found = [torch.empty_like(rows) for _ in members] if is_here else None
        torch.distributed.gather(rows, found, dst=process, group=group)
        return None if found is None else torch.cat(found)[: shard.shape[0]].cpu()


@dataclass(frozen=True)
class _Written:
    """One file, as its writer knows it."""

    place: str
    checksum: dict[str, Any]
    value: Any


class ShardedFolder:
    """A folder that all processes fill, and that stands as its target once it is whole."""

    def __init__(
        self,
        accelerator: Accelerator,
        target: Path,
        explained: Callable[[], AbstractContextManager[None]],
        stack: ExitStack,
        **how: bool,
    ) -> None:
        """Open it beside its target.

        Args:
            accelerator: the processes.
            target: the folder's path.
            explained: a context that turns errors of the disk into one line.
            stack: removes the folder unless it was closed.
            how: of `new_folder`.
        """
        self._accelerator, self._explained = accelerator, explained
        self._stack = stack.enter_context(ExitStack())

        def opened() -> str:
            return str(self._stack.enter_context(new_folder(target, **how)))

        self.path = Path(self.by_main(opened))
        self.checksums: dict[str, dict[str, Any]] = {}
        """Of the files of `write`, by path in the folder."""

    def by_main(self, work: Callable[[], Any]) -> Any:
        """Write something in the main process; what it returned, in every process.

        Raises:
            RunError: it could not be written.
        """
        return in_main(self._accelerator, lambda: self._attempt(work))

    def write(
        self,
        folder: str,
        files: Mapping[str, list[str]],
        parts: Mapping[str, Part],
        save: Callable[[dict[str, Tensor], Path], Any],
    ) -> dict[str, Any]:
        """Gather and write files, one of every process at the same time.

        Args:
            folder: where, in this folder.
            files: names of tensors by name of the file, the same in every process.
            parts: all of these tensors.
            save: writes whole tensors to a path.

        Returns:
            What `save` returned, by name of the file.

        Raises:
            RunError: a file could not be written.
        """
        names, found = list(files), {}
        count, index = self._accelerator.num_processes, self._accelerator.process_index
        for start in range(0, len(names), count):
            together = names[start : start + count]
            mine: dict[str, Tensor] = {}
            for process, name in enumerate(together):
                for key in files[name]:
                    tensor = parts[key].gathered_to(process)
                    if tensor is not None:
                        mine[key] = tensor
            place = Path(folder, together[index]) if index < len(together) else None
            for written in self._saved(place, mine, save):
                self.checksums[written.place] = written.checksum
                found[Path(written.place).name] = written.value
        return found

    def close(self) -> None:
        """Let it stand as its target.

        Raises:
            RunError: it cannot be flushed or renamed.
        """
        self.by_main(self._stack.close)

    def _saved(
        self, place: Path | None, tensors: dict[str, Tensor], save: Callable[..., Any]
    ) -> list[_Written]:
        def work() -> _Written | None:
            if place is None:
                return None
            path = self.path / place
            value = save(tensors, path)
            sync(path)
            return _Written(place.as_posix(), checksum(path), value)

        ended = in_all(self._accelerator, lambda: self._attempt(work))
        return [written for written in ended if written is not None]

    def _attempt(self, work: Callable[[], Any]) -> Any:
        with self._explained():
            return work()
