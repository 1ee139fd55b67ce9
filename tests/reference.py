"""A plain float64 reference of the mathematics, which never imports the package under test.

Written to be obviously right: everything is materialised, rows are looped over, gradients come
from autograd, selections from sorting Python lists.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor


@dataclass
class Head:
    """Hidden states and the projection that turns them into logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    swap: tuple[int, int] | None = None
    """Two ids whose columns trade places."""

    def logits(self) -> Tensor:
        """All `[N, V]` logits, materialised in float64."""
        z = self.hidden.double() @ self.weight.double().t()
        if self.bias is not None:
            z = z + self.bias.double()
        z = z * self.scale
        z = z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)
        columns = list(range(z.shape[1]))
        if self.swap is not None:
            first, second = self.swap
            columns[first], columns[second] = second, first
        return torch.stack([z[:, column] for column in columns], 1)


def log_softmax(z: Tensor) -> Tensor:
    """log of exp(z) / Σ exp(z), with the maximum taken out."""
    z = z - z.max(-1, keepdim=True).values.detach()
    return z - z.exp().sum(-1, keepdim=True).log()


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a‖b) of every row, summed over the support of a."""
    rows = []
    for a, b in zip(log_a, log_b, strict=True):
        support = a > -math.inf
        rows.append((a[support].exp() * (a[support] - b[support])).sum())
    return torch.stack(rows) if rows else log_a.sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return kl(log_p, log_q)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return kl(log_q, log_p)


def jsd(log_p: Tensor, log_q: Tensor, teacher_weight: float) -> Tensor:
    mixture = teacher_weight * log_q.exp() + (1 - teacher_weight) * log_p.exp()
    to_mixture = kl(log_q, mixture.log()), kl(log_p, mixture.log())
    return teacher_weight * to_mixture[0] + (1 - teacher_weight) * to_mixture[1]


def entropy(log_p: Tensor) -> Tensor:
    """−Σ p log p of every row, over its support."""
    rows = []
    for a in log_p:
        support = a > -math.inf
        rows.append(-(a[support].exp() * a[support]).sum())
    return torch.stack(rows)


def entropy_of_logits(z: Sequence[float]) -> float:
    """Entropy of one row, accurate also where it is tiny: no number is subtracted from another."""
    top = max(z)
    index = list(z).index(top)
    others = [v - top for i, v in enumerate(z) if i != index]
    mass = math.fsum(math.exp(v) for v in others)
    return math.log1p(mass) + math.fsum(-v * math.exp(v) for v in others) / (1 + mass)


@dataclass
class Gradients:
    """What the materialised objective gives."""

    total: float
    reverse_kl: Tensor
    forward_kl: Tensor
    entropy: Tensor
    teacher_entropy: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logits: Tensor


def objective(
    heads: tuple[Head, Head], a: Sequence[float], b: Sequence[float], rows: Sequence[int]
) -> Gradients:
    """Σ over the chosen rows of a·reverse_kl + b·forward_kl, differentiated by autograd.

    `heads` are student and teacher.
    `a` and `b` have one entry for each of the chosen rows; gradients are those of all rows.
    """
    student, teacher = heads
    leaves = [
        None if x is None else x.detach().double().requires_grad_(True)
        for x in (student.hidden, student.weight, student.bias)
    ]
    hidden, weight, bias = leaves
    assert hidden is not None
    assert weight is not None
    z = replace(student, hidden=hidden, weight=weight, bias=bias).logits()
    z.retain_grad()
    log_p, log_q = log_softmax(z), log_softmax(teacher.logits().detach())
    total = (z * 0.0).nansum()
    for row, a_n, b_n in zip(rows, a, b, strict=True):
        if a_n:
            total = total + a_n * reverse_kl(log_p[row, None], log_q[row, None])[0]
        if b_n:
            total = total + b_n * forward_kl(log_p[row, None], log_q[row, None])[0]
    total.backward()
    chosen = torch.as_tensor(list(rows), dtype=torch.long)
    p, q = log_p.detach()[chosen], log_q[chosen]
    assert hidden.grad is not None
    assert weight.grad is not None
    assert z.grad is not None
    return Gradients(
        float(total.detach()),
        reverse_kl(p, q),
        forward_kl(p, q),
        entropy(p) if len(p) else p.sum(-1),
        entropy(q) if len(q) else q.sum(-1),
        hidden.grad,
        weight.grad,
        None if bias is None else bias.grad,
        z.grad,
    )


def clipped_minmax(x: Sequence[float], low: float, high: float) -> list[float]:
    """(x − low) / (high − low) within [0, 1]; a batch without spread is all 0."""
    if not high > low:
        return [0.0 for _ in x]
    return [min(1.0, max(0.0, (v - low) / (high - low))) for v in x]


def normalize(x: Sequence[float], method: str, is_entropy: bool) -> list[float]:
    """TIP: entropy clipped at its 98th percentile, divergence not, and the switches."""
    low, high = min(x), max(x)
    if method == "quantile_05_95":
        low, high = float(np.quantile(x, 0.05)), float(np.quantile(x, 0.95))
    elif method == "minmax_p98_both" or (method == "minmax_p98" and is_entropy):
        high = float(np.quantile(x, 0.98))
    return clipped_minmax(x, low, high)


RULES = ("all", "random", "entropy", "entropy_sample", "soft_or", "q3", "divergence", "bottom")
"""TIP's rules and their controls, the ones that `scores` knows."""


