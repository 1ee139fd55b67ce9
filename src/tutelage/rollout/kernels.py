"""Triton kernels of one decoding step; `operators.py` states the same operations in torch.

Row r of a step is one completion. Everything that changes from step to step (its slot, position,
column, whether it is done) is read from device memory, so one captured graph serves every step.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def embed_norm(
    token, table, weight, x, normed, hidden, column, states,
    eps, width, table_stride, columns,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """x ← table[token], normed ← rms_norm(x); notes the hidden state; the row's next column."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    here = tl.load(table + tl.load(token + row) * table_stride + at, mask=inside, other=0.0)
    tl.store(x + row * width + at, here, mask=inside)
    wide = here.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    rounded = (wide * scale).to(here.dtype).to(tl.float32)
    tl.store(normed + row * width + at, (rounded * w).to(here.dtype), mask=inside)
    now = tl.load(column + row)
    state = tl.load(hidden + row * width + at, mask=inside)
    tl.store(states + (row * columns + now) * width + at, state, mask=inside)
    tl.store(column + row, now + 1)


@triton.jit
def add_norm(
    x, y, weight, normed, position, done, last, eps, width,
    BLOCK: tl.constexpr, ENDS_STEP: tl.constexpr,
):  # fmt: skip
    """x ← x + y, normed ← rms_norm(x); at the end of a step the row's next position."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    before = tl.load(x + row * width + at, mask=inside, other=0.0)
    added = tl.load(y + row * width + at, mask=inside, other=0.0)
    here = (before.to(tl.float32) + added.to(tl.float32)).to(before.dtype)
    wide = here.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    rounded = (wide * scale).to(here.dtype).to(tl.float32)
    tl.store(normed + row * width + at, (rounded * w).to(here.dtype), mask=inside)
    if ENDS_STEP:
        now = tl.load(position + row)
        is_done = tl.load(done + row)
        tl.store(position + row, tl.where(is_done != 0, now, tl.minimum(now + 1, last)))
    else:
        tl.store(x + row * width + at, here, mask=inside)


@triton.jit
def swiglu(gate_up, out, width, BLOCK: tl.constexpr):
    """out ← silu(gate) · up, for gate and up side by side."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    opened = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out + row * width + at, (opened * up.to(tl.float32)).to(gate.dtype), mask=inside)


@triton.jit
def _turned(a, b, a_weight, b_weight, cos, sin, eps, DIM: tl.constexpr, NORM: tl.constexpr):
    """The two halves `[M, DIM / 2]` of heads, normed and turned by their rotary angle."""
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    if NORM:
        square = tl.sum(wide_a * wide_a, 1) + tl.sum(wide_b * wide_b, 1)
        scale = tl.rsqrt(square / DIM + eps)[:, None]
        wide_a = (wide_a * scale).to(a.dtype).to(tl.float32) * a_weight[None, :]
        wide_b = (wide_b * scale).to(a.dtype).to(tl.float32) * b_weight[None, :]
        wide_a, wide_b = wide_a.to(a.dtype).to(tl.float32), wide_b.to(a.dtype).to(tl.float32)
    turned_a = wide_a * cos[None, :] - wide_b * sin[None, :]
    turned_b = wide_b * cos[None, :] + wide_a * sin[None, :]
    return turned_a.to(a.dtype), turned_b.to(a.dtype)


