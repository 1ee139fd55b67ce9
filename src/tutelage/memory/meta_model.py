"""What a pass of a model allocates, found on tensors that have shapes and no memory."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, DynamicCache

from tutelage.models.forward import backbone, foreign
from tutelage.models.liger import with_own_layers
from tutelage.models.lora import add_lora, checkpoint_activations, learning
from tutelage.models.prune import prune_layers
from tutelage.models.reference import causal_class

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from tutelage.config.models import StudentConfig
    from tutelage.setup.components import Components

_FUSED = "shapes_of_fused_attention"
_ACCUMULATOR = 4
"""Bytes of a number in which fused attention sums over keys."""


class Usage(NamedTuple):
    """Bytes that a pass takes beyond what was there before it."""

    peak: int
    """At its largest."""
    kept: int
    """What is left of it afterwards."""


@dataclass(frozen=True)
class Learning:
    """Bytes of a forward and backward pass."""

    forward: Usage
    backward: int
    """Peak of the backward pass: what is kept until then, gradients of weights included."""


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that are made inside and are still alive."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in _tensors(found):
            self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def restart(self) -> None:
        """Look for the peak from here on."""
        self.peak = self.now


def _tensors(result: Any) -> Iterator[Tensor]:
    """The tensors that an operator gave."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for part in result:
            yield from _tensors(part)


