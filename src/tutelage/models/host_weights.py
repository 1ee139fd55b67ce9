"""Weights of a frozen model that stay in main memory while a device computes with a copy."""

from __future__ import annotations

from torch import Tensor, nn


class HostWeights:
    """What a model has in main memory, to be taken up again when it leaves a device.

    ``model.to("cpu")`` copies every weight from the device to new memory. A frozen model has the
    same numbers there already, perhaps in a mapped file.
    """

    def __init__(self, model: nn.Module) -> None:
        """Hold the weights and buffers of a model that is in main memory, without a copy."""
        modules = list(model.modules())
        self._weights: list[tuple[nn.Module, str, nn.Parameter, Tensor]] = [
            (module, name, weight, weight.data)
            for module in modules
            for name, weight in module.named_parameters(recurse=False)
        ]
        self._buffers: list[tuple[nn.Module, str, Tensor]] = [
            (module, name, value)
            for module in modules
            for name, value in module.named_buffers(recurse=False)
        ]

    def restore(self) -> None:
        """Give them back to the model; its copies on a device are freed."""
        for module, name, weight, value in self._weights:
            weight.data = value
            module._parameters[name] = weight  # a move may have put another in its place
        for module, name, value in self._buffers:
            module._buffers[name] = value


def has_plain_weights(model: nn.Module) -> bool:
    """Whether each weight is one tensor; a quantized one has scales beside it."""
    return all(type(weight) is nn.Parameter for weight in model.parameters())
