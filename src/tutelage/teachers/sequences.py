"""The sequences of a batch as plain token ids, as a server of models reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tutelage.data.batch import Batch


@dataclass(frozen=True)
class TokenSequence:
    """Prompt and completion without padding, and where its supervised tokens stand."""

    ids: tuple[int, ...]
    places: tuple[int, ...]
    """Index in `ids` of each supervised token, ascending; the batch's rows of this sequence."""


def sequences_of(batch: Batch) -> list[TokenSequence]:
    """Every sequence of a batch, in order; their places one after the other are its rows.

    Raises:
        ValueError: rows of one sequence do not lie side by side.
    """
    here = batch.to("cpu")
    if here.packed is not None:
        starts = here.packed.starts.long()[:-1]
        flat = here.input_ids[0]
        lengths = torch.tensor(here.packed.lengths)
    else:
        width = here.input_ids.shape[1]
        lengths = here.attention_mask.long().sum(1)
        first = here.attention_mask.long().argmax(1)
        starts = torch.arange(len(lengths)) * width + first
        flat = here.input_ids.flatten()
    owner = torch.searchsorted(starts, here.row_index, right=True) - 1
    if bool((owner[1:] < owner[:-1]).any()):
        raise ValueError("rows of a batch do not lie in the order of its sequences.")
    counts = torch.bincount(owner, minlength=len(lengths)).tolist()
    places = torch.split(here.row_index + 1 - starts[owner], counts)
    return [
        TokenSequence(tuple(flat[start : start + length].tolist()), tuple(rows.tolist()))
        for start, length, rows in zip(starts.tolist(), lengths.tolist(), places, strict=True)
    ]
