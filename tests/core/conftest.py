"""Random pairs of heads, as the package sees them and as the reference does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from tutelage.core import LazyLogits


@dataclass
class Pair:
    """Student and teacher of the same rows and ids, in both notations."""

    student: LazyLogits
    teacher: LazyLogits

    @property
    def reference(self) -> tuple[reference.Head, reference.Head]:
        """The same numbers, detached, for the reference."""
        return _head(self.student), _head(self.teacher)


def _head(lazy: LazyLogits) -> reference.Head:
    bias = None if lazy.bias is None else lazy.bias.detach()
    return reference.Head(
        lazy.hidden.detach(), lazy.weight.detach(), bias, lazy.scale, lazy.softcap
    )


def _make(
    rows: int = 7,
    vocab_size: int = 11,
    width: int = 5,
    dtype: torch.dtype = torch.float64,
    has_bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    spread: float = 1.0,
    seed: int = 0,
) -> Pair:
    generator = torch.Generator().manual_seed(seed)

    def new(*shape: int) -> Tensor:
        return (spread * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    def one(width: int) -> LazyLogits:
        bias = new(vocab_size) if has_bias else None
        return LazyLogits(new(rows, width), new(vocab_size, width), bias, scale, softcap)

    student, teacher = one(width), one(width + 2)
    for leaf in (student.hidden, student.weight, student.bias):
        if leaf is not None:
            leaf.requires_grad_(True)
    return Pair(student, teacher)


@pytest.fixture(scope="session")
def make_pair() -> Callable[..., Pair]:
    return _make


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run under Triton's interpreter, on a CPU."""
    from tutelage.core import kernels

    monkeypatch.setattr(kernels, "is_supported", lambda device: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # see tests/conftest.py


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched from now on."""
    from tutelage.core.kernels import passes

    found: list[str] = []
    for name in ("statistics_kernel", "mixture_kernel", "gradient_kernel"):
        module = passes.more_rows if name == "mixture_kernel" else passes.kernels
        kernel = getattr(module, name)

        class Counted:
            def __init__(self, kernel: Any, name: str) -> None:
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                found.append(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(module, name, Counted(kernel, name))
    return found
