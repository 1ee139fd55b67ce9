"""Sequences as a server reads them: without padding, each with the places of its rows."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from tutelage.data.batch import Batch, collate, pack
from tutelage.data.types import Prompt, Rollout
from tutelage.teachers.sequences import sequences_of

ROLLOUTS = [
    Rollout(Prompt("a", ""), 0, (5, 6, 7), (8, 9)),
    Rollout(Prompt("b", ""), 0, (5,), (6, 1, 1, 2)),
    Rollout(Prompt("c", ""), 0, (4, 4), (3,)),
]


def batches() -> dict[str, Batch]:
    sides: tuple[Literal["left", "right"], ...] = ("left", "right")
    return {side: collate(ROLLOUTS, 0, side) for side in sides} | {"packed": pack(ROLLOUTS)}


@pytest.mark.parametrize("way", ["left", "right", "packed"])
def test_every_row_is_found_at_its_place(way: str) -> None:
    batch = batches()[way]
    found = sequences_of(batch)
    assert [s.ids for s in found] == [(*r.prompt_ids, *r.completion_ids) for r in ROLLOUTS]
    tokens = [s.ids[place] for s in found for place in s.places]
    assert tokens == batch.tokens.tolist()
    assert [s.places for s in found] == [(3, 4), (1, 2, 3, 4), (2,)]


def test_rows_out_of_order_are_refused() -> None:
    batch = batches()["right"]
    changed: dict[str, Any] = {"row_index": batch.row_index.flip(0)}
    with pytest.raises(ValueError, match="order of its sequences"):
        sequences_of(Batch(**(vars(batch) | changed)))


def test_a_sequence_without_rows_has_no_places() -> None:
    batch = batches()["right"]
    keep = batch.completion != 1
    rows = {n: vars(batch)[n][keep] for n in ("row_index", "tokens", "completion", "position")}
    assert [s.places for s in sequences_of(Batch(**(vars(batch) | rows)))] == [(3, 4), (), (2,)]
    assert torch.is_tensor(batch.tokens)
