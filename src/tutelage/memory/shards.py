"""What a process holds of models that are shared out over processes, by shapes alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from tutelage.models.forward import backbone
from tutelage.models.sharding import gathered_layers

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_WIDE = 4
"""Bytes of a number that the optimizer updates, and of one that is summed over processes."""


def shard_numel(tensor: Tensor, group: int) -> int:
    """Numbers of a tensor that each of `group` processes has room for.

    FSDP2 cuts along the first dimension into equal parts, the last of which are filled up.
    """
    if not tensor.ndim:
        return 1
    rows = tensor.shape[0]
    return -(-rows // group) * (tensor.numel() // max(rows, 1))


@dataclass(frozen=True)
class Unit:
    """Weights that FSDP2 gathers and releases together."""

    gathered_bytes: int
    """Of all of them, in the dtype that they are used in, filled up for equal shards."""
    summed_bytes: int
    """Of the gradients of its trained weights, as they are summed over processes."""
    trained_bytes: int
    """Of the same gradients before, in the weights' own dtype."""

    @staticmethod
    def of(weights: Iterable[Tensor], group: int) -> Unit:
        """A unit of these weights."""
        gathered = summed = trained = 0
        for weight in weights:
            padded = group * shard_numel(weight, group)
            gathered += padded * weight.itemsize
            if weight.requires_grad:
                summed += padded * max(_WIDE, weight.itemsize)
                trained += weight.nbytes
        return Unit(gathered, summed, trained)


@dataclass(frozen=True)
class Shards:
    """A model whose weights lie in shards, as `models/sharding.py` cuts it."""

    group: int
    """Processes that hold one copy of the weights together."""
    weights: tuple[Tensor, ...]
    """Whole, each once; they may be without numbers."""
    layer: Unit
    """The largest of the layers that are gathered one by one; 0 bytes where none is."""
    root: Unit
    """What is outside such layers. It stays gathered from its first use to the end of the backward
    pass."""
    outside: frozenset[int]
    """Identities of the weights that are."""

    @staticmethod
    def of(model: nn.Module, layers: PreTrainedModel, group: int) -> Shards:
        """The shards of a model.

        Args:
            model: all that is cut.
            layers: the model that names the classes of layers.
            group: processes that hold one copy of the weights together.
        """
        units = [list(layer.parameters()) for layer in gathered_layers(layers, model)]
        inside = {id(weight) for unit in units for weight in unit}
        weights = list(model.parameters())
        sizes = [Unit.of(unit, group) for unit in units]
        largest = max(sizes, key=lambda u: u.gathered_bytes + u.summed_bytes, default=Unit(0, 0, 0))
        outside = [w for w in weights if id(w) not in inside]
        root = Unit.of(outside, group)
        return Shards(group, tuple(weights), largest, root, frozenset(map(id, outside)))

    def is_root(self, weight: Tensor) -> bool:
        """Whether a weight is gathered with what is outside the layers."""
        return id(weight) in self.outside

    @property
    def trained_numel(self) -> int:
        """Trained numbers that this process updates; its moments are as many."""
        return sum(shard_numel(w, self.group) for w in self.weights if w.requires_grad)

    @property
    def trained_bytes(self) -> int:
        """Their bytes; shards of trained weights have float32, and are the master weights."""
        return sum(
            shard_numel(w, self.group) * max(_WIDE, w.itemsize)
            for w in self.weights
            if w.requires_grad
        )

    @property
    def frozen_bytes(self) -> int:
        """Of the shards of weights that are not trained."""
        frozen = (w for w in self.weights if not w.requires_grad)
        return sum(shard_numel(w, self.group) * w.itemsize for w in frozen)

    @property
    def stored_bytes(self) -> int:
        """Of all shards."""
        return self.trained_bytes + self.frozen_bytes

    @property
    def whole_bytes(self) -> int:
        """Of all weights while they are gathered for sampling."""
        return sum(self.group * shard_numel(w, self.group) * w.itemsize for w in self.weights)

    @property
    def gathering_bytes(self) -> int:
        """What gathering the whole model takes beside it: this process's part of one weight."""
        return max(2 * shard_numel(w, self.group) * w.itemsize for w in self.weights)

    @property
    def first_bytes(self) -> int:
        """Weights that are gathered when the first layer's arrive: those outside layers and those
        of a layer, each as they arrived and as they are used."""
        return 2 * (self.root.gathered_bytes + self.layer.gathered_bytes)

    @property
    def forward_bytes(self) -> int:
        """The same at any later layer: those of the layer before are released when its own are
        there."""
        return self.root.gathered_bytes + 3 * self.layer.gathered_bytes

    @property
    def backward_bytes(self) -> int:
        """The same during a backward pass: the next layer's arrive while one is used."""
        return self.root.gathered_bytes + 2 * self.layer.gathered_bytes

    @property
    def summing_bytes(self) -> int:
        """Gradients during a backward pass: those of a layer, and the float32 copy of the layer
        before, which is summed over processes meanwhile."""
        return self.layer.trained_bytes + self.layer.summed_bytes

    @property
    def last_sum_bytes(self) -> int:
        """The same at its end, of what is outside the layers, and this process's part of it."""
        part = self.root.summed_bytes // self.group
        return self.root.trained_bytes + self.root.summed_bytes + part


@dataclass(frozen=True)
class TeacherParts:
    """What a process holds of a teacher that several processes hold together."""

    stored_bytes: int
    """Of its parts, at rest."""
    gathered_bytes: int
    """Of the weights that are gathered during a forward pass."""
    head_bytes: int
    """Of the whole head, which is gathered for the objective."""

    @staticmethod
    def of(model: PreTrainedModel, sharding: str, group: int) -> TeacherParts:
        """The parts of a model, as `models/teacher_shards.py` cuts it.

        Args:
            model: whole; it may be without numbers.
            sharding: fsdp2 or tp.
            group: processes that hold it together.
        """
        head = model.get_output_embeddings().weight
        base = Shards.of(backbone(model), model, group)
        names = {id(weight): name for name, weight in model.named_parameters()}
        plan = _plan_of(model) if sharding == "tp" else {}
        stored = 0
        for weight in model.parameters():
            is_cut = sharding == "fsdp2" or weight is head or _is_cut(names[id(weight)], plan)
            stored += (shard_numel(weight, group) if is_cut else weight.numel()) * weight.itemsize
        gathered = max(base.first_bytes, base.forward_bytes) if sharding == "fsdp2" else 0
        return TeacherParts(stored, gathered, head.nbytes)


def _plan_of(model: PreTrainedModel) -> dict[str, str]:
    """How transformers cuts each layer, by its name; the embedding is cut by rows."""
    embedding = model.get_input_embeddings()
    found = {name: "rowwise" for name, module in model.named_modules() if module is embedding}
    return {**(model.tp_plan or {}), **found}


def _is_cut(name: str, plan: dict[str, str]) -> bool:
    module, _, leaf = name.rpartition(".")
    style = plan.get(re.sub(r"\.\d+(?=\.)", ".*", module), plan.get(module, ""))
    return "colwise" in style or ("rowwise" in style and leaf != "bias")
