"""Bytes that an objective moves for each logit, by kernels and by operators of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tutelage.core import LazyLogits, composite_objective, kernels, token_stats
from tutelage.core.terms import (
    JSD,
    ForwardKL,
    ReverseKL,
    SampledReverseKL,
    SkewReverseKL,
    Term,
    TopKForwardKL,
    TopKReverseKL,
)

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

from tutelage.core.kernels import entropy_rows, more_rows, rows  # noqa: E402

N, V, D = 8, 1024, 3
"""Few rows of many ids, so that nothing else has as many elements as logits."""
TOKENS = torch.arange(N) * 7
READ = {
    "statistics_kernel": ("student", "teacher"),
    "mixture_kernel": ("student", "teacher"),
    "gradient_kernel": ("student", "teacher"),
    "moments_kernel": ("student", "teacher") * 2,
    "signal_kernel": ("student", "teacher") * 3,
    "entropy_kernel": ("student",),
    "segments_kernel": ("logits",),
}
"""Logits that a kernel reads, once for each time that it does."""
SPARSE = ("gather", "scatter_", "scatter_add_", "topk")
"""Operators that touch a few ids of each row."""


def is_large(x: Any) -> bool:
    """Whether it is logits, or whole rows of them."""
    return isinstance(x, Tensor) and x.numel() >= V and x.untyped_storage().nbytes() >= 2 * N * V


class Traffic(TorchDispatchMode):
    """Bytes read and written of tensors as large as all logits, for each logit."""

    def __init__(self, itemsize: int) -> None:
        super().__init__()
        self.itemsize = itemsize
        """Bytes of an operand of a product; here, without tensor cores, it is widened first."""
        self.num_bytes = 0.0
        self.is_in_kernel = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        returned = [value.alias_info for value in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        if self.is_in_kernel or is_view or name in SPARSE or name.startswith("empty"):
            return out
        into = [x for x in (out if isinstance(out, tuple) else (out,)) if is_large(x)]
        given = [x for x in args[name == "copy_" :] if is_large(x)]
        if name == "mm":
            self.num_bytes += 4 * len(into) + self.itemsize * len(given)
        elif not (name == "_to_copy" and self.itemsize == 2):  # which is the widening
            self.num_bytes += sum(x.nbytes for x in (*into, *given)) / (N * V)
        return out

    def launch(self, kernel: Any, grid: tuple[int, ...], given: dict[str, Any]) -> None:
        """Kernels that go over part of the rows count for that part."""
        name = kernel.fn.__name__
        share = grid[0] / given.get("num_blocks", 1) / N
        read = READ[name] if given.get("TEACHER", True) else ("student",)
        self.num_bytes += share * sum(given[key].itemsize for key in read)
        if name == "gradient_kernel":
            self.num_bytes += share * given["out"].itemsize


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Traffic]:
    monkeypatch.setattr(kernels, "is_supported", lambda device: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    current: list[Traffic] = []

    class Counted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def run(*args: Any, **options: Any) -> None:
                given = dict(zip(self.kernel.arg_names, args, strict=False)) | options
                current[-1].launch(self.kernel, grid, given)
                current[-1].is_in_kernel = True
                self.kernel[grid](*args, **options)
                current[-1].is_in_kernel = False

            return run

    for module in (rows, more_rows, entropy_rows):
        for name in READ:
            if name in vars(module):
                monkeypatch.setattr(module, name, Counted(vars(module)[name]))

    def start(itemsize: int) -> Traffic:
        current.append(Traffic(itemsize))
        return current[-1]

    return start


def pair(dtype: torch.dtype) -> tuple[LazyLogits, LazyLogits]:
    torch.manual_seed(0)
    hidden, weight, other, teacher = (torch.randn(n, D).to(dtype) for n in (N, V, N, V))
    student = LazyLogits(hidden.requires_grad_(), weight.requires_grad_())
    return student, LazyLogits(other, teacher)


SAMPLED = SampledReverseKL(TOKENS, torch.zeros(N, dtype=torch.float64))
OBJECTIVES: dict[str, tuple[Sequence[Term], int, int]] = {
    # Logits are written and read for statistics (16) and read for the gradient (8), which is
    # written and read by two products (3 times its width).
    "reverse KL": ([ReverseKL()], 30, 36),
    "both": ([ReverseKL(), ForwardKL()], 30, 36),
    # ... and once more for the mixture
    "JSD": ([JSD()], 38, 44),
    "skew": ([SkewReverseKL(0.1)], 38, 44),
    # ... for the segments of the likeliest ids, and for the statistics of the rest
    "top-k forward": ([TopKForwardKL(2)], 30 + 4 + 8, 36 + 4 + 8),
    "top-k reverse": ([TopKReverseKL(2)], 30 + 4 + 8, 36 + 4 + 8),
    # ... the gradient in float32 first, where something is added to it
    "sampled": ([SAMPLED], 30 + 8, 36),
}
"""Terms, and bytes for each logit with bfloat16 and float32 operands."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_logits_pass_through_memory_so_often(
    name: str, dtype: torch.dtype, measured: Callable[[int], Traffic]
) -> None:
    terms, *expected = OBJECTIVES[name]
    student, teacher = pair(dtype)
    with measured(dtype.itemsize) as traffic:
        found = composite_objective(student, teacher, [(term, 1.0) for term in terms])
        found.total.backward()
    assert traffic.num_bytes == expected[dtype == torch.float32]


def test_statistics_write_logits_once_and_read_them_once(
    measured: Callable[[int], Traffic],
) -> None:
    student, teacher = pair(torch.bfloat16)
    for other, extras, expected in (
        (teacher, (), 16),
        (None, (), 8),
        (teacher, ("gradient_norm",), 16 + 16),
        (teacher, ("entropy_direction",), 16 + 4),
    ):
        with measured(2) as traffic:
            token_stats(student, other, TOKENS, extras=extras)
        assert traffic.num_bytes == expected


def test_a_pass_more_would_be_seen(measured: Callable[[int], Traffic]) -> None:
    """Negative control."""
    student, teacher = pair(torch.float32)
    with measured(4) as traffic, torch.no_grad():
        logits = student.hidden @ student.weight.t()
        logits.add_(1.0)
    assert traffic.num_bytes == 4 + 8
    assert len(teacher) == N
