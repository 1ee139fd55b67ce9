"""Triton kernels over rows of float32 logits: all statistics in one pass, the gradient in another.

Logits are read as the product wrote them; bias, scale and soft cap are applied on the way,
``z = softcap·tanh(scale·(x + bias)/softcap)``. Equations: `tutelage.core._block`.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)

# What the statistics kernel leaves for the gradient kernel, rows of a float32 table `[6, n]`:
# both largest logits, both 1/Z (of logits shifted by the largest), E_p[gap], log Z_s − log Z_t.


@triton.jit
def _exp(x):
    """The weight of a logit; one below 2⁻¹²⁶ may become 0, in all kernels alike."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _tanh(x):
    """tanh to float32 precision: a series near 0, where 1 − 2/(e²ˣ + 1) would cancel."""
    y = x * x
    near = x * (1.0 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    far = tl.where(x < 0, -far, far)
    return tl.where(size < 0.25, near, far)


@triton.jit
def _logits(
    x, bias, v, is_id, scale, cap, BIAS: tl.constexpr, SCALED: tl.constexpr, CAP: tl.constexpr
):
    """The logits that raw products stand for; −inf beyond the vocabulary.

    A product of −inf is an id that was taken out, which a soft cap must not bring back.
    """
    if CAP:
        is_id = is_id & (x > -float("inf"))
    if BIAS:
        x = x + tl.load(bias + v, mask=is_id, other=0.0)
    if SCALED:
        x = x * scale
    if CAP:
        x = cap * _tanh(x / cap)
    return tl.where(is_id, x, -float("inf"))


@triton.jit
def _rescale(top, new_top):
    """exp(top − new_top) and the difference, 0 for a top that is not known yet."""
    is_known = top > -float("inf")
    shift = tl.where(is_known, top - new_top, 0.0)
    return tl.where(is_known, _exp(shift), 0.0), shift


@triton.jit
def _base(top):
    """What to subtract from logits: the largest, or 0 while every one is −inf."""
    return tl.where(top > -float("inf"), top, 0.0)


@triton.jit
def _log1p(x):
    """log(1 + x) in float64, to full precision for small x (Kahan)."""
    u = 1.0 + x
    is_small = u == 1.0
    return tl.where(is_small, x, tl.log(u) * x / tl.where(is_small, 1.0, u - 1.0))


@triton.jit
def _by_lane(x, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """A block of ids `[BLOCK]` as `[LANES, BLOCK / LANES]`, four neighbours to a lane in turn.

    That is how threads hold what they load, so that a lane's sums need no other thread.
    """
    WIDTH: tl.constexpr = 4 if BLOCK >= 4 * LANES else BLOCK // LANES
    TURNS: tl.constexpr = BLOCK // (LANES * WIDTH)
    x = tl.reshape(x, (TURNS, LANES, WIDTH))
    return tl.reshape(tl.permute(x, (1, 0, 2)), (LANES, TURNS * WIDTH))


@triton.jit
def _moved(ties, rest, energy, top, new_top):
    """Ids at the top, Σ e of the rest and Σ e·z, once a larger logit is at 0."""
    ratio, shift = _rescale(top, new_top)
    fell = new_top > top
    energy = ratio * (energy + shift * (rest + ties))
    rest = ratio * (rest + tl.where(fell, ties, 0.0))
    return tl.where(fell, 0.0, ties), rest, energy


@triton.jit
def _moved_gaps(s_gap, s_z, s_top, new_s_top, t_gap, t_z, t_top, new_t_top):
    """Σ e·gap of both sides, once larger logits are at 0; `s_z` and `t_z` are Σ e until now.

    An infinite sum whose weight has become 0 is 0.
    """
    s_ratio, s_shift = _rescale(s_top, new_s_top)
    t_ratio, t_shift = _rescale(t_top, new_t_top)
    moved = s_shift - t_shift
    s_gap = tl.where(s_ratio == 0.0, 0.0, s_ratio * (s_gap + moved * s_z))
    return s_gap, tl.where(t_ratio == 0.0, 0.0, t_ratio * (t_gap + moved * t_z))


@triton.jit(do_not_specialize=["first", "out_stride", "aux_stride"])
def statistics_kernel(
    student,
    teacher,
    student_bias,
    teacher_bias,
    tokens,
    out,
    aux,
    first,
    vocab_size,
    stride,
    out_stride,
    aux_stride,
    student_scale,
    teacher_scale,
    student_cap,
    teacher_cap,
    TEACHER: tl.constexpr,
    TOKENS: tl.constexpr,
    STUDENT_BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    STUDENT_SCALED: tl.constexpr,
    TEACHER_SCALED: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: entropies, divergences and log-probabilities (float64), and the table `aux`.

    Every lane sums its own ids, with the largest of its own logits at 0; lanes meet behind the
    loop. Ids at the top count 1 each and are kept apart from the rest, so that a row of one
    certain id keeps the precision of what is left.
    """
    row = tl.program_id(0)
    s_row = student + row.to(tl.int64) * stride
    t_row = teacher + row.to(tl.int64) * stride
    minus_inf = -float("inf")
    s_top = tl.full((LANES,), minus_inf, tl.float32)
    t_top = tl.full((LANES,), minus_inf, tl.float32)
    s_ties = tl.zeros((LANES,), tl.float32)  # ids at the top
    s_rest = tl.zeros((LANES,), tl.float32)  # Σ e of all other ids
    s_energy = tl.zeros((LANES,), tl.float32)  # Σ e·z
    s_gap = tl.zeros((LANES,), tl.float32)  # Σ e·gap
    t_ties = tl.zeros((LANES,), tl.float32)
    t_rest = tl.zeros((LANES,), tl.float32)
    t_energy = tl.zeros((LANES,), tl.float32)
    t_gap = tl.zeros((LANES,), tl.float32)
    # Whole blocks need no mask. But a product that a mask does not stand behind is fused with the
    # subtraction of the largest, which then is not at 0.
    IS_MASKED: tl.constexpr = STUDENT_SCALED or TEACHER_SCALED
    whole = vocab_size // BLOCK * BLOCK
    for part in tl.static_range(2):
        for start in range(whole * part, vocab_size if part else whole, BLOCK):
            v = start + tl.arange(0, BLOCK)
            is_id = v < vocab_size if part or IS_MASKED else tl.full((BLOCK,), True, tl.int1)
            s = tl.load(s_row + v, mask=is_id, other=minus_inf)
            if TEACHER:
                t = tl.load(t_row + v, mask=is_id, other=minus_inf)
                t = _logits(
                    t, teacher_bias, v, is_id, teacher_scale, teacher_cap,
                    TEACHER_BIAS, TEACHER_SCALED, TEACHER_CAP,
                )  # fmt: skip
            s = _logits(
                s, student_bias, v, is_id, student_scale, student_cap,
                STUDENT_BIAS, STUDENT_SCALED, STUDENT_CAP,
            )  # fmt: skip
            s = _by_lane(s, LANES, BLOCK)
            new_s_top = tl.maximum(s_top, tl.max(s, 1))
            if TEACHER:
                t = _by_lane(t, LANES, BLOCK)
                new_t_top = tl.maximum(t_top, tl.max(t, 1))
                s_gap, t_gap = _moved_gaps(
                    s_gap, s_rest + s_ties, s_top, new_s_top,
                    t_gap, t_rest + t_ties, t_top, new_t_top,
                )  # fmt: skip
                t_ties, t_rest, t_energy = _moved(t_ties, t_rest, t_energy, t_top, new_t_top)
                t_top = new_t_top
            s_ties, s_rest, s_energy = _moved(s_ties, s_rest, s_energy, s_top, new_s_top)
            s_top = new_s_top
            s = s - _base(s_top)[:, None]
            s_e = _exp(s)
            s_is_top = tl.where(s == 0.0, 1.0, 0.0)
            s_ties += tl.sum(s_is_top, 1)
            s_rest += tl.sum(s_e - s_is_top, 1)
            s_energy += tl.sum(s_e * tl.where(s_e == 0.0, 0.0, s), 1)
            if TEACHER:
                t = t - _base(t_top)[:, None]
                t_e = _exp(t)
                t_is_top = tl.where(t == 0.0, 1.0, 0.0)
                t_ties += tl.sum(t_is_top, 1)
                t_rest += tl.sum(t_e - t_is_top, 1)
                t_energy += tl.sum(t_e * tl.where(t_e == 0.0, 0.0, t), 1)
                gap = s - t
                s_gap += tl.sum(s_e * tl.where(s_e == 0.0, 0.0, gap), 1)
                t_gap += tl.sum(t_e * tl.where(t_e == 0.0, 0.0, gap), 1)
    new_s_top = tl.max(s_top, 0)
    if TEACHER:
        new_t_top = tl.max(t_top, 0)
        s_gap, t_gap = _moved_gaps(
            s_gap, s_rest + s_ties, s_top, new_s_top, t_gap, t_rest + t_ties, t_top, new_t_top
        )
        t_ties, t_rest, t_energy = _moved(t_ties, t_rest, t_energy, t_top, new_t_top)
        t_top = new_t_top
    s_ties, s_rest, s_energy = _moved(s_ties, s_rest, s_energy, s_top, new_s_top)
    s_top = new_s_top
    others = tl.sum(s_rest, 0).to(tl.float64) + (tl.sum(s_ties, 0).to(tl.float64) - 1.0)
    s_z = 1.0 + others
    s_log_z = _log1p(others)
    here = out + first + row
    tl.store(here, s_log_z - tl.sum(s_energy, 0).to(tl.float64) / s_z)
    table = aux + row
    tl.store(table, _base(s_top))
    tl.store(table + 2 * aux_stride, (1.0 / s_z).to(tl.float32))
    if TEACHER:
        others = tl.sum(t_rest, 0).to(tl.float64) + (tl.sum(t_ties, 0).to(tl.float64) - 1.0)
        t_z = 1.0 + others
        t_log_z = _log1p(others)
        offset = s_log_z - t_log_z
        mean_gap = tl.sum(s_gap, 0).to(tl.float64) / s_z
        tl.store(here + out_stride, t_log_z - tl.sum(t_energy, 0).to(tl.float64) / t_z)
        tl.store(here + 2 * out_stride, mean_gap - offset)
        tl.store(here + 3 * out_stride, offset - tl.sum(t_gap, 0).to(tl.float64) / t_z)
        tl.store(table + aux_stride, _base(t_top))
        tl.store(table + 3 * aux_stride, (1.0 / t_z).to(tl.float32))
        tl.store(table + 4 * aux_stride, mean_gap.to(tl.float32))
        tl.store(table + 5 * aux_stride, offset.to(tl.float32))
    if TOKENS:
        token = tl.load(tokens + first + row)
        is_id = (token >= 0) & (token < vocab_size)
        s_one = tl.load(s_row + token, mask=is_id, other=float("nan"))
        s_one = _logits(
            s_one, student_bias, token, is_id, student_scale, student_cap,
            STUDENT_BIAS, STUDENT_SCALED, STUDENT_CAP,
        )  # fmt: skip
        s_one = tl.where(is_id, s_one - _base(s_top), float("nan"))
        tl.store(here + 4 * out_stride, s_one.to(tl.float64) - s_log_z)
        if TEACHER:
            t_one = tl.load(t_row + token, mask=is_id, other=float("nan"))
            t_one = _logits(
                t_one, teacher_bias, token, is_id, teacher_scale, teacher_cap,
                TEACHER_BIAS, TEACHER_SCALED, TEACHER_CAP,
            )  # fmt: skip
            t_one = tl.where(is_id, t_one - _base(t_top), float("nan"))
            tl.store(here + 5 * out_stride, t_one.to(tl.float64) - t_log_z)


@triton.jit
def _over_mixture(log_ratio, w):
    """log(p/m) and log(q/m) of m = (1 − w) p + w q, from log(p/q), without overflow."""
    is_more = log_ratio > 0
    u = tl.exp(-tl.abs(log_ratio))
    log_d = tl.log(tl.where(is_more, (1.0 - w) + w * u, (1.0 - w) * u + w))
    return tl.minimum(log_ratio, 0.0) - log_d, -tl.maximum(log_ratio, 0.0) - log_d


@triton.jit(do_not_specialize=["first", "chunk_start", "aux_stride"])
def gradient_kernel(
    student,
    teacher,
    student_bias,
    teacher_bias,
    aux,
    reverse_weight,
    forward_weight,
    share_weight,
    spread_weight,
    spread_shift,
    jsd_weight,
    jsd_mean,
    skew_weight,
    skew_mean,
    out,
    first,
    chunk_start,
    vocab_size,
    num_blocks,
    stride,
    aux_stride,
    student_scale,
    teacher_scale,
    student_cap,
    teacher_cap,
    jsd_w,
    skew_w,
    REVERSE: tl.constexpr,
    FORWARD: tl.constexpr,
    SHARE: tl.constexpr,
    SPREAD: tl.constexpr,
    JSD: tl.constexpr,
    SKEW: tl.constexpr,
    STUDENT_BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    STUDENT_SCALED: tl.constexpr,
    TEACHER_SCALED: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of raw student logits (before bias, scale and cap), one block of one row.

    ``a p⊙(gap − E_p[gap]) + b (p − q) + c p + d exp(z + shift)`` and p⊙(g − E_p[g]) for the
    slopes g of `mixture_kernel`, times the derivatives of cap and scale, from row `first` of a
    chunk on. A weight of 0 adds exactly 0.
    """
    program = tl.program_id(0)
    row = first + program // num_blocks
    v = (program % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    is_id = v < vocab_size
    place = row.to(tl.int64) * stride + v
    table = aux + row
    s = tl.load(student + place, mask=is_id, other=0.0)
    t = tl.load(teacher + place, mask=is_id, other=0.0)
    s = _logits(
        s, student_bias, v, is_id, student_scale, student_cap,
        STUDENT_BIAS, STUDENT_SCALED, STUDENT_CAP,
    )  # fmt: skip
    t = _logits(
        t, teacher_bias, v, is_id, teacher_scale, teacher_cap,
        TEACHER_BIAS, TEACHER_SCALED, TEACHER_CAP,
    )  # fmt: skip
    z = s
    s = s - tl.load(table)
    t = t - tl.load(table + aux_stride)
    p = _exp(s) * tl.load(table + 2 * aux_stride)
    gradient = tl.zeros((BLOCK,), tl.float32)
    gap = s - t
    if REVERSE:
        a = tl.load(reverse_weight + chunk_start + row)
        slope = p * (tl.where(p == 0.0, 0.0, gap) - tl.load(table + 4 * aux_stride))
        gradient += tl.where(a == 0.0, 0.0, a * slope)
    if FORWARD:
        b = tl.load(forward_weight + chunk_start + row)
        slope = p - _exp(t) * tl.load(table + 3 * aux_stride)
        gradient += tl.where(b == 0.0, 0.0, b * slope)
    if SHARE:
        gradient += tl.load(share_weight + row) * p
    if SPREAD:
        c = tl.load(spread_weight + row)
        gradient += tl.where(c == 0.0, 0.0, c * _exp(s + tl.load(spread_shift + row)))
    if JSD:
        c = tl.load(jsd_weight + chunk_start + row)
        over, _ = _over_mixture(gap - tl.load(table + 5 * aux_stride), jsd_w)
        slope = p * (tl.where(p == 0.0, 0.0, over) - tl.load(jsd_mean + row))
        gradient += tl.where(c == 0.0, 0.0, (1.0 - jsd_w) * c * slope)
    if SKEW:
        c = tl.load(skew_weight + chunk_start + row)
        over, _ = _over_mixture(gap - tl.load(table + 5 * aux_stride), skew_w)
        over = tl.where(p == 0.0, 0.0, over)
        slope = p * (over - (1.0 - skew_w) * tl.exp(over) - tl.load(skew_mean + row))
        gradient += tl.where(c == 0.0, 0.0, c * slope)
    if STUDENT_CAP:
        ratio = z / student_cap
        gradient *= 1.0 - ratio * ratio
    if STUDENT_SCALED:
        gradient *= student_scale
    tl.store(out + place, gradient.to(out.dtype.element_ty), mask=is_id)