def shadow(model: PreTrainedModel) -> PreTrainedModel:
    """The same model without numbers, its attention fused as on a CUDA device.

    Raises:
        ModelError: a class that cannot do without them.
    """
    tensors = [*model.parameters(), *model.buffers()]
    packed = {id(m): _packed(m, model.dtype) for m in model.modules() if _num_bits(m)}
    memo: dict[int, Any] = packed | {
        id(tensor): nn.Parameter(tensor.detach().to("meta"), tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else tensor.to("meta")
        for tensor in tensors
    }
    with foreign("has no shape of its own", model):
        twin: PreTrainedModel = with_own_layers(copy.deepcopy(model, memo))
        AttentionInterface.register(_FUSED, _attention)
        twin.set_attn_implementation(_FUSED)
    return twin


def shadows(components: Components) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student and teacher without numbers.

    Raises:
        ModelError: a class that cannot do without them.
    """
    is_there = components.teacher.mode != "reload"
    with nullcontext() if is_there else components.teacher.on_device():
        return shadow(components.student.model), shadow(components.teacher.model)


def shapes(
    config: PreTrainedConfig,
    dtype: torch.dtype = torch.bfloat16,
    student: StudentConfig | None = None,
    quantization: str = "none",
) -> PreTrainedModel:
    """A model of an architecture without numbers, made without its files; as from `shadow`.

    Args:
        config: its architecture.
        dtype: of its weights.
        student: the table of the configuration that says how it is trained; None for a teacher.
        quantization: of a teacher: none, 8bit or 4bit.

    Raises:
        ModelError: a class that cannot do without numbers.
    """
    with foreign("has no shape of its own", config), torch.device("meta"):
        auto = causal_class(config, "of this type").auto
        model: PreTrainedModel = auto.from_config(config, dtype=dtype).eval()
        if student is not None:
            quantization = student.quantization
            if student.num_layers is not None:
                model = prune_layers(model, student.num_layers)
        if quantization != "none":
            _in_few_bits(model, int(quantization.removesuffix("bit")))
        if student is not None and student.lora is not None:
            lora = student.lora
            add_lora(model, lora.rank, lora.alpha, lora.dropout, lora.target_modules)
    if student is not None and student.activation_checkpointing:
        checkpoint_activations(model)
    return shadow(model)


def _in_few_bits(twin: PreTrainedModel, num_bits: int) -> None:
    """Freeze its linear layers, the head aside, in so many bits."""
    head = twin.get_output_embeddings()
    for parent in list(twin.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is nn.Linear and module is not head:
                setattr(parent, name, FewBits(module, num_bits, twin.dtype))


def stored_bytes(twin: PreTrainedModel) -> int:
    """Bytes of a model's weights where they are kept."""
    packed = [module for module in twin.modules() if isinstance(module, FewBits)]
    wide = sum(module.weight.nbytes for module in packed)
    every: int = sum(weight.nbytes for weight in twin.parameters())
    return every - wide + sum(module.num_bytes for module in packed)


@torch.no_grad()
def reading(twin: PreTrainedModel, shape: tuple[int, int], is_cached: bool = False) -> Usage:
    """A forward pass without gradient over `[B, T]` tokens, perhaps with a cache of all of them."""
    ids = torch.zeros(shape, dtype=torch.int64, device="meta")
    cache = {"past_key_values": DynamicCache()} if is_cached else {}
    with foreign("cannot be run without numbers", twin), _live(twin) as live:
        output = backbone(twin)(input_ids=ids, use_cache=is_cached, **cache)
        states = output.last_hidden_state
        del output
        kept = live.now
    del states
    return Usage(live.peak, kept)


def learning_from(
    twin: PreTrainedModel,
    shape: tuple[int, int],
    num_rows: int,
    has_gradients: bool,
    released: Iterable[Tensor] = (),
) -> Learning:
    """A forward pass over `[B, T]` tokens and the backward pass from gradients of N rows and head.

    Args:
        twin: from `shadow`.
        shape: sequences and their length.
        num_rows: N.
        has_gradients: whether the weights have gradients already, which are added to.
        released: weights whose gradients go as soon as they are there.
    """
    ids = torch.zeros(shape, dtype=torch.int64, device="meta")
    for weight in twin.parameters():
        is_summed = has_gradients and weight.requires_grad
        weight.grad = torch.empty_like(weight) if is_summed else None
    head = twin.get_output_embeddings().weight
    with (
        foreign("cannot be run without numbers", twin),
        learning(twin, (0,)),
        _releasing(released),
        _live(twin) as live,
    ):
        states = backbone(twin)(input_ids=ids, use_cache=False).last_hidden_state
        rows = states.flatten(0, 1)[torch.zeros(num_rows, dtype=torch.int64, device="meta")]
        del states
        forward = Usage(live.peak, live.now)
        live.restart()
        total = _Objective.apply(rows, head)  # type: ignore[no-untyped-call]
        del rows
        total.backward()
        backward = live.peak
    twin.zero_grad()
    return Learning(forward, backward)


@contextmanager
def _releasing(weights: Iterable[Tensor]) -> Iterator[None]:
    def release(weight: Tensor) -> None:
        weight.grad = None

    trained: list[Any] = [weight for weight in weights if weight.requires_grad]
    hooks = [weight.register_post_accumulate_grad_hook(release) for weight in trained]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _live(twin: PreTrainedModel) -> Live:
    weights = list(twin.parameters())
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    return Live([*weights, *twin.buffers(), *gradients])


class FewBits(nn.Linear):
    """A frozen layer whose weights are unpacked, as a whole, for every product."""

    def __init__(self, like: Any, num_bits: int, dtype: torch.dtype) -> None:
        sizes, has_bias = (like.in_features, like.out_features), like.bias is not None
        super().__init__(*sizes, has_bias, device="meta", dtype=dtype)
        self.requires_grad_(False)
        # float32 scales: one for 64 weights of 4 bits, or for a row in 8
        scales = self.weight.numel() // 64 if num_bits == 4 else self.out_features
        self.num_bytes = self.weight.numel() * num_bits // 8 + 4 * scales

    def forward(self, x: Tensor) -> Tensor:
        """The product."""
        out: Tensor = _Unpacked.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias


class _Unpacked(torch.autograd.Function):
    """x Wᵀ with a copy of W while it is computed, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return x.to(weight.dtype) @ torch.empty_like(weight).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ torch.empty_like(ctx.weight), None


def _num_bits(module: nn.Module) -> int:
    """Bits of a layer's weights; 0 where they are what they are."""
    if not type(module).__module__.startswith("bitsandbytes"):
        return 0
    return {"Linear4bit": 4, "Linear8bitLt": 8}.get(type(module).__name__, 0)


def _packed(module: Any, dtype: torch.dtype) -> FewBits:
    return FewBits(module, _num_bits(module), dtype)


class _Objective(torch.autograd.Function):
    """Has gradients of hidden states and head as they leave the objective."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, head)
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        return tuple(torch.empty_like(x) if is_wanted else None for x, is_wanted in wanted)


class _Fused(torch.autograd.Function):
    """The memory of flash attention: no `[T, T]`; backward sums keys' gradients in float32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *_rest = ctx.saved_tensors
        summed = q.new_empty(q.numel() * _ACCUMULATOR, dtype=torch.uint8)
        wide = [torch.empty_like(q) for _ in "kv"] if q.shape[1] > k.shape[1] else []
        found = tuple(torch.empty_like(x) for x in (q, k, v))
        del summed, wide
        return found


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """One of transformers' attention functions; queries, keys, values are `[B, heads, T, d]`."""
    run: Callable[..., Tensor] = _Fused.apply
    return run(query, key, value).transpose(1, 2).contiguous(), None
