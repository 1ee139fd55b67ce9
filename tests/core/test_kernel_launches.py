"""What an objective launches on a device, what it waits for, and how large its buffers are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tutelage.core import (
    distillation_objective,
    token_stats,
)

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # numpy's, at −inf − −inf
]

from tutelage.core.kernels import passes  # noqa: E402
from tutelage.core.kernels.buffers import Buffers  # noqa: E402

Make = Callable[..., Any]


class _Operators(TorchDispatchMode):
    """Operators that were called, by name, and the largest tensor that elementwise ones made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.large: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket)
        self.names[name] += 1
        if (
            isinstance(out, Tensor)
            and out.ndim == 2
            and out.numel() >= 8 * 64
            and "empty" not in name
        ):
            self.large[name] += 1
        return out


WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten._to_copy_to_host", "aten.is_nonzero")


def test_an_objective_is_two_kernels_and_four_products_a_chunk_and_waits_for_nothing(
    make_pair: Make, launches: list[str]
) -> None:
    # Few rows and ids, wide enough that no tensor of another kind has [chunk, V] elements.
    pair = make_pair(rows=8, vocab_size=64, width=3, dtype=torch.float32)
    with _Operators() as operators:
        objective = distillation_objective(pair.student, pair.teacher, torch.rand(8), torch.rand(8))
        objective.total.backward()
        token_stats(pair.student, pair.teacher, torch.zeros(8, dtype=torch.long))
    assert launches == ["statistics_kernel", "gradient_kernel", "statistics_kernel"]
    assert not [name for name in operators.names if name in WAITS]
    # the interpreter moves memory by `set_`
    views = ("aten.view", "aten.slice", "aten.t", "aten.select", "aten.alias", "aten.set_")
    passes_over_logits = {k: n for k, n in operators.large.items() if k not in views}
    assert passes_over_logits == {"aten.mm": 4}, passes_over_logits
    assert operators.names["aten.mm"] == 6
    assert objective.total.item() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has_teacher", [True, False])
@pytest.mark.parametrize("chunk_bytes", [None, 3000])
def test_buffers_are_as_large_as_planned(
    make_pair: Make, dtype: torch.dtype, has_teacher: bool, chunk_bytes: int | None
) -> None:
    pair = make_pair(rows=33, vocab_size=70, dtype=dtype)
    teacher = pair.teacher if has_teacher else None
    with LiveBytes((pair.student.hidden, pair.student.weight)) as live:
        work = passes.Passes(pair.student, teacher, chunk_bytes, has_teacher)
    is_narrow = has_teacher and dtype == torch.bfloat16
    planned = Buffers.of(33, 70, has_teacher, is_narrow, chunk_bytes)
    assert live.live == planned.num_bytes
    assert planned.is_one_chunk == (chunk_bytes is None) == (work.chunk_rows == 33)
