"""Triton kernels for what only some rules and objectives need of a row."""

from __future__ import annotations

import triton
import triton.language as tl

from tutelage.core.kernels.rows import _logits


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
            p = tl.exp(s) * s_inverse
            g = p - tl.exp(t) * t_inverse
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
