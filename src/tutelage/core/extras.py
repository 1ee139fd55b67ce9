"""Statistics of a row that only some rules and objectives need, each from one block, exact."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tutelage.core._block import Block

TOP_K = 16
"""Ids that count as the top of a distribution."""

HEAD_MASS = 0.5
"""Teacher mass of the head in `head_share` (adaptive KL's μ)."""


def gradient_norm(block: Block) -> Tensor:
    """Squared norm of the reverse KL's logit gradient: Σ_v p² (log p − log q − KL)²."""
    return (block.p * (block.gap - block.mean_gap)).square().sum(-1)


def local_oracle(block: Block) -> Tensor:
    """TIP's local oracle weight |g|²/(gᵀHg) with g = p − q, H = diag(p) − ppᵀ; 0 where g is 0.

    A step length, not an importance: it does not change when g is scaled and grows without bound
    as p becomes certain, agreed with or not. Infinite where p has no other id left and q has.
    """
    norm, curvature = _slope_and_curvature(block)
    return torch.where(norm == 0, 0.0, norm / curvature)


def local_gain(block: Block) -> Tensor:
    """What that step gains: min(|g|⁴/(2 gᵀHg), KL(q‖p)), nats; 0 where g is 0.

    The first is the largest decrease of the quadratic model of KL(q‖p) along −g. No step can gain
    more than the loss itself, which is the limit where p has no other id left.
    """
    norm, curvature = _slope_and_curvature(block)
    quadratic = norm.square() / (2 * curvature)
    return torch.where(norm == 0, 0.0, torch.minimum(quadratic, block.forward_kl.double()))


def _slope_and_curvature(block: Block) -> tuple[Tensor, Tensor]:
    """|g|² and gᵀHg, the variance of g under p: a sum of squares, so that nothing cancels."""
    p, g = block.p.double(), block.p.double() - block.q.double()
    return g.square().sum(-1), (p * (g - (p * g).sum(-1, keepdim=True)).square()).sum(-1)


def signal_share(block: Block) -> Tensor:
    """Signal in the gradient of one sampled token: ‖E ĝ‖² / E‖ĝ‖², in [0, 1]; 0 where g is 0.

    ĝ = (r − b)(e_y − p), y ~ p, with r = log p − log q and the b that makes E‖ĝ‖² smallest; E ĝ is
    the gradient of `gradient_norm`. The signal-to-noise ratio ‖E ĝ‖²/(E‖ĝ‖² − ‖E ĝ‖²) is
    s/(1 − s) of it, and so ranks rows as it does.

    Of an id with p > ½, 1 − p is the sum of the others and r is counted from its own, so that
    nothing cancels where the student is nearly certain.
    """
    p, r = block.p.double(), block.gap.double()
    p = p / p.sum(-1, keepdim=True)
    is_major = p > 0.5
    minor = p.masked_fill(is_major, 0.0)
    squares = minor.square().sum(-1, keepdim=True)
    own = minor.sum(-1, keepdim=True).square() + squares
    length = torch.where(is_major, own, 1 - 2 * p + p.square().sum(-1, keepdim=True))
    r = r - r.masked_fill(~is_major, 0.0).sum(-1, keepdim=True)
    weight = p * length
    b = (weight * r).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True)
    size = (weight * (r - b).square()).sum(-1)
    signal = (p * (r - (p * r).sum(-1, keepdim=True))).square().sum(-1)
    return torch.where(signal == 0, 0.0, signal / size)


def entropy_direction(block: Block) -> Tensor:
    """How raising the sampled token y moves the student's entropy: D = ∇_z H · ∇_z log p(y), nats.

    With ∂H/∂z_v = −p_v (log p_v + H), which sums to 0, and ∇_z log p(y) = e_y − p:
    ``D = −p_y (log p_y + H) + Σ_v p_v² (log p_v + H) = Σ_{v≠y} (1 − p_y + p_v) p_v (log p_v + H)``.
    The second form is computed, from sums without y, in which nothing cancels as p_y goes to 1:
    there D is of second order in 1 − p_y, and its sign is what counts.
    """
    if block.tokens is None:
        raise ValueError("entropy_direction needs the sampled tokens.")
    y = block.tokens[:, None]
    z = (block.gap + block.teacher_logits).masked_fill(block.p == 0, 0.0)  # 0 at the largest
    p = block.p.scatter(-1, y, 0.0)
    squares = p.square()
    sums = torch.stack([x.sum(-1).double() for x in (p, squares, p * z, squares * z)])
    own_p, own_z = (x.gather(-1, y).squeeze(-1).double() for x in (block.p, z))
    return direction_from_sums(own_p, own_z, sums)


def direction_from_sums(own_p: Tensor, own_z: Tensor, sums: Tensor) -> Tensor:
    """D `[r]` from p_y, z_y and the sums of p, p², p z and p² z over all other ids `[4, r]`."""
    rest, squares, weighted, weighted_squares = sums
    energy = -(weighted + own_p * own_z)  # H − log Z, so that log p + H = z + energy
    found: Tensor = rest * own_p * (weighted - rest * own_z) + weighted_squares + energy * squares
    return found


def top_divergence(block: Block) -> Tensor:
    """Terms of the forward KL on the union of both top 16, nats (TA-OPD's D)."""
    ids = torch.cat([_top(block.p), _top(block.q)], -1)
    union = torch.zeros_like(block.p).scatter_(-1, ids, 1.0)
    return -(union * block.q * block.log_ratio()).sum(-1)


def compatibility(block: Block) -> Tensor:
    """Teacher mass on the student's top 16 (TA-OPD's C)."""
    return block.q.gather(-1, _top(block.p)).sum(-1)


def teacher_top_mass(block: Block) -> Tensor:
    """Teacher mass on its own top 16."""
    return block.q.topk(min(TOP_K, block.q.shape[-1]), -1).values.sum(-1)


def is_in_teacher_top5(block: Block) -> Tensor:
    """1 where the student's likeliest id is among the teacher's five likeliest, else 0."""
    best = block.p.argmax(-1, keepdim=True)
    # By logits: among probabilities that have underflowed to 0 any id would do.
    ids = block.teacher_logits.topk(min(5, block.q.shape[-1]), -1).indices
    return (ids == best).any(-1).to(block.p.dtype)


def head_share(block: Block) -> Tensor:
    """Share of Σ|q − p| that lies in the teacher's head, the likeliest ids holding half its mass.

    Adaptive KL weighs forward KL by it and reverse KL by the rest (arXiv 2404.02657); ½ where p
    and q are equal.
    """
    q, ids = block.q.sort(-1, descending=True)
    difference = (q - block.p.gather(-1, ids)).abs()
    is_head = q.cumsum(-1) - q < HEAD_MASS
    total = difference.sum(-1)
    return torch.where(total > 0, (difference * is_head).sum(-1) / total, 0.5)


def _top(x: Tensor) -> Tensor:
    return x.topk(min(TOP_K, x.shape[-1]), -1).indices


EXTRAS: dict[str, Callable[[Block], Tensor]] = {
    "gradient_norm": gradient_norm,
    "local_oracle": local_oracle,
    "local_gain": local_gain,
    "signal_share": signal_share,
    "entropy_direction": entropy_direction,
    "top_divergence": top_divergence,
    "compatibility": compatibility,
    "teacher_top_mass": teacher_top_mass,
    "is_in_teacher_top5": is_in_teacher_top5,
    "head_share": head_share,
}
"""Extra statistics by name; ask for them with `token_stats(..., extras=[...])`."""
