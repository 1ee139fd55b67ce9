"""Checks a model on a few tokens when it is loaded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tutelage.data.batch import collate, pack
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import ModelError
from tutelage.models.forward import foreign, read_alone, relative_gap, rounding, trial_ids
from tutelage.models.head import head, hidden_rows
from tutelage.models.limits import context_limit
from tutelage.models.llama_cpu.layers import is_fast_family
from tutelage.models.sharding import is_shard, local
from tutelage.rollout.slots import slots_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTHS = (9, 3, 6)
_LOGITS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest relative difference between a model's logits and its head times its hidden states."""


def try_model(
    model: PreTrainedModel,
    who: str,
    vocab_size: int,
    decodes: bool = True,
    is_packed: bool = False,
) -> list[str]:
    """Refuse an architecture whose numbers here would not be those of its plain forward pass.

    Tried on short sequences: that its logits are its head times its hidden states; that a sequence
    has the same hidden states beside longer ones; that rows decoded together give what each gives
    alone.

    Args:
        model: in evaluation mode, on its device.
        who: names it in messages, such as "student 'folder'".
        vocab_size: ids that are compared.
        decodes: whether it samples completions.
        is_packed: whether it gets packed rows.

    Returns:
        Warnings about how it is computed.

    Raises:
        ModelError: it computes something else, or cannot be run.
    """
    limit = context_limit(model)
    lengths = [min(length, limit or length) for length in _LENGTHS]
    with foreign(f"of the {who} cannot be run", model), torch.no_grad():
        sequences = [trial_ids(model, length, i) for i, length in enumerate(lengths)]
        alone = [read_alone(model, ids) for ids in sequences]
        _check_head(model, who, vocab_size, sequences[0], alone[0])
        _check_neighbours(model, who, sequences, alone, is_packed)
        rows = slots_for(model, 0) if decodes and not is_fast_family(model) else None
    notes = [rows.note] if rows is not None and rows.note else []
    if model.config._attn_implementation == "eager":
        notes.append("has no fused attention in transformers: it attends eagerly, and slower")
    return [f"the {who}, a {type(model).__name__}, {note}" for note in notes]


def _check_head(
    model: PreTrainedModel, who: str, vocab_size: int, ids: tuple[int, ...], states: Tensor
) -> None:
    row = torch.tensor([ids], device=model.device)
    theirs = model(input_ids=row, use_cache=False).logits[0, :, :vocab_size]
    ours = head(model, states, vocab_size).block(0, len(ids))
    theirs = theirs.to(ours)
    if bool((theirs.isnan() | (theirs == math.inf)).any()):  # a bias may rule an id out: -inf
        raise ModelError(
            f"the {who} gives logits that are not finite. Use float32 or bfloat16, or a whole copy."
        )
    is_open = theirs > -math.inf
    same_open = torch.equal(is_open, ours > -math.inf)
    a, b = ours.where(is_open, 0.0), theirs.where(is_open, 0.0)
    gap = float((a - b).norm() / b.norm().clamp(min=1e-12))
    if not (same_open and gap <= _LOGITS[model.dtype]):
        raise ModelError(
            f"the logits of the {who} are not its head times its hidden states: "
            f"{type(model).__name__} differs by {gap:.2g} of their size. This architecture is not "
            "supported."
        )


def _check_neighbours(
    model: PreTrainedModel,
    who: str,
    sequences: list[tuple[int, ...]],
    states: list[Tensor],
    is_packed: bool,
) -> None:
    prompt = Prompt("trial", "")
    rollouts = [Rollout(prompt, 0, ids[:1], ids[1:]) for ids in sequences]
    alone = torch.cat([rows[:-1] for rows in states])
    gap = relative_gap(hidden_rows(model, collate(rollouts, 0).to(model.device)), alone)
    if not gap <= rounding(model):
        raise ModelError(
            f"the {who} computes a sequence differently beside a longer one: hidden states of "
            f"{type(model).__name__} differ by {gap:.2g} of their size, so tokens attend to what "
            "follows them. Use a causal language model."
        )
    if not is_packed:
        return
    gap = relative_gap(hidden_rows(model, pack(rollouts).to(model.device)), alone)
    if not gap <= rounding(model):
        raise ModelError(
            f"the {who} computes a sequence differently in a packed row: hidden states of "
            f"{type(model).__name__} differ by {gap:.2g} of their size. "
            'Use micro_batches = "padded".'
        )


def refuse_nonfinite(model: PreTrainedModel, who: str) -> None:
    """Weights that are not finite make every loss NaN.

    Where they lie in shards, all processes refuse what one finds.

    Raises:
        ModelError: a weight has such numbers.
    """
    message = _nonfinite(model, who)
    if any(is_shard(weight) for weight in model.parameters()):
        found: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, message)
        message = next((text for text in found if text is not None), None)
    if message is not None:
        raise ModelError(message)


def _nonfinite(model: PreTrainedModel, who: str) -> str | None:
    for name, weight in model.named_parameters():
        own = local(weight.detach())
        if own.is_floating_point() and own.numel():
            low, high = torch.aminmax(own)  # one pass, no copy
            if not (math.isfinite(float(low)) and math.isfinite(float(high))):
                return (
                    f"the {who} has numbers in {name} that are not finite, from {float(low)} to "
                    f"{float(high)}. Copy or download it again."
                )
    return None