def scores(
    rule: str,
    entropies: Sequence[float],
    reverse: Sequence[float],
    forward: Sequence[float],
    uniform: Sequence[float],
    method: str = "minmax_p98",
) -> list[float]:
    """The score of every token under a rule of TIP; the highest are kept."""
    h = normalize(entropies, method, True)
    d = normalize(reverse, method, False)
    soft_or = [x + y * (1 - x) for x, y in zip(h, d, strict=True)]
    match rule:
        case "all":
            return [0.0 for _ in h]
        case "random":
            return list(uniform)
        case "entropy":
            return list(entropies)
        case "entropy_sample":  # Gumbel top-k
            return [math.log(e) - math.log(-math.log(u)) for e, u in zip(entropies, uniform)]  # noqa: B905
        case "soft_or":
            return soft_or
        case "q3":
            return [f * (1 - x) for f, x in zip(forward, h, strict=True)]
        case "divergence":
            return list(reverse)
        case "bottom":
            return [-s for s in soft_or]
    raise ValueError(rule)


SAMPLED_RULES = ("lowest_logprob", "probability_gap")
"""The rules that look at the sampled tokens alone, the ones that `sampled_scores` knows."""


def sampled_scores(
    rule: str, log_p: Sequence[float], log_q: Sequence[float], b: float = 1.0
) -> list[float]:
    """The score of every token under a rule of the sampled tokens' log-probabilities."""
    match rule:
        case "lowest_logprob":
            return [-x for x in log_p]
        case "probability_gap":
            pairs = zip(log_p, log_q, strict=True)
            return [abs(y - x) ** (1 - b) * abs(math.exp(y) - math.exp(x)) ** b for x, y in pairs]
    raise ValueError(rule)


def extreme_scores(
    log_p: Sequence[float], log_q: Sequence[float], group: Sequence[int], end: str = "both"
) -> list[float]:
    """Advantages of the sampled tokens, or minus the places counted from the nearer end."""
    advantage = [y - x for x, y in zip(log_p, log_q, strict=True)]
    if end != "both":
        return advantage if end == "max" else [-a for a in advantage]
    found = []
    for i, g in enumerate(group):
        members = [j for j, h in enumerate(group) if h == g]
        above = sorted(members, key=lambda j: (-advantage[j], j)).index(i)
        below = sorted(members, key=lambda j: (advantage[j], j)).index(i)
        found.append(-float(min(above, below)))
    return found


def influence_scores(
    signal: Sequence[float], useful: Sequence[float], group: Sequence[int], combine: str = "soft_or"
) -> list[float]:
    """The share of the others of a group with less signal, and how useful a token is."""
    found = []
    for own, u, g in zip(signal, useful, group, strict=True):
        members = [x for x, h in zip(signal, group, strict=True) if h == g]
        r = sum(x < own for x in members) / max(len(members) - 1, 1)
        either = r + u if 1 in (r, u) else 1 - (1 - r) * (1 - u)
        found.append({"none": r, "soft_or": either, "soft_and": r * u}[combine])
    return found


def budget(keep: str, count: int) -> int:
    """⌊keep·count⌋ for a decimal number as written, at least 1."""
    return max(1, math.floor(Fraction(keep) * count))


def kept(
    score: Sequence[float], group: Sequence[int], keep: str, usable: Sequence[bool], ends: int = 1
) -> list[int]:
    """Indices of the best usable scores of each group, earlier rows first among equals."""
    chosen = []
    for name in sorted(set(group)):
        members = [i for i, g in enumerate(group) if g == name]
        ranked = sorted((i for i in members if usable[i]), key=lambda i: (-score[i], i))
        chosen += ranked[: ends * budget(keep, len(members))]
    return sorted(chosen)


def inclusion_of_successive_sampling(weights: Sequence[float], count: int) -> list[float]:
    """P(item is among `count` draws without replacement, each ∝ weight), by enumeration."""
    found = [0.0 for _ in weights]
    for draws in itertools.permutations(range(len(weights)), count):
        left, probability = math.fsum(weights), 1.0
        for i in draws:
            probability *= weights[i] / left
            left -= weights[i]
        for i in draws:
            found[i] += probability
    return found


