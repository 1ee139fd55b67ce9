"""What updates the student: optimizers of torch and bitsandbytes, float32 master weights, and
moments that lie on disk."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from tutelage.config.models import OptimizerKind
from tutelage.errors import ConfigError, MissingExtraError, RunError
from tutelage.models.offload import MappedFile, whole_pages
from tutelage.models.sharding import is_shard, local

_PIECE = 1 << 22
"""Weights whose moments on disk are in memory at the same time; a whole number of pages."""


class MasterWeights:
    """The tensors an optimizer updates for a model of any precision, on any device.

    A weight of at least float32 is its own master. One of less gets a float32 copy: gradients of
    all micro-batches are summed there, and updates far below the weight's own precision add up
    there instead of being rounded away. With `device` the masters, and so the optimizer's state,
    live elsewhere, such as in main memory.

    The master of a weight that lies in parts is this process's part, in the same memory; it may be
    empty.
    """

    def __init__(
        self, weights: Iterable[nn.Parameter], device: torch.device | str | None = None
    ) -> None:
        self.weights = list(weights)
        self.masters = [_master(weight, device) for weight in self.weights]
        self.averages: list[Tensor] = []
        """Exponential moving averages of the masters, in their dtype; empty where none are kept."""
        self._decay = 0.0

    def keep_averages(self, decay: float, device: torch.device | str | None = None) -> None:
        """Begin averages with what the masters are now; every update then adds its result.

        Args:
            decay: d of ``average = d·average + (1 − d)·master``, in [0, 1).
            device: of the averages; None for the masters'.
        """
        self._decay = decay
        self.averages = [m.detach().to(device or m.device, copy=True) for m in self.masters]

    @property
    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(weight, master) where they are two numbers each."""
        both = zip(self.weights, self.masters, strict=True)
        return [(weight, master) for weight, master in both if not _is_same(weight, master)]

    def accumulate_grads(self) -> None:
        """Add the weights' gradients to the masters', and free them."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight.grad is not None and is_shard(weight):
                if local(weight).data_ptr() != master.data_ptr():
                    raise RunError(
                        f"torch {torch.__version__} moved a weight in shards, {tuple(weight.shape)}"
                        ", away from the memory that the optimizer updates: the updates would "
                        'be lost. Use another torch, or student.sharding = "none".'
                    )
                master.grad = local(weight.grad)  # FSDP2 adds to it in place
        for weight, master in self.pairs:
            if weight.grad is None:
                continue
            # Sums are float32's own: no copy of the gradient is made to be added.
            grad = weight.grad.to(master.device)
            master.grad = grad.to(master) if master.grad is None else master.grad.add_(grad)
            weight.grad = None

    def zero_grad(self) -> None:
        """Drop the gradients of weights and masters."""
        for tensor in (*self.weights, *self.masters):
            tensor.grad = None

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Round the masters to the weights."""
        for weight, master in self.pairs:
            weight.copy_(master)

    @torch.no_grad()
    def average(self) -> None:
        """Add the masters to their averages, where those are kept."""
        for average, master in zip(
            self.averages, self.masters if self.averages else (), strict=True
        ):
            average.lerp_(master.detach().to(average.device), 1 - self._decay)

    def register_hook(self, optimizer: torch.optim.Optimizer) -> None:
        """Copy to the model, and average, after every step of an optimizer of the masters."""
        optimizer.register_step_post_hook(lambda *_: self._updated())

    def _updated(self) -> None:
        self.copy_to_model()
        self.average()


def _is_same(weight: nn.Parameter, master: nn.Parameter) -> bool:
    return weight is master or is_shard(weight)


def _master(weight: nn.Parameter, device: torch.device | str | None) -> nn.Parameter:
    if is_shard(weight):
        return nn.Parameter(local(weight.detach()))
    dtype = torch.promote_types(weight.dtype, torch.float32)
    copy = weight.detach().to(device=device, dtype=dtype)
    is_same = copy.data_ptr() == weight.data_ptr() and copy.device == weight.device
    return weight if is_same else nn.Parameter(copy)


