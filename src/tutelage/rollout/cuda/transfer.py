"""Small transfers between host and device that neither has to wait for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def send(values: Tensor | Sequence[Any], like: Tensor) -> Tensor:
    """Values as a tensor of the dtype of `like`, on its device, without waiting for the device."""
    host = torch.as_tensor(values, dtype=like.dtype)
    if not like.is_cuda:
        return host
    return host.pin_memory().to(like.device, non_blocking=True)


class Fetched:
    """A tensor on its way to the host."""

    def __init__(self, source: Tensor) -> None:
        self._host = source
        self._event: Any = None
        if source.is_cuda:
            self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._host.copy_(source, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def tolist(self) -> Any:
        """The values, as soon as they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
