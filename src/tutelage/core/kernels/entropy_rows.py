"""The Triton kernel for how raising the sampled token moves the student's entropy."""

from __future__ import annotations

import triton
import triton.language as tl

from tutelage.core.kernels.rows import _exp, _logits


@triton.jit(do_not_specialize=["first", "aux_stride", "out_stride"])
def entropy_kernel(
    student,
    bias,
    tokens,
    aux,
    out,
    first,
    vocab_size,
    stride,
    aux_stride,
    out_stride,
    scale,
    cap,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one row, float64: p and z of the sampled token, and of all other ids Σ p, p², p z, p² z.

    z is the logit, shifted so that the largest of the row is 0.
    """
    row = tl.program_id(0)
    s_row = student + row.to(tl.int64) * stride
    top = tl.load(aux + row)
    inverse = tl.load(aux + row + 2 * aux_stride)
    token = tl.load(tokens + first + row)
    lanes = tl.arange(0, BLOCK)
    own_p = tl.zeros((BLOCK,), tl.float32)
    own_z = tl.zeros((BLOCK,), tl.float32)
    rest = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    weighted_squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        v = start + lanes
        is_id = v < vocab_size
        s = tl.load(s_row + v, mask=is_id, other=0.0)
        s = _logits(s, bias, v, is_id, scale, cap, BIAS, SCALED, CAP)
        p = _exp(s - top) * inverse
        z = tl.where(p == 0.0, 0.0, s - top)
        is_own = v == token
        own_p += tl.where(is_own, p, 0.0)
        own_z += tl.where(is_own, z, 0.0)
        p = tl.where(is_own, 0.0, p)
        rest += p
        squares += p * p
        weighted += p * z
        weighted_squares += p * p * z
    here = out + row
    tl.store(here, tl.sum(own_p, 0).to(tl.float64))
    tl.store(here + out_stride, tl.sum(own_z, 0).to(tl.float64))
    tl.store(here + 2 * out_stride, tl.sum(rest, 0).to(tl.float64))
    tl.store(here + 3 * out_stride, tl.sum(squares, 0).to(tl.float64))
    tl.store(here + 4 * out_stride, tl.sum(weighted, 0).to(tl.float64))
    tl.store(here + 5 * out_stride, tl.sum(weighted_squares, 0).to(tl.float64))
