"""Rows against a naive oracle, and by perturbing one logit at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.data.batch import (
    Batch,
    Side,
    _cuts,
    collate,
    length_groups,
    micro_batches,
    pack,
    packed_groups,
)
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import DataError

EOS = 2
PAD = EOS  # the worst case: padding looks like the end of a completion

ids = st.integers(min_value=0, max_value=5)  # includes EOS, in prompts too
rollouts = st.builds(
    lambda prompt, completion: Rollout(Prompt("p", "p"), 0, tuple(prompt), tuple(completion)),
    st.lists(ids, min_size=1, max_size=5),
    st.lists(ids, max_size=5),
)
ragged = st.lists(rollouts, max_size=5)
sides = st.sampled_from(["left", "right"])


def rollout(prompt: list[int], completion: list[int]) -> Rollout:
    return Rollout(Prompt("p", "p"), 0, tuple(prompt), tuple(completion))


def expected_rows(batch: list[Rollout], side: Side, first: int) -> list[tuple[int, int, int, int]]:
    """(flat index of the predicting position, token, completion, position), one loop at a time."""
    width = max((len(r.prompt_ids) + len(r.completion_ids) for r in batch), default=0)
    rows = []
    for b, r in enumerate(batch):
        pad = width - len(r.prompt_ids) - len(r.completion_ids) if side == "left" else 0
        for i, token in enumerate(r.completion_ids):
            rows.append((b * width + pad + len(r.prompt_ids) + i - 1, token, first + b, i))
    return rows


def rows_of(batch: Batch) -> list[tuple[int, ...]]:
    columns = (batch.row_index, batch.tokens, batch.completion, batch.position)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@given(ragged, sides, st.integers(0, 7))
def test_rows_equal_a_naive_loop(batch: list[Rollout], side: Side, first: int) -> None:
    assert rows_of(collate(batch, PAD, side, range(first, first + len(batch)))) == expected_rows(
        batch, side, first
    )


@given(ragged, sides, st.sampled_from([PAD, 0, 5]))
def test_mask_recovers_every_sequence_whatever_the_pad_id(
    batch: list[Rollout], side: Side, pad: int
) -> None:
    collated = collate(batch, pad, side)
    for b, r in enumerate(batch):
        real = collated.attention_mask[b].bool()
        sequence = [*r.prompt_ids, *r.completion_ids]
        assert collated.input_ids[b][real].tolist() == sequence
        assert collated.position_ids[b][real].tolist() == list(range(len(sequence)))
        assert (collated.input_ids[b][~real] == pad).all()
        assert real.nonzero().flatten().diff().eq(1).all()  # one block, no holes


@settings(max_examples=25)
@given(st.lists(rollouts, min_size=1, max_size=3), sides)
def test_bumping_one_logit_moves_exactly_the_row_it_predicts(
    batch: list[Rollout], side: Side
) -> None:
    collated = collate(batch, PAD, side)
    torch.manual_seed(0)
    logits = torch.randn(*collated.input_ids.shape, 6, dtype=torch.float64)

    def losses(values: torch.Tensor) -> torch.Tensor:
        log_p = collated.flatten(values).log_softmax(-1)
        return -log_p.gather(1, collated.tokens[:, None]).squeeze(1)

    before = losses(logits)
    predicts = {flat: n for n, (flat, *_) in enumerate(expected_rows(batch, side, 0))}
    for flat in range(collated.input_ids.numel()):
        bumped = logits.clone()
        bumped.flatten(0, 1)[flat, 3] += 1.0  # a shift of all logits would be no change at all
        moved = (losses(bumped) != before).nonzero().flatten().tolist()
        assert moved == ([predicts[flat]] if flat in predicts else [])


def test_the_stopping_token_and_the_last_prompt_position_count() -> None:
    batch = collate([rollout([EOS, 1], [4, EOS])], PAD)
    assert batch.tokens.tolist() == [4, EOS]
    assert batch.row_index.tolist() == [1, 2]


def test_flatten_keeps_the_gradient_of_used_positions_only() -> None:
    batch = collate([rollout([1, 1], [3]), rollout([1], [])], PAD)
    hidden = torch.ones(2, 3, 4, requires_grad=True)
    batch.flatten(hidden).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.sum(-1).nonzero().tolist() == [[0, 1]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch", [[], [rollout([1], [])], [rollout([1, 2], []), rollout([1], [])]])
def test_no_completion_tokens_give_no_rows(batch: list[Rollout], side: Side) -> None:
    collated = collate(batch, PAD, side)
    assert collated.num_rows == 0
    assert collated.flatten(torch.zeros(*collated.input_ids.shape, 4)).shape == (0, 4)


@given(ragged, st.integers(1, 6), sides, st.integers(0, 30))
def test_micro_batches_hold_the_same_rows_as_one_batch(
    batch: list[Rollout], size: int, side: Side, max_tokens: int
) -> None:
    parts = micro_batches(batch, size, PAD, side, max_tokens)
    areas = [part.input_ids.numel() for part in parts if len(part.input_ids) > 1]
    assert not max_tokens or all(area <= max_tokens for area in areas)
    whole = collate(batch, PAD, side)
    for name in ("tokens", "completion", "position"):
        joined = [value for part in parts for value in getattr(part, name).tolist()]
        assert joined == getattr(whole, name).tolist()
    assert all(len(part.input_ids) <= size for part in parts)


def test_to_moves_every_tensor() -> None:
    moved = collate([rollout([1], [2])], PAD).to("meta")
    tensors = [x for x in vars(moved).values() if isinstance(x, torch.Tensor)]
    assert len(tensors) == 7
    packed = pack([rollout([1], [2])]).to("meta")
    assert packed.packed is not None
    tensors += [packed.packed.starts, packed.input_ids]
    assert {t.device.type for t in tensors} == {"meta"}


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="'p' has no tokens"):
        collate([rollout([], [1])], PAD)


def test_micro_batch_size_zero_is_refused() -> None:
    with pytest.raises(DataError, match="at least 1, got 0"):
        micro_batches([rollout([1], [1])], 0, PAD)


@given(ragged.filter(bool))
def test_a_packed_row_is_a_rectangle_without_its_padding(batch: list[Rollout]) -> None:
    flat, packed = collate(batch, PAD), pack(batch)
    sequences = [(*r.prompt_ids, *r.completion_ids) for r in batch]
    assert packed.input_ids.tolist() == [[token for ids in sequences for token in ids]]
    assert packed.attention_mask.min() == 1
    assert packed.position_ids.tolist() == [[i for ids in sequences for i in range(len(ids))]]
    assert packed.packed is not None
    assert packed.packed.lengths == tuple(map(len, sequences))
    assert packed.packed.starts.diff().tolist() == list(packed.packed.lengths)
    assert packed.num_sequences == flat.num_sequences == len(batch)
    for name in ("tokens", "completion", "position"):
        assert torch.equal(getattr(packed, name), getattr(flat, name))
    # a row's place holds the token before the one that it predicts
    before = [
        t for r in batch for t in (*r.prompt_ids, *r.completion_ids)[len(r.prompt_ids) - 1 : -1]
    ]
    assert packed.input_ids[0, packed.row_index].tolist() == before


lengths = st.lists(st.integers(1, 30), max_size=20)


@given(lengths, st.integers(0, 60), st.integers(1, 8), st.integers(1, 25))
def test_packed_groups_hold_every_sequence_once_within_their_limits(
    sizes: list[int], max_tokens: int, max_size: int, at_least: int
) -> None:
    groups = packed_groups(sizes, max_tokens, max_size, at_least)
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    assert len(groups) >= min(at_least, len(sizes))
    for group in groups:
        assert len(group) <= max_size
        assert len(group) == 1 or not max_tokens or sum(sizes[i] for i in group) <= max_tokens
    if max_tokens and at_least == 1:  # no two rows that would fit into one
        open_rows = [sum(sizes[i] for i in g) for g in groups if 2 * len(g) <= max_size]
        assert all(a + b > max_tokens for i, a in enumerate(open_rows) for b in open_rows[:i])


@given(lengths, st.integers(0, 60), st.integers(1, 8), st.integers(1, 25))
def test_groups_hold_every_sequence_once_within_their_limits(
    sizes: list[int], max_tokens: int, max_size: int, at_least: int
) -> None:
    groups = length_groups(sizes, max_tokens, max_size, at_least)
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    assert len(groups) >= min(at_least, len(sizes))
    for group in groups:
        area = len(group) * max(sizes[i] for i in group)
        assert len(group) <= max_size
        assert len(group) == 1 or not max_tokens or area <= max_tokens
    order = [sizes[i] for group in groups for i in group]
    assert order == sorted(sizes, reverse=True)


def test_neighbours_in_length_waste_little_where_their_order_wastes_most() -> None:
    """Geometric lengths, mean a quarter of the longest: nearly no padding instead of two thirds."""
    torch.manual_seed(0)
    sizes = torch.distributions.Geometric(1 / 64).sample((128,)).clamp(1, 256).long().tolist()

    def area(groups: list[list[int]]) -> int:
        return sum(len(group) * max(sizes[i] for i in group) for group in groups)

    in_order = [list(range(i, i + 8)) for i in range(0, 128, 8)]
    assert area(in_order) > 2.0 * sum(sizes)
    assert area(length_groups(sizes, 1024, 128)) < 1.1 * sum(sizes)


class Counting(list[int]):
    """A list that counts how often it is read."""

    num_reads = 0

    def __getitem__(self, place: Any) -> Any:
        self.num_reads += 1
        return super().__getitem__(place)


@pytest.mark.parametrize("max_tokens", [0, 64, 65536])
def test_grouping_reads_each_length_a_few_times_however_large_a_group_may_be(
    max_tokens: int,
) -> None:
    widths = Counting(sorted((20 + 7919 * i % 997 for i in range(4000)), reverse=True))
    cuts = _cuts(widths, max_tokens, max_size=2000)
    assert cuts[0][0] == 0
    assert cuts[-1][1] == len(widths)
    assert widths.num_reads < 20 * len(widths)


@given(
    st.lists(st.integers(1, 30), max_size=7), st.sampled_from([0, 16, 32, 64]), st.integers(1, 4)
)
def test_no_other_cut_of_the_sorted_lengths_costs_less(
    sizes: list[int], max_tokens: int, max_size: int
) -> None:
    def cost(groups: list[list[int]]) -> float:
        each = (max_tokens or 4096) // 16
        return sum(len(group) * max(group) + each for group in groups)

    def every_way(rest: list[int]) -> list[list[list[int]]]:
        ways = [[]] if not rest else []
        for n in range(1, min(max_size, len(rest)) + 1):
            if n == 1 or not max_tokens or n * rest[0] <= max_tokens:
                ways += [[rest[:n], *way] for way in every_way(rest[n:])]
        return ways

    found = [[sizes[i] for i in group] for group in length_groups(sizes, max_tokens, max_size)]
    assert cost(found) == min(map(cost, every_way(sorted(sizes, reverse=True))))