def quadrant(entropy_nats: float, divergence: float, cut_h: float, cut_d: float) -> int:
    """TIP's four cases, spelled out; high means strictly above the cut."""
    if entropy_nats > cut_h:
        return 1 if divergence > cut_d else 2
    return 3 if divergence > cut_d else 4


_MASK = (1 << 64) - 1


def splitmix64(x: int) -> int:
    """Steele, Lea and Flood's finaliser in plain integers."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def counter_uniform(seed: Sequence[int], counters: Sequence[int]) -> float:
    """One number of (0, 1): fold every integer into the state, take the middle of 2**52 cells."""
    state = 0
    for part in (*seed, *counters):
        state = splitmix64(state ^ (part & _MASK))
    return ((state >> 12) + 0.5) / 2**52


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    return kl(log_p, (alpha * log_p.exp() + (1 - alpha) * log_q.exp()).log())


def top_ids(row: Tensor, k: int) -> list[int]:
    """The k likeliest ids of one row, earlier ids first among equals."""
    values = row.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def buckets(log_x: Tensor, ids: Sequence[int]) -> Tensor:
    """One row as the masses of some ids and of everything else, in logs."""
    rest = [i for i in range(len(log_x)) if i not in ids]
    masses = [log_x[i].exp() for i in ids] + ([log_x[rest].exp().sum()] if rest else [])
    return torch.stack(masses).log()


def topk_kl(
    log_p: Tensor, log_q: Tensor, k: int, is_forward: bool, support: str = "teacher"
) -> Tensor:
    """KL between rows coarsened to one side's k likeliest ids and a tail."""
    rows = []
    for a, b in zip(log_p, log_q, strict=True):
        ids = top_ids(b if support == "teacher" else a, k)
        coarse = buckets(a, ids)[None], buckets(b, ids)[None]
        rows.append((forward_kl if is_forward else reverse_kl)(*coarse)[0])
    return torch.stack(rows)


def topk_renormalized(log_p: Tensor, log_q: Tensor, k: int) -> Tensor:
    """EOPD's code: the teacher renormalised on its top k, the student not."""
    rows = []
    for a, b in zip(log_p, log_q, strict=True):
        ids = top_ids(b, k)
        share = b[ids].exp() / b[ids].exp().sum()
        rows.append((share * (share.log() - a[ids])).sum())
    return torch.stack(rows)


def sampled(
    log_p: Tensor, log_q: Tensor, tokens: Sequence[int], old: Sequence[float], clip: float
) -> Tensor:
    """PPO's clipped surrogate, case by case."""
    rows = []
    for a, b, y, before in zip(log_p, log_q, tokens, old, strict=True):
        ratio, advantage = (a[y] - before).exp(), b[y].detach() - before
        if advantage >= 0:
            rows.append(-advantage * ratio.clamp(max=1 + clip))
        else:
            rows.append(-advantage * ratio.clamp(min=1 - clip))
    return torch.stack(rows)


def trust_region(
    log_p: Tensor,
    log_q: Tensor,
    tokens: Sequence[int],
    uniform: Sequence[float],
    k: int,
    is_renormalized: bool = False,
) -> Tensor:
    """TrOPD's loss on the tokens that were just sampled, one by one."""
    rows = []
    for i, (y, u) in enumerate(zip(tokens, uniform, strict=True)):
        a, b = log_p[i, None], log_q[i, None]
        before = float(a[0, y].detach())
        if u < min(math.exp(float(b[0, y]) - before), 1.0):
            rows.append(sampled(a, b, [y], [before], 0.2)[0])
        else:
            rows.append(
                (topk_renormalized(a, b, k) if is_renormalized else topk_kl(a, b, k, True))[0]
            )
    return torch.stack(rows)


def advantages(rewards: Sequence[float], num_samples: int, is_scaled: bool) -> list[float]:
    """GRPO's, prompt by prompt, with TRL's 1e-4 beside the standard deviation."""
    found: list[float] = []
    for start in range(0, len(rewards), num_samples):
        group = [Fraction(r) for r in rewards[start : start + num_samples]]
        mean = sum(group) / num_samples
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / (num_samples - 1))
        found += [float(r - mean) / ((std + 1e-4) if is_scaled else 1.0) for r in group]
    return found


def sharpening(entropies: Sequence[float]) -> list[float]:
    """OPSA's advantages of the rows that train, from exact fractions."""
    h = [Fraction(x) for x in entropies]
    span = max(h) - min(h)
    return [float(-Fraction(1, 2) - ((x - min(h)) / (2 * span) if span else 0)) for x in h]


