"""Weights in shards over the processes of a run (torch's FSDP2), and the whole model again."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tutelage.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

GROUP_TIMEOUT = timedelta(hours=12)
"""Rollouts, evaluations or reading of one process may take hours longer than those of another. A
process that is lost is noticed otherwise."""
SMALL_BYTES = 25 << 20
"""Layers that together take no more are gathered at once, in one message instead of one for each.
Messages of less cost the time to send one, not their bytes: torch's DistributedDataParallel sums
gradients in buckets of this size."""
_SHARD = "shard"
"""Name of the mesh's dimension along which weights are cut; it is the last."""


def num_processes() -> int:
    """Processes that share the run."""
    is_alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return 1 if is_alone else torch.distributed.get_world_size()


def is_of_connection(error: BaseException) -> bool:
    """Whether an error of torch is about the connection to another process."""
    if torch.distributed.is_available() and isinstance(error, torch.distributed.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("gloo/" in text or "NCCL" in text)


def sharding_mesh(
    device: torch.device, group_size: int = 0, key: str = "student.sharding_group_size"
) -> DeviceMesh:
    """All processes, in groups of neighbours that hold one copy of the weights together.

    Args:
        device: where the shards lie.
        group_size: processes of a group; 0 puts all processes into one.
        key: of the configuration that says so.

    Returns:
        A mesh of one dimension, or where there are several groups of two: (replicate, shard).

    Raises:
        ConfigError: the processes cannot be cut into groups of that size.
    """
    import torch.distributed.tensor.debug  # a second, which `forget_shards` has not
    from torch.distributed.device_mesh import DeviceMesh

    count = torch.distributed.get_world_size()
    size = group_size or count
    if count % size:
        raise ConfigError(
            f"{key} must divide the number of processes, {count}, got {group_size}. "
            "Use 0 for one group of all processes."
        )
    # A mesh that makes its groups itself gives them torch's short timeout.
    if size == count:
        world: Any = torch.distributed.group.WORLD
        return DeviceMesh.from_group(world, device.type, mesh_dim_names=(_SHARD,))
    ranks = torch.arange(count).view(-1, size)
    groups = [_group_among(ranks.t()), _group_among(ranks)]
    names = ("replicate", _SHARD)
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=names)


def forget_shards() -> None:
    """Empty torch's cache about shards, which holds the group of their processes."""
    debug = sys.modules.get("torch.distributed.tensor.debug")  # no shards were made without it
    clear = None if debug is None else vars(debug).get("_clear_sharding_prop_cache")
    if clear is not None:  # it has no public name
        clear()


def _group_among(rows: Tensor) -> Any:
    """The group of this process; those of all processes are the rows."""
    new: Any = torch.distributed.new_subgroups_by_enumeration
    return new(rows.tolist(), timeout=GROUP_TIMEOUT)[0]


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same modules without numbers (on the meta device): what `whole_weights` fills."""
    memo: dict[int, Any] = {}
    for weight in model.parameters():
        empty = nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
        memo[id(weight)] = empty
    return copy.deepcopy(model, memo)


def shard_model(
    root: nn.Module, model: PreTrainedModel, mesh: DeviceMesh, is_offloaded: bool = False
) -> None:
    """Share the weights of each layer, and those outside layers, out over the mesh, in place.

    Trained weights of less than float32 become float32 in their shards, and are rounded to their
    dtype wherever they are gathered. Gradients are summed over processes, not averaged, in at
    least float32.

    Args:
        root: the module whose forward pass uses all of the weights; holds `model`.
        model: its layers are gathered one by one, or at once where they are small.
        mesh: a mesh of `sharding_mesh`.
        is_offloaded: whether the shards lie in main memory.
    """
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    require_shardable_student(model)
    (dtype,) = {weight.dtype for weight in root.parameters() if weight.requires_grad}
    wide = torch.promote_types(dtype, torch.float32)
    policy = MixedPrecisionPolicy(
        param_dtype=None if wide == dtype else dtype, reduce_dtype=wide, cast_forward_inputs=False
    )
    offload = CPUOffloadPolicy() if is_offloaded else OffloadPolicy()
    marks = {name: dict(vars(weight)) for name, weight in root.named_parameters()}
    for unit in (*reversed(gathered_layers(model)), root):
        _widen(unit, wide)
        fully_shard(unit, mesh=mesh, mp_policy=policy, offload_policy=offload)
    for name, weight in root.named_parameters():
        vars(weight).update(marks[name])  # such as that a weight does not decay
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
            # A process whose rows leave a weight out takes part in its sum all the same.
            module.set_reduce_scatter_unused_params(True)
    root.register_forward_hook(_reshard_unless_learning)


def gathered_layers(model: PreTrainedModel, within: nn.Module | None = None) -> list[nn.Module]:
    """Layers whose weights are gathered one by one, outer ones first; none where all are small.

    Args:
        model: not in shards yet; names the classes of its layers.
        within: the part of it whose layers count; None for all.
    """
    part = model if within is None else within
    layers = [part.get_submodule(name) for name in layer_names(model, part)]
    weights = {id(weight): weight.nbytes for layer in layers for weight in layer.parameters()}
    return layers if sum(weights.values()) > SMALL_BYTES else []


def layer_names(model: PreTrainedModel, within: nn.Module) -> list[str]:
    """Names of a model's layers within a part of it, outer ones first."""
    kinds = set(model._no_split_modules or ())
    return [name for name, module in within.named_modules() if type(module).__name__ in kinds]


