"""One token for every row: sample it from the hidden state, and compute the next hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tutelage.models.forward import is_llama_like
from tutelage.models.llama_cpu.products import Linear
from tutelage.rollout.cuda.operators import Heads, Operators, TokenSampling
from tutelage.rollout.cuda.state import Rows, Sizes, Work

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class _Adapter:
    """A low-rank update of some columns of a product, computed in its own dtype."""

    first: int
    last: int
    down: nn.Parameter
    up: nn.Parameter
    scale: float

    def add(self, x: Tensor, out: Tensor) -> None:
        """out ← out + scale · x downᵀ upᵀ in these columns."""
        update = (x @ self.down.t()) @ self.up.t()
        out[:, self.first : self.last].add_(update, alpha=self.scale)


@dataclass(frozen=True)
class _Product:
    """x weightᵀ + bias, for the weights of one or several layers, one below the other."""

    weight: Tensor
    bias: Tensor | None
    adapters: tuple[_Adapter, ...]

    def __call__(self, x: Tensor, out: Tensor) -> None:
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=out)
        if self.adapters:
            wide = x.to(self.adapters[0].down.dtype)
            for adapter in self.adapters:
                adapter.add(wide, out)


@dataclass(frozen=True)
class _Layer:
    before_attention: nn.Parameter
    qkv: _Product
    heads: Heads
    o: _Product
    before_mlp: nn.Parameter
    gate_up: _Product
    down: _Product


class DecodeStep:
    """The step of a pre-norm decoder with RMS norms, rotary positions and SwiGLU.

    The weights of layers with a common input become views of one matrix, so that they are one
    product; the parameters stay the model's own, and what an optimizer writes into them is what
    the next step reads.
    """

    def __init__(self, model: PreTrainedModel, operators: Operators) -> None:
        base: Any = model.base_model
        self.operators = operators
        self.table: nn.Parameter = base.embed_tokens.weight
        self.norm: nn.Parameter = base.norm.weight
        self.eps: float = base.norm.variance_epsilon
        self.head: nn.Parameter = _head(model).weight
        windows = windows_of(base.config)
        self.layers = [
            _layer(layer, base.config, window)
            for layer, window in zip(base.layers, windows, strict=True)
        ]
        self.products = 0
        """Products started so far."""
        self._memory = _memory(model)

    @property
    def window(self) -> int:
        """The smallest window of a layer; 0 if every layer sees everything."""
        return min((x.heads.window for x in self.layers if x.heads.window), default=0)

    def is_current(self, model: PreTrainedModel) -> bool:
        """Whether the model has the same parameters in the same memory; values may differ."""
        return self._memory == _memory(model)

    def __call__(
        self,
        rows: Rows,
        work: Work,
        cache: Tensor,
        turn: tuple[Tensor, Tensor],
        sampling: TokenSampling,
    ) -> None:
        """Sample a token for every row and feed it.

        Args:
            rows: B completions.
            work: memory for intermediate results.
            cache: keys and values `[layers, 2, slots, groups, capacity, head_dim]`.
            turn: cosines and sines `[capacity, head_dim / 2]`.
            sampling: how tokens are sampled.
        """
        self._project(rows.hidden, work.logits)
        self.operators.sample(rows, work, sampling)
        self.feed(rows, work, cache, turn)

    def feed(self, rows: Rows, work: Work, cache: Tensor, turn: tuple[Tensor, Tensor]) -> None:
        """The hidden states after each row's token; arguments as for a whole step."""
        operators, last = self.operators, turn[0].shape[0] - 1
        operators.embed_norm(rows, work, self.table, self.layers[0].before_attention, self.eps)
        for i, layer in enumerate(self.layers):
            if i:
                operators.add_norm(rows, work, layer.before_attention, self.eps)
            layer.qkv(work.normed, work.qkv)
            operators.attend(rows, work, layer.heads, (cache[i, 0], cache[i, 1]), turn)
            layer.o(work.mixed, work.y)
            operators.add_norm(rows, work, layer.before_mlp, self.eps)
            layer.gate_up(work.normed, work.gate_up)
            operators.swiglu(work)
            layer.down(work.opened, work.y)
            self.products += 4
        operators.end_step(rows, work, self.norm, self.eps, last)

    def _project(self, hidden: Tensor, logits: Tensor) -> None:
        """Logits that are not rounded to the dtype of the weights."""
        self.products += 1
        if logits.dtype == hidden.dtype:
            torch.mm(hidden, self.head.t(), out=logits)
        elif hidden.is_cuda:
            torch.mm(hidden, self.head.t(), out_dtype=logits.dtype, out=logits)
        else:
            torch.mm(hidden.to(logits.dtype), self.head.to(logits.dtype).t(), out=logits)


def sizes_of(model: PreTrainedModel) -> Sizes:
    """What determines the memory of the step of such a model."""
    base: Any = model.base_model
    table, layer = base.embed_tokens.weight, base.layers[0]
    return Sizes(
        num_layers=len(base.layers),
        num_heads=base.config.num_attention_heads,
        num_groups=base.config.num_key_value_heads,
        head_dim=layer.self_attn.head_dim,
        width=table.shape[1],
        inner=_plain(layer.mlp.down_proj).weight.shape[1],
        num_rows_of_head=_head(model).weight.shape[0],
        dtype=table.dtype,
        device=table.device,
    )


