"""Triton kernels for what only some rules and objectives need of a row."""

from __future__ import annotations

import triton
import triton.language as tl

from tutelage.core.kernels.rows import _exp, _logits, _over_mixture


@triton.jit(do_not_specialize=["out_stride"])
def segments_kernel(
    logits,
    bias,
    out,
    vocab_size,
    num_segments,
    num_blocks,
    stride,
    out_stride,
    scale,
    cap,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    CAP: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest logit of every segment of a row, `BLOCK` segments at a time."""
    program = tl.program_id(0)
    row = program // num_blocks
    segment = (program % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    v = segment[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    is_id = v < vocab_size
    x = tl.load(logits + row.to(tl.int64) * stride + v, mask=is_id, other=0.0)
    x = _logits(x, bias, v, is_id, scale, cap, BIAS, SCALED, CAP)
    tl.store(out + row * out_stride + segment, tl.max(x, 1), mask=segment < num_segments)


@triton.jit(do_not_specialize=["aux_stride"])
def mixture_kernel(
    student,
    teacher,
    student_bias,
    teacher_bias,
    aux,
    value,
    mean,
    vocab_size,
    stride,
    aux_stride,
    student_scale,
    teacher_scale,
    student_cap,
    teacher_cap,
    w,
    JSD: tl.constexpr,
    STUDENT_BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    STUDENT_SCALED: tl.constexpr,
    TEACHER_SCALED: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Divergence to m = (1 − w) p + w q of one row (float64), and E_p of its slope (float32).

    The Jensen-Shannon divergence with slope log(p/m), or KL(p‖m) with slope
    log(p/m) − (1 − w) p/m.
    """
    row = tl.program_id(0)
    s_row = student + row.to(tl.int64) * stride
    t_row = teacher + row.to(tl.int64) * stride
    table = aux + row
    s_top = tl.load(table)
    t_top = tl.load(table + aux_stride)
    s_inverse = tl.load(table + 2 * aux_stride)
    t_inverse = tl.load(table + 3 * aux_stride)
    offset = tl.load(table + 5 * aux_stride)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    slope = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        v = start + lanes
        is_id = v < vocab_size
        s = tl.load(s_row + v, mask=is_id, other=0.0)
        s = _logits(
            s, student_bias, v, is_id, student_scale, student_cap,
            STUDENT_BIAS, STUDENT_SCALED, STUDENT_CAP,
        )  # fmt: skip
        t = tl.load(t_row + v, mask=is_id, other=0.0)
        t = _logits(
            t, teacher_bias, v, is_id, teacher_scale, teacher_cap,
            TEACHER_BIAS, TEACHER_SCALED, TEACHER_CAP,
        )  # fmt: skip
        s = s - s_top
        t = t - t_top
        p = _exp(s) * s_inverse
        q = _exp(t) * t_inverse
        p_over, q_over = _over_mixture((s - t) - offset, w)
        p_over = tl.where(p == 0.0, 0.0, p_over)
        if JSD:
            q_over = tl.where(q == 0.0, 0.0, q_over)
            total += (1.0 - w) * p * p_over + w * q * q_over
            slope += p * p_over
        else:
            total += p * p_over
            slope += p * (p_over - (1.0 - w) * tl.exp(p_over))
    tl.store(value + row, tl.sum(total, 0).to(tl.float64))
    tl.store(mean + row, tl.sum(slope, 0))


@triton.jit(do_not_specialize=["aux_stride", "out_stride"])
def moments_kernel(
    student,
    teacher,
    student_bias,
    teacher_bias,
    aux,
    out,
    vocab_size,
    stride,
    aux_stride,
    out_stride,
    student_scale,
    teacher_scale,
    student_cap,
    teacher_cap,
    STUDENT_BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    STUDENT_SCALED: tl.constexpr,
    TEACHER_SCALED: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one row, float64: |p⊙(gap − E_p[gap])|², |p − q|², and the variance of p − q under p."""
    row = tl.program_id(0)
    s_row = student + row.to(tl.int64) * stride
    t_row = teacher + row.to(tl.int64) * stride
    table = aux + row
    s_top = tl.load(table)
    t_top = tl.load(table + aux_stride)
    s_inverse = tl.load(table + 2 * aux_stride)
    t_inverse = tl.load(table + 3 * aux_stride)
    mean_gap = tl.load(table + 4 * aux_stride)
    lanes = tl.arange(0, BLOCK)
    mean = tl.zeros((), tl.float32)
    for turn in range(2):  # the variance needs the mean, so that nothing cancels
        slope = tl.zeros((BLOCK,), tl.float32)
        norm = tl.zeros((BLOCK,), tl.float32)
        first = tl.zeros((BLOCK,), tl.float32)
        second = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            v = start + lanes
            is_id = v < vocab_size
            s = tl.load(s_row + v, mask=is_id, other=0.0)
            s = _logits(
                s, student_bias, v, is_id, student_scale, student_cap,
                STUDENT_BIAS, STUDENT_SCALED, STUDENT_CAP,
            )  # fmt: skip
            t = tl.load(t_row + v, mask=is_id, other=0.0)
            t = _logits(
                t, teacher_bias, v, is_id, teacher_scale, teacher_cap,
                TEACHER_BIAS, TEACHER_SCALED, TEACHER_CAP,
            )  # fmt: skip
            s = s - s_top
            t = t - t_top
            p = _exp(s) * s_inverse
            g = p - _exp(t) * t_inverse
            steep = p * (tl.where(p == 0.0, 0.0, s - t) - mean_gap)
            slope += steep * steep
            norm += g * g
            first += p * g
            second += p * (g - mean) * (g - mean)
        if turn == 0:
            mean = tl.sum(first, 0)
        tl.store(out + row, tl.sum(slope, 0).to(tl.float64))
        tl.store(out + out_stride + row, tl.sum(norm, 0).to(tl.float64))
        tl.store(out + 2 * out_stride + row, tl.sum(second, 0).to(tl.float64))


@triton.jit(do_not_specialize=["aux_stride", "out_stride"])
def signal_kernel(
    student,
    teacher,
    student_bias,
    teacher_bias,
    aux,
    out,
    vocab_size,
    stride,
    aux_stride,
    out_stride,
    student_scale,
    teacher_scale,
    student_cap,
    teacher_cap,
    STUDENT_BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    STUDENT_SCALED: tl.constexpr,
    TEACHER_SCALED: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one row, float64: ‖E ĝ‖² and E‖ĝ‖² of the sampled gradient ĝ = (r − b)(e_y − p).

    As in `core.extras.signal_share`: first the sums without the id of p > ½ and its r, then b and
    the mean of r, then squares.
    """
    row = tl.program_id(0)
    s_row = student + row.to(tl.int64) * stride
    t_row = teacher + row.to(tl.int64) * stride
    table = aux + row
    s_top = tl.load(table)
    t_top = tl.load(table + aux_stride)
    s_inverse = tl.load(table + 2 * aux_stride)
    lanes = tl.arange(0, BLOCK)
    own_r = tl.zeros((), tl.float32)
    own = tl.zeros((), tl.float32)
    squares = tl.zeros((), tl.float32)
    mean = tl.zeros((), tl.float32)
    b = tl.zeros((), tl.float32)
    for turn in range(3):
        first = tl.zeros((BLOCK,), tl.float32)
        second = tl.zeros((BLOCK,), tl.float32)
        third = tl.zeros((BLOCK,), tl.float32)
        fourth = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            v = start + lanes
            is_id = v < vocab_size
            s = tl.load(s_row + v, mask=is_id, other=0.0)
            s = _logits(
                s, student_bias, v, is_id, student_scale, student_cap,
                STUDENT_BIAS, STUDENT_SCALED, STUDENT_CAP,
            )  # fmt: skip
            t = tl.load(t_row + v, mask=is_id, other=0.0)
            t = _logits(
                t, teacher_bias, v, is_id, teacher_scale, teacher_cap,
                TEACHER_BIAS, TEACHER_SCALED, TEACHER_CAP,
            )  # fmt: skip
            s = s - s_top
            t = t - t_top
            p = _exp(s) * s_inverse
            is_major = p > 0.5
            r = tl.where(p == 0.0, 0.0, s - t)
            if turn == 0:
                minor = tl.where(is_major, 0.0, p)
                first += minor
                second += minor * minor
                third += tl.where(is_major, p * p, 0.0)
                fourth += tl.where(is_major, r, 0.0)
            else:
                r = tl.where(p == 0.0, 0.0, r - own_r)
                weight = p * tl.where(is_major, own, 1.0 - 2.0 * p + squares)
                if turn == 1:
                    first += p * r
                    second += weight
                    third += weight * r
                else:
                    steep = p * (r - mean)
                    first += steep * steep
                    second += weight * (r - b) * (r - b)
        if turn == 0:
            rest = tl.sum(first, 0)
            squares = tl.sum(second, 0)
            own = rest * rest + squares
            squares += tl.sum(third, 0)
            own_r = tl.sum(fourth, 0)
        if turn == 1:
            mean = tl.sum(first, 0)
            mass = tl.sum(second, 0)
            b = tl.where(mass > 0.0, tl.sum(third, 0) / mass, 0.0)
        if turn == 2:
            tl.store(out + row, tl.sum(first, 0).to(tl.float64))
            tl.store(out + out_stride + row, tl.sum(second, 0).to(tl.float64))


@triton.jit(do_not_specialize=["aux_stride"])
def head_kernel(
    student,
    teacher,
    student_bias,
    teacher_bias,
    aux,
    out,
    vocab_size,
    stride,
    aux_stride,
    student_scale,
    teacher_scale,
    student_cap,
    teacher_cap,
    share,
    STUDENT_BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    STUDENT_SCALED: tl.constexpr,
    TEACHER_SCALED: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    WAYS: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Share of Σ|q − p| of one row that lies in the likeliest ids holding `share` of q, float64.

    Their least likely logit is searched for among all float32 numbers, `WAYS` at a time: the bits
    of numbers that are not negative are in their order. Of equal ids at the end as many count,
    at their mean, as it takes to reach the share.
    """
    row = tl.program_id(0)
    s_row = student + row.to(tl.int64) * stride
    t_row = teacher + row.to(tl.int64) * stride
    table = aux + row
    s_top = tl.load(table)
    t_top = tl.load(table + aux_stride)
    s_inverse = tl.load(table + 2 * aux_stride)
    t_inverse = tl.load(table + 3 * aux_stride)
    lanes = tl.arange(0, BLOCK)
    ways = tl.arange(0, WAYS)
    # Ids of less than share/V hold less than the share: no more than 32 nats below the largest.
    low = tl.full((), -1, tl.int32)
    step = tl.full((), 0x42000000 // WAYS + 1, tl.int32)
    for _ in range(TURNS):
        held = tl.zeros((WAYS, BLOCK), tl.float32)
        steps = low + (ways + 1) * step
        for start in range(0, vocab_size, BLOCK):
            v = start + lanes
            is_id = v < vocab_size
            t = tl.load(t_row + v, mask=is_id, other=0.0)
            t = _logits(
                t, teacher_bias, v, is_id, teacher_scale, teacher_cap,
                TEACHER_BIAS, TEACHER_SCALED, TEACHER_CAP,
            )  # fmt: skip
            below = t_top - t
            key = below.to(tl.int32, bitcast=True)
            q = _exp(-below) * t_inverse
            held += tl.where(key[None, :] <= steps[:, None], q[None, :], 0.0)
        low += step * tl.sum(tl.where(tl.sum(held, 1) < share, 1, 0), 0)
        step = (step + WAYS - 1) // WAYS
    last = low + 1
    before = tl.zeros((BLOCK,), tl.float32)  # mass of likelier ids
    inside = tl.zeros((BLOCK,), tl.float32)
    equal = tl.zeros((BLOCK,), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)  # of the equal ids at the end
    ties = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        v = start + lanes
        is_id = v < vocab_size
        s = tl.load(s_row + v, mask=is_id, other=0.0)
        s = _logits(
            s, student_bias, v, is_id, student_scale, student_cap,
            STUDENT_BIAS, STUDENT_SCALED, STUDENT_CAP,
        )  # fmt: skip
        t = tl.load(t_row + v, mask=is_id, other=0.0)
        t = _logits(
            t, teacher_bias, v, is_id, teacher_scale, teacher_cap,
            TEACHER_BIAS, TEACHER_SCALED, TEACHER_CAP,
        )  # fmt: skip
        below = t_top - t
        key = below.to(tl.int32, bitcast=True)
        q = _exp(-below) * t_inverse
        difference = tl.abs(q - _exp(s - s_top) * s_inverse)
        total += difference
        before += tl.where(key < last, q, 0.0)
        inside += tl.where(key < last, difference, 0.0)
        equal += tl.where(key == last, difference, 0.0)
        mass += tl.where(key == last, q, 0.0)
        ties += tl.where(key == last, 1.0, 0.0)
    num_ties = tl.maximum(tl.sum(ties, 0), 1.0)
    one = tl.sum(mass, 0) / num_ties
    needed = tl.ceil((share - tl.sum(before, 0)) / tl.where(one > 0.0, one, 1.0))
    counted = tl.minimum(tl.maximum(needed, 1.0), num_ties) / num_ties
    whole = tl.sum(total, 0)
    found = (tl.sum(inside, 0) + counted * tl.sum(equal, 0)) / tl.where(whole > 0.0, whole, 1.0)
    tl.store(out + row, tl.where(whole > 0.0, found, 0.5).to(tl.float64))


@triton.jit
def scale_kernel(x, factor, out, size, BLOCK: tl.constexpr):
    """out ← factor·x over all numbers of a tensor, rounded once; `out` may be `x`."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = place < size
    y = tl.load(x + place, mask=is_inside, other=0.0) * tl.load(factor)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=is_inside)
