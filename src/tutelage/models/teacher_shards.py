"""A frozen model whose weights the processes of a group hold together, and its forward passes."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tutelage.config.models import TeacherSharding
from tutelage.data.batch import Batch, Packed
from tutelage.errors import ModelError
from tutelage.models.forward import backbone, foreign
from tutelage.models.head import hidden_rows, output_embeddings
from tutelage.models.sharding import (
    gathered,
    gathered_layers,
    is_shard,
    layer_names,
    local,
    sharding_mesh,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

_HEADS = ("num_attention_heads", "num_key_value_heads")
"""What every process of tensor parallelism holds an equal part of."""
_INSTEAD = 'Use teacher.sharding = "fsdp2".'


class TeacherShards:
    """How the processes of a group hold a frozen model together.

    By `fsdp2`, a layer's weights are gathered for the time of its forward pass, those of small
    layers at once, and each process computes its own batches. By `tp`, each process computes its
    part of every layer, and all of them compute the batches of each. The head lies in shards by
    rows in both, and so does the embedding; each is gathered, or computed together, when it is
    used.

    Args:
        kind: fsdp2 or tp.
        device: where the shards lie.
        group_size: processes of a group, neighbours; 0 puts all processes into one.
        who: names the model in messages, such as "teacher 'folder'".
    """

    def __init__(
        self, kind: TeacherSharding, device: torch.device, group_size: int = 0, who: str = "teacher"
    ) -> None:
        self.kind = kind
        self.device = device
        self.who = who
        mesh = sharding_mesh(device, group_size, "teacher.sharding_group_size")
        _name_groups_only(mesh)
        self.mesh: DeviceMesh = mesh if mesh.ndim == 1 else mesh["shard"]

    @property
    def group(self) -> torch.distributed.ProcessGroup:
        """The processes that hold the model together."""
        return self.mesh.get_group()

    @property
    def count(self) -> int:
        """How many they are."""
        return int(self.mesh.size())

    def shard(self, model: PreTrainedModel) -> None:
        """Keep this process's part of each weight on the device, in place, layer by layer.

        Args:
            model: in evaluation mode, whole in main memory or mapped from files.

        Raises:
            ModelError: its architecture cannot be cut so.
        """
        require_shardable_teacher(model, self.kind, self.who, self.count)
        projection, embedding = output_embeddings(model), model.get_input_embeddings()
        is_tied = embedding is not None and projection.weight is embedding.weight
        if self.kind == "tp":
            self._cut_layers(model)
        else:
            self._wrap_layers(model)
        if is_tied:
            projection.weight = embedding.weight
        else:
            projection.weight = self._rows_of(projection.weight)
        _gather_when_called(projection)
        for module in model.modules():
            self._move(module)

    def _wrap_layers(self, model: PreTrainedModel) -> None:
        from torch.distributed.fsdp import fully_shard

        base = backbone(model)
        for unit in (*reversed(gathered_layers(model, base)), base):  # inner ones first
            fully_shard(unit, mesh=self.mesh, reshard_after_forward=True)

    def _cut_layers(self, model: PreTrainedModel) -> None:
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism

        plan, embedding = _plan(model), model.get_input_embeddings()
        if isinstance(embedding, nn.Embedding):
            plan[_name(model, embedding)] = "embedding_rowwise"
        with foreign(f"of the {self.who} cannot be cut for tensor parallelism", model):
            apply_tensor_parallelism(model, self.mesh, plan)

    def _rows_of(self, weight: Tensor) -> nn.Parameter:
        """This process's rows of a matrix; no other process has to take part."""
        from torch.distributed.tensor import Shard, distribute_tensor

        cut = distribute_tensor(weight.detach(), self.mesh, [Shard(0)], src_data_rank=None)
        return nn.Parameter(cut, requires_grad=False)

    def _move(self, module: nn.Module) -> None:
        """What is not cut is small: norms, biases and tables of positions."""
        for weight in module.parameters(recurse=False):
            if not is_shard(weight):
                weight.data = weight.data.to(self.device)
        for name, table in module.named_buffers(recurse=False):
            module._buffers[name] = table.to(self.device)

    @torch.no_grad()
    def hidden_rows(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Last hidden states of the rows of this process's batch, `[N, D]`, as of a whole model.

        Every process of the group has to call it as often; one that has no batch left gives one
        without sequences.

        Args:
            model: one that `shard` cut.
            batch: on the device.
        """
        if self.kind == "fsdp2":
            return hidden_rows(model, batch if batch.num_sequences else _one_token(batch))
        width = output_embeddings(model).weight.shape[1]
        own = torch.empty(0, width, dtype=model.dtype, device=self.device)
        rank = torch.distributed.get_rank(self.group)
        for owner, shape in enumerate(self._shapes(batch)):
            if not shape.numel:
                continue
            found = hidden_rows(model, self._shared(batch, shape, owner, owner == rank))
            own = found if owner == rank else own
        return own

    def _shapes(self, batch: Batch) -> list[_Shape]:
        """Of the batch of every process of the group."""
        num_packed = 0 if batch.packed is None else len(batch.packed.lengths)
        sizes = (*batch.input_ids.shape, num_packed, int(batch.is_padded_right))
        own = torch.tensor(sizes, device=self.device)
        found = [torch.empty_like(own) for _ in range(self.count)]
        torch.distributed.all_gather(found, own, self.group)
        return [_Shape(*row) for row in torch.stack(found).tolist()]

    def _shared(self, batch: Batch, shape: _Shape, owner: int, is_own: bool) -> Batch:
        """A batch of one process, in all of them; elsewhere than there it has no rows."""
        lengths = [] if batch.packed is None else batch.packed.lengths
        tables = [batch.input_ids, batch.attention_mask, batch.position_ids]
        numbers = torch.empty(shape.numel, dtype=torch.int64, device=self.device)
        if is_own:
            packed = torch.tensor(lengths, dtype=torch.int64, device=self.device)
            numbers = torch.cat([*(table.flatten().to(packed) for table in tables), packed])
        torch.distributed.broadcast(numbers, group=self.group, group_src=owner)
        if is_own:
            return batch
        size = shape.rows * shape.columns
        *tables, packed = torch.split(numbers, [size, size, size, shape.num_packed])
        ids, mask, positions = (table.view(shape.rows, shape.columns) for table in tables)
        none = numbers[:0]
        return Batch(
            ids, mask, positions, none, none, none, none,
            bool(shape.is_padded_right),
            Packed.of(packed.tolist(), self.device) if shape.num_packed else None,
        )  # fmt: skip


def _name_groups_only(mesh: DeviceMesh) -> None:
    """Let a mesh find its process groups by their names.

    DTensor keeps meshes in caches that nothing empties. A group that is still held when it is
    destroyed keeps its threads, and one that wakes up while the interpreter ends aborts it.
    """
    for held in vars(mesh).values():
        groups = held.items() if isinstance(held, dict) else ()
        for key in [k for k, v in groups if isinstance(v, torch.distributed.ProcessGroup)]:
            del held[key]


def require_shardable_teacher(
    model: PreTrainedModel, kind: TeacherSharding, who: str, count: int = 0
) -> None:
    """Refuse an architecture that cannot be cut.

    Args:
        model: with or without numbers.
        kind: fsdp2 or tp.
        who: names it in messages, such as "teacher 'folder'".
        count: processes of a group; 0 where that is not known yet.

    Raises:
        ModelError: it names no layers, has no plan for tensor parallelism, or has attention heads
            that the group cannot share evenly; or transformers is too old.
    """
    name = type(model).__name__
    if kind == "fsdp2" and not layer_names(model, backbone(model)):
        raise ModelError(
            f"the {who}, a {name}, names no layers that could be gathered one by one. "
            'Use teacher.sharding = "none".'
        )
    if kind == "tp":
        _require_tensor_parallelism()
    if kind == "tp" and not _plan(model):
        raise ModelError(
            f"the {who}, a {name}, has no plan for tensor parallelism in transformers. {_INSTEAD}"
        )
    config = model.config.get_text_config(decoder=True).to_dict()
    for key in _HEADS if kind == "tp" and count else ():
        found = config.get(key)
        if isinstance(found, int) and found % count:
            raise ModelError(
                f"the {who} has {found} {key}, which {count} processes cannot share evenly. Set "
                f"teacher.sharding_group_size to a divisor of it. {_INSTEAD}"
            )


def _require_tensor_parallelism() -> None:
    """Refuse a version of transformers that cannot cut a loaded model by a given plan."""
    import transformers

    try:
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism

        inspect.signature(apply_tensor_parallelism).bind("model", "mesh", "plan")
    except (ImportError, TypeError):
        raise ModelError(
            "teacher.sharding 'tp' needs transformers 5.19 or later, got "
            f"{transformers.__version__}. Update transformers. {_INSTEAD}"
        ) from None


def _plan(model: PreTrainedModel) -> dict[str, str]:
    """How transformers cuts the backbone; the head is not part of it."""
    head = _name(model, output_embeddings(model))
    return {name: style for name, style in model.tp_plan.items() if name != head}


def _name(model: PreTrainedModel, wanted: nn.Module) -> str:
    names: list[str] = [name for name, module in model.named_modules() if module is wanted]
    return names[0]


class _Shape(NamedTuple):
    """What the tensors of a batch need to be received."""

    rows: int
    columns: int
    num_packed: int
    is_padded_right: int

    @property
    def numel(self) -> int:
        """Numbers of ids, mask and positions, and of the lengths of packed sequences."""
        return 3 * self.rows * self.columns + self.num_packed


def _one_token(batch: Batch) -> Batch:
    """A batch of one sequence without rows, in place of one without sequences."""
    ids = batch.tokens.new_zeros(1, 1)
    return replace(
        batch, input_ids=ids, attention_mask=ids + 1, position_ids=ids,
        is_padded_right=True, packed=None,
    )  # fmt: skip


def _gather_when_called(projection: Any) -> None:
    """Let a layer whose weight lies in shards have all of it while it is called.

    Every process of the group has to call it at the same point.
    """
    kept: list[nn.Parameter] = []

    def gather(module: Any, _: Any) -> None:
        kept.append(module.weight)
        module.weight = nn.Parameter(gathered(module.weight), requires_grad=False)

    def give_back(module: Any, _: Any, __: Any) -> None:
        module.weight = kept.pop()

    projection.register_forward_pre_hook(gather)
    projection.register_forward_hook(give_back, always_call=True)


def held_bytes(model: nn.Module) -> int:
    """Bytes of weights that this process has of a model."""
    return sum(local(weight).nbytes for weight in model.parameters())