def is_covered(model: PreTrainedModel) -> bool:
    """Whether `DecodeStep` is made for such a model; a trial then shows that it computes it."""
    if not is_llama_like(model):
        return False
    base: Any = model.base_model
    config, head = base.config, _head(model)
    is_plain = all(_is_known(module) for layer in base.layers for module in _modules(layer))
    is_plain = is_plain and type(head) in (nn.Linear, Linear) and head.bias is None
    is_plain = is_plain and type(base.embed_tokens) is nn.Embedding
    named = [*base.named_parameters(), *head.named_parameters()]
    weights = [weight for name, weight in named if ".lora_" not in name]
    same = {(weight.dtype, weight.device) for weight in weights}
    head_dim: int = base.layers[0].self_attn.head_dim
    is_power = head_dim >= 32 and head_dim & (head_dim - 1) == 0
    settings = config.to_dict()
    is_scaled = any(
        settings.get(name) not in (None, 1, 1.0)
        for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")
    )
    return (
        is_plain
        and len(same) == 1
        and weights[0].dtype in _DTYPES
        and is_power
        and config.hidden_act == "silu"
        and not is_scaled
    )


def windows_of(config: Any) -> list[int]:
    """For each layer, how many tokens one sees, itself included; 0 for all."""
    settings = config.to_dict()
    window = settings.get("sliding_window") if settings.get("use_sliding_window", True) else None
    kinds = settings.get("layer_types") or ["sliding_attention"] * config.num_hidden_layers
    return [int(window) if window and kind == "sliding_attention" else 0 for kind in kinds]


def _modules(layer: Any) -> list[Any]:
    """The seven products of a layer."""
    attention, mlp = layer.self_attn, layer.mlp
    read = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*read, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _is_known(module: Any) -> bool:
    """Whether it is a plain linear layer, or one with a plain low-rank update from peft."""
    kind = type(module)
    if kind in (nn.Linear, Linear):
        return True
    is_lora = kind.__name__ == "Linear" and kind.__module__.startswith("peft.tuners.lora")
    if not is_lora or type(module.base_layer) not in (nn.Linear, Linear):
        return False
    names = list(module.lora_A)
    is_active = names == list(module.active_adapters) and not module.disable_adapters
    downs = [module.lora_A[name] for name in names]
    ups = [module.lora_B[name] for name in names]
    is_plain = all(type(x) in (nn.Linear, Linear) and x.bias is None for x in (*downs, *ups))
    return is_active and is_plain and not module.merged and not module.lora_variant


def _memory(model: PreTrainedModel) -> list[tuple[str, int]]:
    """Names of a model's parameters, and where their memory begins."""
    return [(name, parameter.data_ptr()) for name, parameter in model.named_parameters()]


def _head(model: PreTrainedModel) -> Any:
    return model.get_output_embeddings()


def _layer(layer: Any, config: Any, window: int) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    norms = dict(attention.named_children())
    q_norm, k_norm = norms.get("q_norm"), norms.get("k_norm")
    heads = Heads(
        num_heads=config.num_attention_heads,
        num_groups=config.num_key_value_heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        window=window,
        q_norm=None if q_norm is None else q_norm.weight,
        k_norm=None if k_norm is None else k_norm.weight,
        eps=0.0 if q_norm is None else q_norm.variance_epsilon,
    )
    return _Layer(
        before_attention=layer.input_layernorm.weight,
        qkv=_product([attention.q_proj, attention.k_proj, attention.v_proj]),
        heads=heads,
        o=_product([attention.o_proj]),
        before_mlp=layer.post_attention_layernorm.weight,
        gate_up=_product([mlp.gate_proj, mlp.up_proj]),
        down=_product([mlp.down_proj]),
    )


def _product(modules: Sequence[Any]) -> _Product:
    """One product for layers of one input."""
    plain = [_plain(module) for module in modules]
    weights: list[Any] = [module.weight for module in plain]
    biases: list[Any] = [module.bias for module in plain if module.bias is not None]
    if biases and len(biases) < len(modules):
        raise ValueError("layers of one input have a bias each, or none has.")
    joined = _one_below_the_other(weights)
    bias = _one_below_the_other(biases) if biases else None
    adapters = []
    first = 0
    for module, base in zip(modules, plain, strict=True):
        if module is not base:
            adapters += _adapters(module, first)
        first += len(base.weight)
    return _Product(joined, bias, tuple(adapters))


def _plain(module: Any) -> Any:
    """The linear layer itself, without its low-rank update."""
    return module if type(module) in (nn.Linear, Linear) else module.base_layer


def _adapters(module: Any, first: int) -> list[_Adapter]:
    """The low-rank updates of a layer whose first column is that one."""
    last = first + len(module.base_layer.weight)
    return [
        _Adapter(first, last, down.weight, module.lora_B[name].weight, module.scaling[name])
        for name, down in module.lora_A.items()
    ]


@torch.no_grad()
def _one_below_the_other(parts: Sequence[nn.Parameter]) -> Tensor:
    """One tensor of which the parameters are views from now on, without a copy that could age."""
    first = parts[0].data
    if len(parts) == 1:
        return first
    num_rows = sum(len(part) for part in parts)
    if _is_joined(parts):
        return first.as_strided((num_rows, *first.shape[1:]), first.stride())
    whole = torch.cat([part.data for part in parts])
    start = 0
    for part in parts:
        part.data = whole[start : start + len(part)]
        start += len(part)
    return whole


def _is_joined(parts: Sequence[nn.Parameter]) -> bool:
    """Whether they are such views already."""
    end = parts[0].data_ptr()
    for part in parts:
        is_next = part.data_ptr() == end and part.is_contiguous()
        if (
            not is_next
            or part.untyped_storage().data_ptr() != parts[0].untyped_storage().data_ptr()
        ):
            return False
        end += part.nbytes
    return True
