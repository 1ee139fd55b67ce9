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
    """x ← table[token], normed ← rms_norm(x); notes the hidden state in the row's column."""
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


@triton.jit
def add_norm(
    x, y, weight, normed, position, done, column, last, eps, width,
    BLOCK: tl.constexpr, ENDS_STEP: tl.constexpr,
):  # fmt: skip
    """x ← x + y, normed ← rms_norm(x); at the end of a step the row's next position and column.

    No kernel uses a number of a row that it changes: its warps do not wait for each other, and a
    late one would read what an early one has written.
    """
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
        tl.store(column + row, tl.load(column + row) + 1)
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


@triton.jit
def _new_token(
    base, group, q_weight, k_weight, cos, sin, eps,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Halves of a group's queries `[ROWS, DIM / 2]` and of its key `[1, DIM / 2]`; its value."""
    HALF: tl.constexpr = DIM // 2
    member = tl.arange(0, ROWS)
    half = tl.arange(0, HALF)
    q_at = base + (group * SHARE + member)[:, None] * DIM + half[None, :]
    is_member = member[:, None] < SHARE
    q_a = tl.load(q_at, mask=is_member, other=0.0)
    q_b = tl.load(q_at + HALF, mask=is_member, other=0.0)
    k_at = base + (HEADS + group) * DIM + half
    k_a = tl.load(k_at)[None, :]
    k_b = tl.load(k_at + HALF)[None, :]
    v_new = tl.load(base + (HEADS + GROUPS + group) * DIM + tl.arange(0, DIM))
    if NORM:
        qw_a = tl.load(q_weight + half).to(tl.float32)
        qw_b = tl.load(q_weight + HALF + half).to(tl.float32)
        kw_a = tl.load(k_weight + half).to(tl.float32)
        kw_b = tl.load(k_weight + HALF + half).to(tl.float32)
    else:
        qw_a, qw_b, kw_a, kw_b = cos, cos, cos, cos
    q_a, q_b = _turned(q_a, q_b, qw_a, qw_b, cos, sin, eps, DIM, NORM)
    k_a, k_b = _turned(k_a, k_b, kw_a, kw_b, cos, sin, eps, DIM, NORM)
    return q_a, q_b, k_a, k_b, v_new


@triton.jit
def _read(
    q_a, q_b, keys, values, top, total, acc, begin, end, scale,
    DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax over columns begin to end, added to what has been read (online softmax)."""
    HALF: tl.constexpr = DIM // 2
    half = tl.arange(0, HALF)
    dim = tl.arange(0, DIM)
    for at in range(begin, end, BLOCK):
        col = at + tl.arange(0, BLOCK)
        filled = col < end
        key_at = keys + col[None, :] * DIM + half[:, None]
        block_a = tl.load(key_at, mask=filled[None, :], other=0.0)
        block_b = tl.load(key_at + HALF, mask=filled[None, :], other=0.0)
        s = tl.dot(q_a, block_a, input_precision=PRECISION)
        s = tl.dot(q_b, block_b, s, input_precision=PRECISION) * scale
        s = tl.where(filled[None, :], s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        fade = tl.exp(top - new_top)
        p = tl.exp(s - new_top[:, None])
        value_at = values + col[:, None] * DIM + dim[None, :]
        block_v = tl.load(value_at, mask=filled[:, None], other=0.0)
        total = total * fade + tl.sum(p, 1)
        acc = acc * fade[:, None]
        acc = tl.dot(p.to(block_v.dtype), block_v, acc, input_precision=PRECISION)
        top = new_top
    return top, total, acc


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
    pos, is_done = tl.load(position + row), tl.load(done + row)
    member = tl.arange(0, ROWS)
    half = tl.arange(0, HALF)
    dim = tl.arange(0, DIM)
    cos = tl.load(cos_table + pos.to(tl.int64) * HALF + half)
    sin = tl.load(sin_table + pos.to(tl.int64) * HALF + half)
    base = qkv + row * ((HEADS + 2 * GROUPS) * DIM)
    q_a, q_b, k_a, k_b, v_new = _new_token(
        base, group, q_weight, k_weight, cos, sin, eps, HEADS, GROUPS, SHARE, ROWS, DIM, NORM
    )

    start = tl.load(slot + row).to(tl.int64) * slot_stride + group.to(tl.int64) * capacity * DIM
    writes = 1 - tl.where(part == 0, is_done, 1)
    new_at = start + pos.to(tl.int64) * DIM
    half_mask = half[None, :] < HALF * writes
    tl.store(keys + new_at + half[None, :], k_a, mask=half_mask)
    tl.store(keys + new_at + HALF + half[None, :], k_b, mask=half_mask)
    tl.store(values + new_at + dim, v_new, mask=dim < DIM * writes)

    score = tl.sum(q_a.to(tl.float32) * k_a.to(tl.float32), 1)
    first = part == 0
    top = (score + tl.sum(q_b.to(tl.float32) * k_b.to(tl.float32), 1)) * scale
    top = tl.where(first, top, -float("inf"))
    total = tl.zeros([ROWS], tl.float32) + tl.where(first, 1.0, 0.0)
    acc = tl.zeros([ROWS, DIM], tl.float32) + tl.where(first, v_new.to(tl.float32), 0.0)[None, :]

    low = 0
    if WINDOW:
        low = tl.maximum(pos + 1 - window, 0)
    num = (pos - low) * (1 - is_done)
    chunk = tl.cdiv(tl.cdiv(num, splits), BLOCK) * BLOCK
    begin = low + part * chunk
    end = tl.minimum(begin + chunk, low + num)
    top, total, acc = _read(
        q_a, q_b, keys + start, values + start, top, total, acc, begin, end, scale,
        DIM, BLOCK, PRECISION,
    )  # fmt: skip

    is_member = member[:, None] < SHARE
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
