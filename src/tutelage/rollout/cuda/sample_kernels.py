"""Triton kernels that draw one token a row: a two-level inverse CDF, with filters or without."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_sums(
    logits, block_max, block_sum, block_best, temperature, stride, num_ids, num_blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each block of ids: the largest logit, its first id, and the sum of exponentials."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_ids
    z = tl.load(logits + row * stride + at, mask=inside, other=-float("inf")) / temperature
    top = tl.max(z, 0)
    best = tl.min(tl.where((z == top) & inside, at, num_ids), 0)
    # A block of minus infinities has no share; a NaN stays one.
    weight = tl.where(z == -float("inf"), 0.0, tl.exp(z - top))
    tl.store(block_max + row * num_blocks + block, top)
    tl.store(block_sum + row * num_blocks + block, tl.sum(weight, 0))
    tl.store(block_best + row * num_blocks + block, best)


@triton.jit
def _note(
    row, picked, logprob, stops, token, tokens, logprobs, column, done, columns,
    STOPS: tl.constexpr,
):  # fmt: skip
    """Record a row's token and its log-probability; a stop token ends the row."""
    now = tl.load(column + row)
    tl.store(token + row, picked)
    tl.store(tokens + row * columns + now, picked)
    tl.store(logprobs + row * columns + now, logprob)
    stop = tl.load(stops + tl.arange(0, STOPS))
    is_stop = tl.max((stop == picked).to(tl.int32), 0)
    tl.store(done + row, tl.maximum(tl.load(done + row), is_stop))


@triton.jit
def _by_block(block_max, block_sum, row, num_blocks, BLOCKS: tl.constexpr):
    """The largest logit of each block and of all, the weight of each block, and of all."""
    which = tl.arange(0, BLOCKS)
    real = which < num_blocks
    tops = tl.load(block_max + row * num_blocks + which, mask=real, other=-float("inf"))
    sums = tl.load(block_sum + row * num_blocks + which, mask=real, other=0.0)
    top = tl.max(tops, 0)
    weight = sums.to(tl.float64) * tl.exp(tops - top)
    weight = tl.where((tops == -float("inf")) & (sums == 0.0), 0.0, weight)
    weight = tl.where(real, weight, 0.0)
    return tops, top, weight, tl.sum(weight, 0)


@triton.jit
def sample(
    logits, block_max, block_sum, block_best, uniform, stops,
    token, tokens, logprobs, column, done,
    temperature, stride, num_ids, num_blocks, columns,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STOPS: tl.constexpr, GREEDY: tl.constexpr,
):  # fmt: skip
    """The first id whose cumulative weight exceeds u times the total; or the likeliest one."""
    row = tl.program_id(0).to(tl.int64)
    which = tl.arange(0, BLOCKS)
    tops, top, weight, total = _by_block(block_max, block_sum, row, num_blocks, BLOCKS)
    if GREEDY:
        real = which < num_blocks
        best = tl.load(block_best + row * num_blocks + which, mask=real, other=0)
        picked = tl.min(tl.where((tops == top) & real, best, num_ids - 1), 0)
        picked = tl.minimum(picked, num_ids - 1)
    else:
        threshold = tl.load(uniform + row * columns + tl.load(column + row)) * total
        block = tl.sum((tl.cumsum(weight, 0) <= threshold).to(tl.int32), 0)
        # The last block with any weight ends the row.
        block = tl.minimum(block, tl.max(tl.where(weight > 0, which, 0), 0))
        rest = threshold - tl.sum(tl.where(which < block, weight, 0.0), 0)
        inner = tl.arange(0, BLOCK)
        at = block * BLOCK + inner
        z = tl.load(logits + row * stride + at, mask=at < num_ids, other=-float("inf"))
        share = tl.where(z == -float("inf"), 0.0, tl.exp(z / temperature - top)).to(tl.float64)
        index = tl.sum((tl.cumsum(share, 0) <= rest).to(tl.int32), 0)
        # The two ways of adding up may differ in the last bit.
        index = tl.minimum(index, tl.max(tl.where(share > 0, inner, 0), 0))
        picked = block * BLOCK + index
    chosen = tl.load(logits + row * stride + picked) / temperature
    logprob = (chosen - top) - tl.log(total).to(tl.float32)
    _note(row, picked.to(tl.int64), logprob, stops, token, tokens, logprobs, column, done, columns,
          STOPS)  # fmt: skip


