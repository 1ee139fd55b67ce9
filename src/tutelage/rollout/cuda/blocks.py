"""How a decoding step's kernels divide the vocabulary and the columns of a cache."""

from __future__ import annotations

VOCAB_BLOCK = 2048
"""Ids whose probabilities are first summed together."""
COLUMN_BLOCK = 64
"""Columns of a cache that attention reads at once."""
_MOST_COLUMNS = 2048
"""Columns of the longest split."""


def num_vocab_blocks(num_ids: int) -> int:
    """Blocks of ids that are summed before one of them is searched."""
    return -(-num_ids // VOCAB_BLOCK)


def num_splits(num_rows: int, num_groups: int, capacity: int, processors: int) -> int:
    """Splits of each row's columns: enough programs for every processor, none too long."""
    for_processors = -(-2 * processors // (num_rows * num_groups))
    for_length = -(-capacity // _MOST_COLUMNS)
    return min(max(for_processors, for_length), -(-capacity // COLUMN_BLOCK), 64)
