"""A causal language model as two parts: the backbone, and the head that projects its rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tutelage.core import LazyLogits
from tutelage.data.batch import Batch
from tutelage.errors import ModelError
from tutelage.models.forward import backbone, read_alone, rounding, run, trial_ids
from tutelage.models.limits import refuse_beyond_table
from tutelage.models.llama_cpu.forward import is_written_out, last_hidden
from tutelage.models.packing import unmasked_inputs
from tutelage.models.sharding import gathered

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SMALL, _LARGE = 2.0**-10, 2.0**20
"""Products far below any cap, where only the scale shows, and far above, where the cap does."""
_BETWEEN = (-100.0, -30.0, -10.0, -1.0, 1.0, 10.0, 30.0, 100.0)


class HeadForm(NamedTuple):
    """What a model does to the products of its head: cap·tanh(scale·z / cap), or scale·z."""

    scale: float
    softcap: float | None

    def __call__(self, z: Tensor) -> Tensor:
        """Logits for products."""
        scaled = z * self.scale
        return scaled if self.softcap is None else self.softcap * (scaled / self.softcap).tanh()


_KNOWN: WeakKeyDictionary[PreTrainedModel, HeadForm] = WeakKeyDictionary()


def hidden_rows(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Last hidden states of the positions that predict completion tokens, `[N, D]`.

    Sequences of a packed batch are read by themselves. Padding on the right needs no mask: a causal
    model's tokens do not see what follows them.
    """
    if batch.is_padded_right and batch.num_rows and is_written_out(model):
        width = batch.input_ids.shape[1]
        first = int((batch.row_index % width).min())
        hidden = last_hidden(model, batch.input_ids, first)
        # Row b·T + t of the whole is row b·(T − first) + t − first of this.
        skipped = (batch.row_index // width + 1) * first
        return hidden.flatten(0, 1).index_select(0, batch.row_index - skipped)
    longest = max(batch.packed.lengths) if batch.packed else batch.input_ids.shape[1]
    refuse_beyond_table(model, longest)
    inputs = unmasked_inputs(model, batch)
    if batch.packed is None and not batch.is_padded_right:
        inputs = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "position_ids": batch.position_ids,
            "use_cache": False,
        }
    return batch.flatten(run(backbone(model), **inputs).last_hidden_state)


def head(model: PreTrainedModel, hidden: Tensor, vocab_size: int) -> LazyLogits:
    """The model's logits for rows of hidden states, over the first `vocab_size` ids.

    A frozen head that lies in shards is gathered: all processes that hold it have to ask together.

    Raises:
        ModelError: the model has no output embeddings to project with, or its logits are more than
            products with them, a scale and a cap.
    """
    projection = output_embeddings(model)
    form = head_form(model)
    bias: Tensor | None = dict(projection.named_parameters()).get("bias")
    weight: Tensor = projection.weight
    if not weight.requires_grad:
        weight = gathered(weight)
    logits = LazyLogits(hidden, weight, bias, form.scale, form.softcap)
    return logits.cut(vocab_size)


def output_embeddings(model: PreTrainedModel) -> Any:
    """The layer whose weight is the head.

    Raises:
        ModelError: there is none.
    """
    projection = model.get_output_embeddings()
    if projection is None:
        raise ModelError(
            f"{type(model).__name__} has no output head, so it gives no logits. "
            "Use a causal language model."
        )
    return projection


def head_form(model: PreTrainedModel) -> HeadForm:
    """Scale and cap of a model's logits, read off from the model itself.

    Every family has its own names for them, in places of its own, some with opposite meanings. So
    the model runs once with the products of its head replaced by known numbers.

    Raises:
        ModelError: the logits are something else than scaled and capped products.
    """
    form = _KNOWN.get(model)
    if form is None:
        form = _KNOWN[model] = _measured_form(model)
    return form


@torch.no_grad()
def _measured_form(model: PreTrainedModel) -> HeadForm:
    projection = output_embeddings(model)
    num_ids = projection.weight.shape[0]
    products = torch.tensor((_SMALL, _LARGE, *_BETWEEN), device=projection.weight.device)
    products = products.to(torch.promote_types(model.dtype, torch.float32))[:num_ids]
    seen: dict[str, Tensor] = {}

    def replace(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["input"] = inputs[0]
        known = torch.zeros_like(output, dtype=products.dtype)
        known[..., : len(products)] = products
        return known

    ids = trial_ids(model, 2)
    row = torch.tensor([ids], device=model.device)
    with _hooked(projection, replace):
        logits = model(input_ids=row, use_cache=False).logits[0, -1, : len(products)]
    if "input" not in seen:
        return HeadForm(1.0, None)  # the head is used without being called: its logits are compared
    before = _scale_before(model, read_alone(model, ids), seen["input"])
    wide = logits.double()
    scale, cap = float(wide[0]) / _SMALL, float(wide[1])
    is_capped = abs(cap) < 0.5 * scale * _LARGE
    form = HeadForm(scale, cap if is_capped else None)
    gap = (form(products.double()) - wide).abs() / wide.abs().clamp(min=1e-30)
    if not float(gap.max()) <= 16 * torch.finfo(logits.dtype).eps:
        raise ModelError(
            f"the logits of {type(model).__name__} are more than its head times its hidden states, "
            "scaled and capped. This architecture is not supported."
        )
    return HeadForm(scale * before, form.softcap)


def _scale_before(model: PreTrainedModel, hidden: Tensor, entered: Tensor) -> float:
    """What the hidden states are multiplied with before they enter the head (MiniCPM)."""
    given, read = hidden.reshape(-1).double(), entered.reshape(-1).double()
    if given.shape == read.shape:
        scale = float(given @ read / (given @ given))
        is_same = torch.equal(given, read)
        if is_same or float((read - scale * given).norm() / read.norm()) <= rounding(model):
            return 1.0 if is_same else scale
    raise ModelError(
        f"{type(model).__name__} has layers between its backbone and its output embeddings. "
        "This architecture is not supported."
    )


@contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
