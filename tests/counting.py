"""What a GPU would be kept waiting with or read again, counted on a CPU."""

from __future__ import annotations

from collections import Counter
from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_READS = ("tolist", "numpy", "cpu")
"""Methods of tensors that wait for the device and go by no operator."""
_WAITS = {
    "_local_scalar_dense",  # item(), float(x), bool(x), a branch on a number
    "nonzero",
    "masked_select",
    "bincount",
    "equal",
    "unique_dim",
    "unique_consecutive",
    "_unique",
    "_unique2",
    "repeat_interleave",
}
"""Operators that need a number from the device before they can go on."""
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""The same where an index is a mask."""


class _Functions(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        is_masked = name in _INDEXED and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if is_masked or name in _WAITS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class Waits:
    """Counts inside what would make the host wait for a device, backward passes included."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self._modes = (_Functions(self.found), _Operators(self.found))

    def __enter__(self) -> Waits:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]


class Launches(TorchDispatchMode):
    """Operators inside that compute something: each is at least one kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        returned = (value.alias_info for value in func._schema.returns)
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        if not is_view and not name.startswith("empty"):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))
