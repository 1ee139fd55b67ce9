"""Which model computes somewhere: what a server and a run compare before anything else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tutelage.models.head import head_form, output_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WHOLE_BYTES, _NUM_PIECES, _PIECE_BYTES = 64 << 20, 64, 256 << 10
"""Tensors up to this size are digested whole, larger ones in so many pieces of so many bytes."""


@dataclass(frozen=True)
class Identity:
    """The head of a model, as its owner and its user must have it alike."""

    head: str
    """SHA-256 of the head's numbers, its bias, and what is done to its products."""
    vocab_size: int
    """Rows of the head."""
    hidden_size: int
    """Columns of the head."""
    dtype: str
    """Of the weights."""
    model_type: str
    """Of its configuration."""


def identity_of(model: PreTrainedModel) -> Identity:
    """The identity of a model, or of one that has the head alone."""
    projection = output_embeddings(model)
    weight: Tensor = projection.weight.detach()
    bias: Tensor | None = dict(projection.named_parameters()).get("bias")
    form = head_form(model)
    digest = hashlib.sha256(f"{form.scale:.9g} {form.softcap} {tuple(weight.shape)}".encode())
    for tensor in (weight, *([] if bias is None else [bias])):
        for part in parts_of(tensor):
            digest.update(part)
    return Identity(
        digest.hexdigest(),
        int(weight.shape[0]),
        int(weight.shape[1]),
        str(weight.dtype).removeprefix("torch."),
        str(model.config.get_text_config().model_type),
    )


def weights_checksum(model: PreTrainedModel) -> str:
    """SHA-256 of all weights and buffers by their names, of large ones in evenly spread pieces."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        for piece in _pieces(tensor.detach()):
            for part in parts_of(piece):
                digest.update(part)
    return digest.hexdigest()


def parts_of(tensor: Tensor, piece: int = 1 << 26) -> Iterable[memoryview]:
    """The bytes of a tensor, in pieces of so many numbers."""
    flat = tensor.detach().flatten()
    for start in range(0, flat.numel(), piece):
        here = flat[start : start + piece].cpu().contiguous()
        yield here.view(torch.uint8).numpy().data


def _pieces(tensor: Tensor) -> Iterable[Tensor]:
    if tensor.nbytes <= _WHOLE_BYTES:
        return [tensor]
    flat, size = tensor.flatten(), _PIECE_BYTES // tensor.itemsize
    last = tensor.numel() - size
    return [
        flat[start : start + size]
        for start in (piece * last // (_NUM_PIECES - 1) for piece in range(_NUM_PIECES))
    ]