def require_shardable_student(model: PreTrainedModel) -> None:
    """Refuse a model whose weights cannot be cut by their rows, layer by layer.

    Raises:
        ConfigError: it trains weights of several dtypes, has a single number for a weight, or
            layers that share one.
    """
    hint = 'Use student.sharding = "none".'
    named = list(model.named_parameters(remove_duplicate=False))
    trained = {str(w.dtype).removeprefix("torch."): n for n, w in named if w.requires_grad}
    if len(trained) > 1:
        listed = " and ".join(f"{dtype} ({name})" for dtype, name in sorted(trained.items()))
        raise ConfigError(
            "student.sharding 'fsdp2' trains weights of one dtype, "
            f"{type(model).__name__} has {listed}. {hint}"
        )
    units, owner = layer_names(model, model), dict[int, str]()
    for name, weight in named:
        if not weight.dim():
            raise ConfigError(
                f"student.sharding 'fsdp2' cuts weights by their rows, {name} of "
                f"{type(model).__name__} is a single number. {hint}"
            )
        unit = max((u for u in units if name.startswith(f"{u}.")), key=len, default="")
        if owner.setdefault(id(weight), unit) != unit:
            raise ConfigError(
                f"student.sharding 'fsdp2' gathers layers one by one, {name} of "
                f"{type(model).__name__} belongs to several. {hint}"
            )


def _reshard_unless_learning(root: Any, _inputs: Any, _output: Any) -> None:
    """The root's weights stay gathered for the backward pass, which may never come."""
    if not torch.is_grad_enabled():
        root.reshard()


def _widen(unit: nn.Module, dtype: torch.dtype) -> None:
    for weight in unit.parameters():
        if weight.requires_grad and weight.dtype != dtype:
            weight.data = weight.data.to(dtype)


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is one process's part of a larger one."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The numbers that this process holds of a tensor, in the same memory."""
    shard: Any = tensor
    found: Tensor = shard.to_local() if is_shard(tensor) else tensor
    return found


def gathered(tensor: Tensor) -> Tensor:
    """All numbers of a tensor; every process has to ask for it at the same point.

    `DTensor.full_tensor` computes the same, and keeps the process group in caches that nothing
    clears.
    """
    return gathered_parts(local(tensor), tensor) if is_shard(tensor) else tensor


def gathered_parts(own: Tensor, like: Tensor) -> Tensor:
    """The whole of a tensor that is cut as a sharded weight is, such as its moments.

    Every process of the weight's group has to ask for it at the same point.

    Args:
        own: this process's rows, on any device.
        like: the weight.

    Returns:
        A tensor of the weight's shape, on the device of its processes.
    """
    shard: Any = like
    return _all_gathered(padded_rows(own, like), shard.device_mesh)[: shard.shape[0]]


def padded_rows(own: Tensor, like: Tensor) -> Tensor:
    """This process's rows of a tensor, cut as a sharded weight is, and zeros: as many in each.

    They lie on the device of the weight's processes.
    """
    shard: Any = like
    size, device = _num_rows_each(like), shard.device_mesh.device_type
    padded = torch.zeros(size, *own.shape[1:], dtype=own.dtype, device=device)
    padded[: len(own)] = own
    return padded


def _num_rows_each(like: Tensor) -> int:
    """Rows of every process but the last ones, as `torch.chunk` cuts."""
    shard: Any = like
    return -(-int(shard.shape[0]) // int(shard.device_mesh.size(-1)))


def _all_gathered(own: Tensor, mesh: DeviceMesh) -> Tensor:
    """The rows of all processes of a group, one process after the other; as many from each."""
    every = own.new_empty(mesh.size(-1) * len(own), *own.shape[1:])
    torch.distributed.all_gather_single(every, own, mesh.get_group(_SHARD))
    return every


def own_rows(like: Tensor) -> slice:
    """Which rows of the whole are this process's part of a sharded weight."""
    shard: Any = like
    size, num_rows = _num_rows_each(like), shard.shape[0]
    start = min(shard.device_mesh.get_local_rank(_SHARD) * size, num_rows)
    return slice(start, min(start + size, num_rows))


def norm_over_parts(part: Tensor, mesh: DeviceMesh) -> Tensor:
    """The Euclidean norm of what lies in parts, of the norm of this process's part."""
    square = part.detach().double().square().reshape(1).to(mesh.device_type)
    return _all_gathered(square, mesh).sum().sqrt().to(part)


@contextmanager
def whole_weights(model: PreTrainedModel, plain: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """A plain model with all weights, gathered once for the time of the block.

    Every process has to enter together. Inside no process waits for another, and each may leave at
    its own time.

    Args:
        model: one whose weights lie in shards.
        plain: its `plain_copy`; without numbers again afterwards.
    """
    found: dict[int, nn.Parameter] = {}
    empty = dict(plain.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, weight in model.named_parameters(remove_duplicate=False):
            if id(weight) not in found:
                own = local(weight.detach()).to(empty[name].dtype)
                whole = gathered_parts(own, weight) if is_shard(weight) else own
                found[id(weight)] = nn.Parameter(whole, weight.requires_grad)
            _set(plain, name, found[id(weight)])
    found.clear()
    try:
        yield plain
    finally:
        for name, weight in empty.items():
            _set(plain, name, weight)


def _set(model: nn.Module, name: str, weight: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, weight)