@triton.jit(do_not_specialize=["splits", "window"])
def attend(
    qkv, keys, values, out, part_out, part_max, part_sum,
    cos_table, sin_table, q_weight, k_weight, slot, position, done,
    scale, eps, slot_stride, capacity, window, splits,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, WINDOW: tl.constexpr,
    DIRECT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Norm and rotary of the new token, its cache write, and attention over the filled columns.

    One program a row, group of heads that share keys, and split of the filled columns. The new
    token's own key and value never come from the cache: split 0 starts with them.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    part = tl.program_id(2)
    HALF: tl.constexpr = DIM // 2
    pos = tl.load(position + row)
    is_done = tl.load(done + row)
    member = tl.arange(0, ROWS)
    half = tl.arange(0, HALF)
    dim = tl.arange(0, DIM)
    cos = tl.load(cos_table + pos.to(tl.int64) * HALF + half)
    sin = tl.load(sin_table + pos.to(tl.int64) * HALF + half)
    base = qkv + row * ((HEADS + 2 * GROUPS) * DIM)
    q_at = base + (group * SHARE + member)[:, None] * DIM + half[None, :]
    is_member = member[:, None] < SHARE
    q_a = tl.load(q_at, mask=is_member, other=0.0)
    q_b = tl.load(q_at + HALF, mask=is_member, other=0.0)
    k_at = base + (HEADS + group) * DIM + half
    k_a = tl.load(k_at)[None, :]
    k_b = tl.load(k_at + HALF)[None, :]
    v_new = tl.load(base + (HEADS + GROUPS + group) * DIM + dim)
    if NORM:
        qw_a = tl.load(q_weight + half).to(tl.float32)
        qw_b = tl.load(q_weight + HALF + half).to(tl.float32)
        kw_a = tl.load(k_weight + half).to(tl.float32)
        kw_b = tl.load(k_weight + HALF + half).to(tl.float32)
    else:
        qw_a, qw_b, kw_a, kw_b = cos, cos, cos, cos
    q_a, q_b = _turned(q_a, q_b, qw_a, qw_b, cos, sin, eps, DIM, NORM)
    k_a, k_b = _turned(k_a, k_b, kw_a, kw_b, cos, sin, eps, DIM, NORM)

    start = tl.load(slot + row).to(tl.int64) * slot_stride + group.to(tl.int64) * capacity * DIM
    writes_not = tl.where(part == 0, is_done, 1)
    new_at = start + pos.to(tl.int64) * DIM
    half_mask = half[None, :] < HALF * (1 - writes_not)
    tl.store(keys + new_at + half[None, :], k_a, mask=half_mask)
    tl.store(keys + new_at + HALF + half[None, :], k_b, mask=half_mask)
    tl.store(values + new_at + dim, v_new, mask=dim < DIM * (1 - writes_not))

    score = tl.sum(q_a.to(tl.float32) * k_a.to(tl.float32), 1)
    score = (score + tl.sum(q_b.to(tl.float32) * k_b.to(tl.float32), 1)) * scale
    first = part == 0
    top = tl.where(first, score, -float("inf"))
    total = tl.zeros([ROWS], tl.float32) + tl.where(first, 1.0, 0.0)
    acc = tl.zeros([ROWS, DIM], tl.float32) + tl.where(first, v_new.to(tl.float32), 0.0)[None, :]

    low = 0
    if WINDOW:
        low = tl.maximum(pos + 1 - window, 0)
    num = tl.where(is_done != 0, 0, pos - low)
    chunk = tl.cdiv(tl.cdiv(num, splits), BLOCK) * BLOCK
    begin = low + part * chunk
    end = tl.minimum(begin + chunk, low + num)
    key_start = keys + start
    value_start = values + start
    for at in range(begin, end, BLOCK):
        col = at + tl.arange(0, BLOCK)
        filled = col < end
        key_at = key_start + col[None, :] * DIM + half[:, None]
        block_a = tl.load(key_at, mask=filled[None, :], other=0.0)
        block_b = tl.load(key_at + HALF, mask=filled[None, :], other=0.0)
        s = tl.dot(q_a, block_a, input_precision=PRECISION)
        s = tl.dot(q_b, block_b, s, input_precision=PRECISION) * scale
        s = tl.where(filled[None, :], s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        fade = tl.exp(top - new_top)
        p = tl.exp(s - new_top[:, None])
        block_v = tl.load(
            value_start + col[:, None] * DIM + dim[None, :], mask=filled[:, None], other=0.0
        )
        total = total * fade + tl.sum(p, 1)
        acc = acc * fade[:, None]
        acc = tl.dot(p.to(block_v.dtype), block_v, acc, input_precision=PRECISION)
        top = new_top

    head = group * SHARE + member
    if DIRECT:
        out_at = out + row * (HEADS * DIM) + head[:, None] * DIM + dim[None, :]
        tl.store(out_at, (acc / total[:, None]).to(q_a.dtype), mask=is_member)
    else:
        part_at = (row * HEADS + head) * splits + part
        tl.store(part_out + part_at[:, None] * DIM + dim[None, :], acc, mask=is_member)
        tl.store(part_max + part_at, top, mask=member < SHARE)
        tl.store(part_sum + part_at, total, mask=member < SHARE)


@triton.jit(do_not_specialize=["splits"])
def join_splits(part_out, part_max, part_sum, out, splits, SPLITS: tl.constexpr, DIM: tl.constexpr):
    """The attention of a head from that of its splits; the first always holds the new token."""
    head = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SPLITS)
    dim = tl.arange(0, DIM)
    inside = part < splits
    top = tl.load(part_max + head * splits + part, mask=inside, other=-float("inf"))
    share = tl.exp(top - tl.max(top, 0))
    total = tl.sum(tl.load(part_sum + head * splits + part, mask=inside, other=0.0) * share, 0)
    acc = tl.load(
        part_out + (head * splits + part)[:, None] * DIM + dim[None, :],
        mask=inside[:, None], other=0.0,
    )  # fmt: skip
    joined = tl.sum(acc * share[:, None], 0) / total
    tl.store(out + head * DIM + dim, joined.to(out.dtype.element_ty))


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
def pick(
    logits, block_max, block_sum, block_best, uniform, stops,
    token, tokens, logprobs, column, done,
    temperature, stride, num_ids, num_blocks, columns,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STOPS: tl.constexpr, GREEDY: tl.constexpr,
):  # fmt: skip
    """The first id whose cumulative weight exceeds u times the total; or the likeliest one."""
    row = tl.program_id(0).to(tl.int64)
    which = tl.arange(0, BLOCKS)
    real = which < num_blocks
    tops = tl.load(block_max + row * num_blocks + which, mask=real, other=-float("inf"))
    sums = tl.load(block_sum + row * num_blocks + which, mask=real, other=0.0)
    top = tl.max(tops, 0)
    weight = sums.to(tl.float64) * tl.exp(tops - top)
    weight = tl.where((tops == -float("inf")) & (sums == 0.0), 0.0, weight)
    weight = tl.where(real, weight, 0.0)
    total = tl.sum(weight, 0)
    if GREEDY:
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
def pick_filtered(
    logits, block_max, block_sum, uniform, stops,
    token, tokens, logprobs, column, done,
    temperature, stride, num_ids, num_blocks, columns, top_k, top_p,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STOPS: tl.constexpr,
    KEEPS_K: tl.constexpr, KEEPS_P: tl.constexpr,
):  # fmt: skip
    """The same among the top-k and then the top-p set; ties are broken by the smaller id.

    The smallest logit that is kept is found by bisection over the integers that order floats.
    """
    row = tl.program_id(0).to(tl.int64)
    which = tl.arange(0, BLOCKS)
    real = which < num_blocks
    tops = tl.load(block_max + row * num_blocks + which, mask=real, other=-float("inf"))
    sums = tl.load(block_sum + row * num_blocks + which, mask=real, other=0.0)
    top = tl.max(tops, 0)
    weight = sums.to(tl.float64) * tl.exp(tops - top)
    weight = tl.where((tops == -float("inf")) & (sums == 0.0), 0.0, weight)
    total = tl.sum(tl.where(real, weight, 0.0), 0)
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


@triton.jit
def _unranked(key):
    """The float32 that `_ranked` maps to a key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
