"""What updates the student: optimizers of torch and bitsandbytes, and float32 master weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from tutelage.errors import ConfigError, MissingExtraError

OptimizerKind = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor"]


class MasterWeights:
    """The tensors an optimizer updates for a model of any precision, on any device.

    A weight of at least float32 is its own master. One of less gets a float32 copy: gradients of
    all micro-batches are summed there, and updates far below the weight's own precision add up
    there instead of being rounded away. With `device` the masters, and so the optimizer's state,
    live elsewhere, such as in main memory.
    """

    def __init__(
        self, weights: Iterable[nn.Parameter], device: torch.device | str | None = None
    ) -> None:
        self.weights = list(weights)
        self.masters = [_master(weight, device) for weight in self.weights]

    @property
    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(weight, master) where they are two."""
        both = zip(self.weights, self.masters, strict=True)
        return [(weight, master) for weight, master in both if weight is not master]

    def collect(self) -> None:
        """Move what a backward pass added to the weights' gradients to the masters'."""
        for weight, master in self.pairs:
            if weight.grad is None:
                continue
            grad = weight.grad.to(master)
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            weight.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters to the weights."""
        for weight, master in self.pairs:
            weight.copy_(master)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Publish after every step of an optimizer of the masters."""
        optimizer.register_step_post_hook(lambda *_: self.publish())


def _master(weight: nn.Parameter, device: torch.device | str | None) -> nn.Parameter:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    copy = weight.detach().to(device=device, dtype=dtype)
    is_same = copy.data_ptr() == weight.data_ptr() and copy.device == weight.device
    return weight if is_same else nn.Parameter(copy)


def make_optimizer(
    kind: OptimizerKind,
    masters: Iterable[nn.Parameter],
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """AdamW with 8 or 2 bytes of state a weight, or Adafactor with next to none.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
        ConfigError: a paged optimizer without CUDA.
    """
    weights = list(masters)
    options: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
    match kind:
        case "adamw":
            # fused: no temporaries as large as the weights, and the fastest on CPU and CUDA
            return torch.optim.AdamW(weights, betas=betas, fused=True, **options)
        case "adafactor":
            return torch.optim.Adafactor(weights, **options)
        case "adamw_8bit" | "paged_adamw_8bit":
            return _eight_bit(kind, weights, options | {"betas": betas})


def _eight_bit(
    kind: OptimizerKind, weights: list[nn.Parameter], options: dict[str, Any]
) -> torch.optim.Optimizer:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "lowbit", f"optimizer.kind = {kind!r}")
    if kind == "paged_adamw_8bit" and not torch.cuda.is_available():
        raise ConfigError(
            "optimizer.kind 'paged_adamw_8bit' pages between CUDA and main memory, and there is "
            "no CUDA device. Use adamw_8bit."
        )
    from bitsandbytes import optim

    make = optim.AdamW8bit if kind == "adamw_8bit" else optim.PagedAdamW8bit
    optimizer: torch.optim.Optimizer = make(weights, **options)
    return optimizer