def undecayed_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights that weight decay usually spares: of norms, biases, embeddings and tied heads.

    Also every vector and number (their directions have a scale that means something), and what an
    architecture marks itself. A head of its own is a linear layer like others.
    """
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        is_spared = isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()
        for name, weight in module.named_parameters(recurse=False):
            is_marked = hasattr(weight, "_no_weight_decay")
            if is_spared or is_marked or weight.ndim < 2 or "bias" in name:
                found[id(weight)] = weight
    return list(found.values())


class DiskAdamW(torch.optim.AdamW):
    """AdamW whose moments lie in a file without a name: the same numbers, bit for bit.

    Weights are updated piece by piece, and what a piece's moments took of memory is given back at
    once. The kernel may keep the file in its cache, which it empties when others need the room.
    """

    def __init__(self, weights: Iterable[Any], folder: Path | None = None, **options: Any) -> None:
        """Reserve the room for all moments.

        Args:
            weights: In main memory, or groups of them as `torch.optim.AdamW` takes them.
            folder: A folder of the file system to use; None for the system's temporary one.
            options: Those of `torch.optim.AdamW`.

        Raises:
            ConfigError: a weight is not in main memory.
            RunError: the disk has no room for the file.
        """
        given = list(weights)
        groups = (w["params"] if isinstance(w, dict) else [w] for w in given)
        chosen = [weight for group in groups for weight in group]
        device = next((w.device.type for w in chosen if w.device.type != "cpu"), None)
        if device:
            raise ConfigError(
                f"optimizer.kind 'adamw_on_disk' updates weights in main memory, got some on "
                f"{device}. Set optimizer.offload = true."
            )
        super().__init__(given, fused=True, **options)
        sizes = [2 * whole_pages(weight.nbytes) for weight in chosen]
        self._file = _room(sum(sizes), folder)
        self._pages: dict[Tensor, tuple[int, int]] = {}
        """First byte and number of bytes of a weight's two moments."""
        start = 0
        for weight, size in zip(chosen, sizes, strict=True):
            self._pages[weight] = (start, size)
            start += size

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        self.release()  # with a page, the kernel maps some of its neighbours

    def release(self) -> None:
        """Give back the memory of moments that somebody has looked at, such as a checkpoint."""
        for pages in self._pages.values():
            self._file.release(*pages)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Any) -> None:
        """Copy a state, of this class or of `torch.optim.AdamW`, to the file."""
        super().load_state_dict(state_dict)
        for weight, state in self.state.items():
            for name, mapped in self._moments(weight).items():
                if state[name].data_ptr() != mapped.data_ptr():
                    state[name] = mapped.copy_(state[name])
            self._file.release(*self._pages[weight])
        self.release()

    def _moments(self, weight: Tensor) -> dict[str, Tensor]:
        start, size = self._pages[weight]
        places = {"exp_avg": start, "exp_avg_sq": start + size // 2}
        return {
            name: self._file.tensor(place, weight.numel(), weight.dtype).view_as(weight)
            for name, place in places.items()
        }

    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        """A piece of the weight at a time, and as many pages of its moments."""
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state |= self._moments(weight)
        names = ("exp_avg", "exp_avg_sq")
        grads: Any = weight.grad
        columns = [weight.view(-1), grads.reshape(-1), *(state[n].view(-1) for n in names)]
        start, size = self._pages[weight]
        for low in range(0, weight.numel(), _PIECE):
            piece, grad, mean, square = (x[low : low + _PIECE] for x in columns)
            step = state["step"].clone()  # counts up with every call
            adamw(
                [piece],
                [grad],
                [mean],
                [square],
                [],
                [step],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            num_bytes = whole_pages(mean.nbytes)
            for first in (start, start + size // 2):
                self._file.release(first + low * weight.itemsize, num_bytes)
        state["step"] += 1


def _room(num_bytes: int, folder: Path | None) -> MappedFile:
    try:
        return MappedFile(num_bytes, folder)
    except OSError as error:
        raise RunError(
            f"{num_bytes:,} bytes of AdamW's moments do not fit on the disk of "
            f"{folder or tempfile.gettempdir()}: {error.strerror}. Free some space, or use "
            'optimizer.kind = "adamw".'
        ) from None


def make_optimizer(
    kind: OptimizerKind,
    masters: Iterable[nn.Parameter],
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    folder: Path | None = None,
    undecayed: Iterable[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """AdamW with 8 or 2 bytes of state a weight, or Adafactor with next to none.

    Args:
        kind: which.
        masters: tensors to update.
        learning_rate: of all of them.
        betas: of the moments; not used by Adafactor.
        weight_decay: share of a weight, times the learning rate, taken off it in every update.
        folder: where moments on disk lie; None for the system's temporary folder.
        undecayed: masters that are not decayed.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
        ConfigError: a paged optimizer without CUDA, or moments on disk of weights that are not in
            main memory.
        RunError: the disk of `folder` has no room for the moments.
    """
    weights = _groups(list(masters), list(undecayed)) if weight_decay else list(masters)
    options: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
    match kind:
        case "adamw":
            # fused: no temporaries as large as the weights, and the fastest on CPU and CUDA
            return torch.optim.AdamW(weights, betas=betas, fused=True, **options)
        case "adamw_on_disk":
            return DiskAdamW(weights, folder, betas=betas, **options)
        case "adafactor":
            return torch.optim.Adafactor(weights, **options)
        case "adamw_8bit" | "paged_adamw_8bit":
            return _eight_bit(kind, weights, options | {"betas": betas})


def _groups(masters: list[nn.Parameter], undecayed: list[nn.Parameter]) -> list[Any]:
    spared = {id(master) for master in undecayed}
    groups = (
        {"params": [master for master in masters if id(master) not in spared]},
        {"params": [master for master in masters if id(master) in spared], "weight_decay": 0.0},
    )
    return [group for group in groups if group["params"]]


def _eight_bit(
    kind: OptimizerKind, weights: list[Any], options: dict[str, Any]
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
