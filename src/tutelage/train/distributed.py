"""Sums, gradients and tables over the processes of a run."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from tutelage.core import TokenStats
from tutelage.data.batch import Batch
from tutelage.models.sharding import forget_shards
from tutelage.setup.shares import on_cpu

T = TypeVar("T")


@dataclass(frozen=True)
class StepRows:
    """Every row of a step in document order: by completion, then by position within it.

    The order depends neither on how completions were cut into micro-batches nor on the process
    that sampled them, so ties are broken in the same way everywhere.
    """

    stats: TokenStats
    completion: Tensor
    position: Tensor
    local: Tensor
    """Places, among all rows, of this process's rows in the order of its micro-batches."""
    tokens: Tensor
    """The sampled id of each row."""


class Ranks:
    """Sums and tables over all processes."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    @property
    def count(self) -> int:
        """Number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def index(self) -> int:
        """This process, from 0."""
        return int(self.accelerator.process_index)

    def sum(self, value: float) -> Any:
        """Sum over processes, in the type of `value`."""
        if self.count == 1:
            return value
        total = self.table(self._tensor([value], torch.float64))
        return type(value)(total.sum().item())

    def max(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over processes."""
        found: list[float] = self.table(self._tensor([values], torch.float64)).amax(0).tolist()
        return found

    def gathered(self, value: T) -> list[T]:
        """A value of every process, in their order."""
        return [value] if self.count == 1 else gather_object([on_cpu(value)])

    def add_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum the gradients of parameters over processes, in at least float32.

        A parameter that has none in some processes counts there as zero; one that has none in any
        keeps none.
        """
        if self.count == 1:
            return
        has_any = self.max([float(p.grad is not None) for p in parameters])
        present = [p for p, has in zip(parameters, has_any, strict=True) if has]
        for piece in _pieces(present):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in piece]
            flat = torch.cat([g.flatten().to(_sum_dtype(g)) for g in grads])
            total = self.accelerator.reduce(flat.to(self.accelerator.device), "sum")
            sizes = [p.numel() for p in piece]
            for p, grad, part in zip(piece, grads, total.split(sizes), strict=True):
                p.grad = grad.copy_(part.view_as(grad))

    def table(self, rows: Tensor) -> Tensor:
        """Rows of all processes, one process after the other; as many from each."""
        gathered: Tensor = self.accelerator.gather(rows.contiguous())
        return gathered

    def by_completion(self, values: Sequence[float], completions: Sequence[int]) -> list[float]:
        """One number for every completion of the step, from those of this process."""
        pairs = self.table(self._tensor([completions, values], torch.float64).t())
        found: list[float] = pairs[pairs[:, 0].argsort(), 1].tolist()
        return found

    def rows(
        self, batches: Sequence[Batch], stats: TokenStats, kept: Sequence[Tensor] | None = None
    ) -> StepRows:
        """Statistics of all rows of the step, or of each batch's kept ones, from this process's."""
        rows: Sequence[Any] = [slice(None) for _ in batches] if kept is None else kept
        completion = torch.cat([b.completion[k] for b, k in zip(batches, rows, strict=True)])
        position = torch.cat([b.position[k] for b, k in zip(batches, rows, strict=True)])
        tokens = torch.cat([b.tokens[k] for b, k in zip(batches, rows, strict=True)])
        names = torch.stack([tokens, completion, position])
        table = torch.cat([stats.stack(), names.double()])
        sizes = [table.shape[1]]
        if self.count > 1:
            sizes = self.table(self._tensor(sizes, torch.long)).tolist()
            padded = self.table(self.accelerator.pad_across_processes(table, dim=1)[None])
            table = torch.cat([part[:, :n] for part, n in zip(padded, sizes, strict=True)], 1)
        order = table[-1].argsort(stable=True)
        order = order[table[-2][order].argsort(stable=True)]
        first = sum(sizes[: self.index])
        here = order.argsort()[first : first + len(completion)]
        table = table[:, order]
        columns = TokenStats.unstack(table[:-3], tuple(stats.extras), stats.has_teacher)
        tokens, completion, position = table[-3:].long()
        return StepRows(columns, completion, position, here, tokens)

    def _tensor(self, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.accelerator.device)


def from_main(accelerator: Accelerator, number: int) -> int:
    """The main process's number, which is at least -1, in every process."""
    if accelerator.num_processes == 1:
        return number
    mine = number if accelerator.is_main_process else -1
    return int(accelerator.gather(torch.tensor([mine], device=accelerator.device)).max())


def date_of_main(accelerator: Accelerator, date: datetime) -> datetime:
    """The main process's date in every process, to the second."""
    digits = "%Y%m%d%H%M%S"
    return datetime.strptime(str(from_main(accelerator, int(date.strftime(digits)))), digits)


class Leaving:
    """Leaves the processes' group at the end of the block, however it ends.

    A group that something still holds when it is left keeps its threads, and one that wakes up
    while the interpreter ends aborts the process. Weights in parts hold it: in cycles, in a cache
    of DTensor, and in the frames of an error.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        if self._accelerator.num_processes > 1:
            for each in _chain(error):
                traceback.clear_frames(each.__traceback__)
            forget_shards()
            gc.collect()
        self._accelerator.end_training()


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and those that it was raised for."""
    found: list[BaseException] = []
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and one not in found:
            found.append(one)
            left += [one.__cause__, one.__context__]
    return found


_PIECE_BYTES = 64 << 20
"""Gradients that travel together: few messages, and little memory beside the gradients."""


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _pieces(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Neighbours of one dtype, up to so many bytes or one larger parameter alone."""
    piece: list[torch.nn.Parameter] = []
    size = 0
    for p in parameters:
        if piece and (size + p.nbytes > _PIECE_BYTES or p.dtype != piece[0].dtype):
            yield piece
            piece, size = [], 0
        piece.append(p)
        size += p.nbytes
    if piece:
        yield piece