@triton.jit
def _ranked(z):
    """A 32-bit integer that orders like the float32 z; both zeros are one."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _unranked(key):
    """The float32 that `_ranked` maps to a key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _above(logits, row, stride, num_ids, key, temperature, top, BLOCK: tl.constexpr):
    """Number and weight of the ids that rank above a key, and of those at it."""
    more = tl.zeros((), tl.int32)
    ties = tl.zeros((), tl.int32)
    mass = tl.zeros((), tl.float64)
    for start in range(0, num_ids, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(logits + row * stride + at, mask=at < num_ids, other=-float("inf"))
        z = z / temperature
        rank = _ranked(z)
        is_above = (rank > key) & (at < num_ids)
        more += tl.sum(is_above.to(tl.int32), 0)
        ties += tl.sum(((rank == key) & (at < num_ids)).to(tl.int32), 0)
        mass += tl.sum(tl.where(is_above, tl.exp(z - top), 0.0), 0).to(tl.float64)
    return more, ties, mass


@triton.jit
def _kept(
    logits, row, stride, num_ids, temperature, top, total, top_k, top_p,
    BLOCK: tl.constexpr, KEEPS_K: tl.constexpr, KEEPS_P: tl.constexpr,
):  # fmt: skip
    """The lowest key that may be drawn, how many of its ids may be, and the weight of all.

    The key is found by bisection over the integers that order floats.
    """
    highest = _ranked(top).to(tl.int64)
    lowest = _ranked(tl.full((), -float("inf"), tl.float32)).to(tl.int64)
    key = lowest.to(tl.int32)
    mass = total  # of all ids that may be drawn
    limit = tl.full((), 0, tl.int32) + num_ids  # of the ids that rank at the key, so many are kept
    if KEEPS_K:
        # The smallest key with fewer than top_k ids above it is the k-th largest.
        low, high = lowest, highest
        while low < high:
            middle = (low + high) >> 1
            probe = middle.to(tl.int32)
            larger, _ties_k, _mass_k = _above(
                logits, row, stride, num_ids, probe, temperature, top, BLOCK
            )
            low = tl.where(larger < top_k, low, middle + 1)
            high = tl.where(larger < top_k, middle, high)
        key = low.to(tl.int32)
        more, ties, mass = _above(logits, row, stride, num_ids, key, temperature, top, BLOCK)
        limit = tl.minimum(ties, top_k - more)
        mass += limit * tl.exp(_unranked(key) - top).to(tl.float64)
    if KEEPS_P:
        # The smallest key above which less than top_p of the mass lies is the last that is kept.
        goal = tl.load(top_p) * mass
        low, high = key.to(tl.int64), highest
        while low < high:
            middle = (low + high) >> 1
            probe = middle.to(tl.int32)
            _larger, _ties_p, above = _above(
                logits, row, stride, num_ids, probe, temperature, top, BLOCK
            )
            low = tl.where(above < goal, low, middle + 1)
            high = tl.where(above < goal, middle, high)
        lowest_kept = low.to(tl.int32)
        more, ties, mass = _above(
            logits, row, stride, num_ids, lowest_kept, temperature, top, BLOCK
        )
        each = tl.exp(_unranked(lowest_kept) - top).to(tl.float64)
        needed = tl.ceil((goal - mass) / each)
        fits = tl.where(lowest_kept == key, limit, ties).to(tl.float64)
        limit = tl.minimum(fits, needed).to(tl.int32)
        key = lowest_kept
        mass += limit * each
    return key, limit, mass


@triton.jit
def sample_filtered(
    logits, block_max, block_sum, uniform, stops,
    token, tokens, logprobs, column, done,
    temperature, stride, num_ids, num_blocks, columns, top_k, top_p,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STOPS: tl.constexpr,
    KEEPS_K: tl.constexpr, KEEPS_P: tl.constexpr,
):  # fmt: skip
    """The same among the top-k and then the top-p set; ties are broken by the smaller id."""
    row = tl.program_id(0).to(tl.int64)
    _tops, top, _weight, total = _by_block(block_max, block_sum, row, num_blocks, BLOCKS)
    key, limit, mass = _kept(
        logits, row, stride, num_ids, temperature, top, total, top_k, top_p,
        BLOCK, KEEPS_K, KEEPS_P,
    )  # fmt: skip
    threshold = tl.load(uniform + row * columns + tl.load(column + row)) * mass
    # One walk over the ids in their order: the first whose cumulative weight exceeds it.
    before = tl.zeros((), tl.float64)
    seen = tl.zeros((), tl.int32)
    picked = tl.full((), -1, tl.int32)
    last = tl.zeros((), tl.int32)
    for start in range(0, num_ids, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(logits + row * stride + at, mask=at < num_ids, other=-float("inf"))
        z = z / temperature
        rank = _ranked(z)
        is_tie = ((rank == key) & (at < num_ids)).to(tl.int32)
        order = seen + tl.cumsum(is_tie, 0)
        kept = ((rank > key) | ((is_tie == 1) & (order <= limit))) & (at < num_ids)
        share = tl.where(kept & (z != -float("inf")), tl.exp(z - top), 0.0).to(tl.float64)
        sum_here = tl.sum(share, 0)
        passed = (before + tl.cumsum(share, 0) > threshold) & (share > 0)
        found = tl.min(tl.where(passed, at, num_ids), 0)
        picked = tl.where((picked < 0) & (found < num_ids), found, picked)
        last = tl.maximum(last, tl.max(tl.where(share > 0, at, 0), 0))
        before += sum_here
        seen += tl.sum(is_tie, 0)
    picked = tl.where(picked < 0, last, picked)
    chosen = tl.load(logits + row * stride + picked) / temperature
    logprob = (chosen - top) - tl.log(total).to(tl.float32)
    _note(row, picked.to(tl.int64), logprob, stops, token, tokens, logprobs, column, done, columns,
          STOPS)  # fmt: skip
