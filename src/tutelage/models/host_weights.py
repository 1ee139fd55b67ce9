"""A frozen model on a device, whose weights stay in main memory meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def copied_to(model: nn.Module, device: torch.device | str) -> Iterator[None]:
    """The model on a device inside; afterwards it has the weights in main memory again.

    ``model.to("cpu")`` would copy from the device what is in main memory already. What the model
    itself put in place of a buffer inside, such as frequencies for longer sequences, is moved.

    Args:
        model: frozen, in main memory, with `has_plain_weights`.
        device: where it computes.
    """
    modules = list(model.modules())
    weights: list[tuple[nn.Module, str, nn.Parameter, Tensor]] = [
        (module, name, weight, weight.data)
        for module in modules
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False)
    ]
    buffers = [
        (module, name, value)
        for module in modules
        for name, value in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    copies: list[tuple[nn.Module, str, Tensor, Tensor | None]] = []
    try:
        model.to(device)
        copies = [(module, name, value, module._buffers[name]) for module, name, value in buffers]
        yield
    finally:
        for module, name, weight, value in weights:
            weight.data = value
            module._parameters[name] = weight  # a move may have put another in its place
        for module, name, value, copy in copies:
            if module._buffers.get(name) is copy:
                module._buffers[name] = value
        model.to("cpu")  # the rest


def has_plain_weights(model: nn.Module) -> bool:
    """Whether each weight is one tensor; a quantized one has scales beside it."""
    return all(type(weight) is nn.Parameter for weight in model.parameters())


def read_into_memory(model: nn.Module) -> None:
    """Copy weights that a mapped file may hold, which others could change, to memory."""
    for weight in model.parameters():
        weight.data = weight.data.clone()