def policy(
    log_p: Tensor,
    tokens: Sequence[int],
    old: Sequence[float],
    advantages: Sequence[float],
    clips: tuple[float, float],
) -> Tensor:
    """GRPO's loss of every token, case by case."""
    rows = []
    for a, y, before, advantage in zip(log_p, tokens, old, advantages, strict=True):
        ratio = (a[y] - before).exp()
        if advantage >= 0:
            rows.append(-advantage * ratio.clamp(max=1 + clips[1]))
        else:
            rows.append(-advantage * ratio.clamp(min=1 - clips[0]))
    return torch.stack(rows)


Function = Callable[[Tensor, Tensor], Tensor]


def composite(
    heads: tuple[Head, Head], terms: Sequence[tuple[Function, Sequence[float]]]
) -> tuple[Tensor, list[Tensor]]:
    """Σ terms with a weight a row: what each row adds, and gradients of hidden, weight, bias."""
    student, teacher = heads
    given = [x for x in (student.hidden, student.weight, student.bias) if x is not None]
    leaves = [x.detach().double().requires_grad_(True) for x in given]
    log_p = log_softmax(replace(student, **dict(zip(FIELDS, leaves))).logits())  # noqa: B905
    log_q = log_softmax(teacher.logits().detach())
    value = torch.zeros(len(log_p), dtype=torch.float64)
    for function, weights in terms:
        value = value + torch.tensor(weights, dtype=torch.float64) * function(log_p, log_q)
    value.sum().backward()
    return value.detach(), [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


FIELDS = ("hidden", "weight", "bias")


def entropy_direction(z: Tensor, token: int) -> float:
    """∇H · ∇log p(token) of one row of logits `[V]`, both by autograd."""
    z = z.detach().clone().requires_grad_(True)
    log_p = log_softmax(z[None])
    (of_entropy,) = torch.autograd.grad(entropy(log_p)[0], z, retain_graph=True)
    (of_token,) = torch.autograd.grad(log_p[0, token], z)
    return float(of_entropy @ of_token)


def ida_weight(log_p: Tensor, log_q: Tensor, token: int) -> float:
    """IDA-OPD's factor of one row `[V]` of log-probabilities."""
    p, q = float(log_p[token].exp()), float(log_q[token].exp())
    falls = (math.log(q) - math.log(p)) * entropy_direction(log_p, token) < 0
    return abs(q - p) / (q + p) if falls else 1.0


def extras(z: Tensor, log_q: Tensor, token: int = 0) -> dict[str, float]:
    """The extra statistics of one row of student logits `[V]`, by their definitions."""
    direction = entropy_direction(z, token)
    z = z.detach().clone().requires_grad_(True)
    log_p = log_softmax(z[None])
    (slope,) = torch.autograd.grad(reverse_kl(log_p, log_q[None])[0], z)
    log_p = log_p[0].detach()
    p, q = log_p.exp(), log_q.exp()
    g = p - q
    hessian = torch.diag(p) - torch.outer(p, p)
    union = set(top_ids(p, 16)) | set(top_ids(q, 16))
    r = log_p - log_q
    moves = torch.eye(len(p), dtype=p.dtype) - p  # e_y − p of every id y
    lengths = moves.square().sum(1)
    sampled = (r - float((p * r * lengths).sum() / (p * lengths).sum()))[:, None] * moves
    head: list[int] = []
    for i in top_ids(q, len(q)):
        if math.fsum(q[head].tolist()) < 0.5:
            head.append(i)
    return {
        "gradient_norm": float(slope.square().sum()),
        "local_oracle": float(g @ g / (g @ hessian @ g)),
        "local_gain": min(
            float((g @ g) ** 2 / (g @ hessian @ g)) / 2,
            float(forward_kl(log_p[None], log_q[None])[0]),
        ),
        "signal_share": float((p @ sampled).square().sum() / (p @ sampled.square()).sum()),
        "entropy_direction": direction,
        "top_divergence": math.fsum(float(q[i] * (log_q[i] - log_p[i])) for i in union),
        "compatibility": math.fsum(q[top_ids(p, 16)].tolist()),
        "teacher_top_mass": math.fsum(q[top_ids(q, 16)].tolist()),
        "is_in_teacher_top5": float(top_ids(p, 1)[0] in top_ids(q, 5)),
        "head_share": float(g[head].abs().sum() / g.abs().sum()),
    }


def one_class(log_x: Tensor, ids: Sequence[int]) -> Tensor:
    """Rows of log-probabilities in which some ids are one outcome, the first; the others follow."""
    rest = [i for i in range(log_x.shape[1]) if i not in ids]
    total = torch.stack([log_x[:, i].exp() for i in ids]).sum(0).log()
    return torch.cat([total[:, None], log_x[:, rest]], 1)
