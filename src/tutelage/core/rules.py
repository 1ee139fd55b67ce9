"""Importance of a token: the score by which a selection rule ranks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tutelage.core.stats import TokenStats

NORMALIZATIONS = ("minmax_p98", "minmax", "minmax_p98_both", "quantile_05_95")
"""How entropy and divergence are brought to [0, 1] over the global batch."""

ENDS = ("max", "min", "both")
"""Which advantages `extreme_advantage` keeps."""

COMBINATIONS = ("none", "soft_or", "soft_and")
"""How `influence` combines the rank of the signal with a usefulness."""


def quantile(x: Tensor, share: float) -> Tensor:
    """Linear-interpolation quantile of the finite entries, NaN if there are none.

    (`torch.quantile` stops at 2**24 entries.)
    """
    ordered = x[torch.isfinite(x)].sort().values
    if not len(ordered):
        return x.new_tensor(torch.nan)
    where = share * (len(ordered) - 1)
    low = int(where)
    high = min(low + 1, len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], where - low)


def _scale(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(x − low) / (high − low), kept within [0, 1]; all 0 when every value is the same."""
    if not bool(high > low):
        return torch.where(torch.isfinite(x), 0.0, x)
    return torch.where(torch.isfinite(x), ((x - low) / (high - low)).clamp(0.0, 1.0), x)


def _normalize(x: Tensor, method: str, is_entropy: bool) -> Tensor:
    finite = x[torch.isfinite(x)]
    if not len(finite):
        return x
    if method == "quantile_05_95":
        return _scale(x, quantile(x, 0.05), quantile(x, 0.95))
    is_clipped = method == "minmax_p98_both" or (method == "minmax_p98" and is_entropy)
    return _scale(x, finite.min(), quantile(x, 0.98) if is_clipped else finite.max())


@dataclass(frozen=True)
class Context:
    """What a rule reads besides the statistics."""

    normalization: str
    uniform: Tensor
    """One number in (0, 1) a row, float64 `[N]`."""
    position: Tensor
    """Index of each row within its completion `[N]`."""
    group: Tensor
    """The group of rows, of one budget, that each row belongs to `[N]`."""


Score = Callable[[TokenStats, Context], Tensor]


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise, increasing in numbers uniform on (0, 1)."""
    return -(-uniform.log()).log()


def _entropy_hat(stats: TokenStats, context: Context) -> Tensor:
    return _normalize(stats.entropy.double(), context.normalization, is_entropy=True)


def soft_or(stats: TokenStats, context: Context) -> Tensor:
    """ĥ + δ̂ − ĥδ̂: high where the student's entropy is high, or the KL, or both.

    Written so that it is exactly 1 wherever ĥ or δ̂ is: rounding must not rank equal rows. Small
    values keep their digits.
    """
    h = _entropy_hat(stats, context)
    d = _normalize(stats.reverse_kl.double(), context.normalization, is_entropy=False)
    return h + d * (1 - h)


def q3(stats: TokenStats, context: Context) -> Tensor:
    """KL(q‖p)·(1 − ĥ): high where the student is confidently wrong."""
    return stats.forward_kl.double() * (1 - _entropy_hat(stats, context))


def teachability(stats: TokenStats, context: Context) -> Tensor:
    """D̂·Ĉ: the teacher disagrees, yet believes in what the student would say.

    D is forward KL on the union of both top 16, C the teacher's mass on the student's top 16, each
    scaled by its 5 % and 95 % quantiles. Source: TA-OPD.
    """
    d = _normalize(stats.extras["top_divergence"].double(), "quantile_05_95", is_entropy=False)
    c = _normalize(stats.extras["compatibility"].double(), "quantile_05_95", is_entropy=False)
    return d * c


@dataclass(frozen=True)
class Rule:
    """A way to rank tokens."""

    score: Score
    """Importance `[N]`, float64; the highest are kept."""
    extras: tuple[str, ...] = ()
    """Names of the extra statistics it needs, see `tutelage.core.stats.EXTRAS`."""
    is_random: bool = False
    """Whether it draws one uniform number a row."""
    log_weight: Score | None = None
    """log of the probability, up to a constant, with which a rule samples a row."""
    needs_teacher: bool = True
    """False where it reads the student alone: statistics without a teacher are enough."""
    leaves_out_stops: bool = False
    """Whether it never keeps a token that ends a text."""
    num_ends: int = 1
    """2 where a budget is that of the highest and again of the lowest."""
    name: str = ""
    """Its key in `RULES`."""

    def __str__(self) -> str:
        return self.name


def _sampled(weight: Score, needs_teacher: bool = True) -> Rule:
    """Sampling without replacement, P ∝ weight: the top k of log weight + Gumbel noise."""

    def log_weight(stats: TokenStats, context: Context) -> Tensor:
        return weight(stats, context).log()

    def score(stats: TokenStats, context: Context) -> Tensor:
        return log_weight(stats, context) + gumbel(context.uniform)

    return Rule(score, is_random=True, log_weight=log_weight, needs_teacher=needs_teacher)


def _extra(name: str) -> Rule:
    return Rule(lambda stats, _: stats.extras[name].double(), (name,))


def probability_gap(b: float = 1.0) -> Rule:
    """|A|^(1−b)·|q − p|^b of the sampled token, A = log q − log p; never a token that ends a text.

    Source: DIAL-OPD (arXiv 2610.11659), whose default b = 1 is |q − p|.
    """

    def score(stats: TokenStats, _: Context) -> Tensor:
        log_p, log_q = stats.log_p.double(), stats.log_q.double()
        gap = (log_q.exp() - log_p.exp()).abs()
        return (log_q - log_p).abs() ** (1 - b) * gap**b

    return Rule(score, leaves_out_stops=True, name="probability_gap")


def extreme_advantage(end: str = "both") -> Rule:
    """The largest A = log q − log p of the sampled tokens ("max"), the smallest ("min"), or "both".

    Of both, the score is −min(rank from above, rank from below) within the budget's group, ranks
    from 0, so that a budget of k at each end keeps the k largest and the k smallest.

    Source: Sparse OPD (arXiv 2609.04565).
    """
    if end not in ENDS:
        raise ValueError(f"end must be one of {ENDS}, got {end!r}.")

    def score(stats: TokenStats, context: Context) -> Tensor:
        advantage = stats.log_q.double() - stats.log_p.double()
        if end != "both":
            return advantage if end == "max" else -advantage
        is_usable = stats.is_finite()
        advantage = torch.where(is_usable, advantage, torch.nan)
        ranks = (_ranks(x, is_usable, context.group) for x in (advantage, -advantage))
        return torch.where(is_usable, -torch.minimum(*ranks), torch.nan)

    return Rule(score, num_ends=1 + (end == "both"), name="extreme_advantage")


def influence(combine: str = "soft_or", usefulness: str = "soft_or") -> Rule:
    """The signal r of the sampled gradient, as a rank, and a usefulness u, both in [0, 1].

    r is the share of the budget's group whose `signal_share` is below the row's; `combine` is
    "soft_or" r + u − ru, "soft_and" ru, or "none" r alone. u is the score of `usefulness`,
    "soft_or" or "teachability". r + u − ru is 1 for every row whose r or u is, often more of them
    than a small budget keeps; these have r + u instead, which is at least 1.

    Source: IER-OPD (arXiv 2609.24432); of the whole vocabulary, where the paper has top-k ids.
    """
    if combine not in COMBINATIONS:
        raise ValueError(f"combine must be one of {COMBINATIONS}, got {combine!r}.")
    if usefulness not in ("soft_or", "teachability"):
        raise ValueError(f"usefulness must be soft_or or teachability, got {usefulness!r}.")
    useful = None if combine == "none" else _RULES[usefulness]
    extras = ("signal_share", *(() if useful is None else useful.extras))

    def score(stats: TokenStats, context: Context) -> Tensor:
        columns = torch.stack([stats.extras[name].double() for name in extras])
        usable = (stats.is_finite() & torch.isfinite(columns).all(0)).nonzero().squeeze(1)
        r = _share_below(columns[0, usable], context.group[usable])
        u = r if useful is None else useful.score(stats[usable], context)
        found = columns.new_full((len(stats),), torch.nan)
        match combine:
            case "none":
                found[usable] = r
            case "soft_and":
                found[usable] = r * u
            case _:
                either = r + u * (1 - r)
                found[usable] = torch.where(either == 1, r + u, either)
        return found

    return Rule(score, extras, name="influence")


def _share_below(x: Tensor, group: Tensor) -> Tensor:
    """Share of the other rows of its group that are below each row, in [0, 1]."""
    _, place = torch.unique(group, return_inverse=True)
    order = x.argsort(stable=True)
    order = order[place[order].argsort(stable=True)]
    values, place = x[order], place[order]
    size, number = torch.bincount(place), torch.arange(len(order), device=x.device)
    is_new = number == 0  # equal rows of a group share the place of their first
    is_new[1:] = (values[1:] != values[:-1]) | (place[1:] != place[:-1])
    first = torch.where(is_new, number, 0).cummax(0).values - (size.cumsum(0) - size)[place]
    share = torch.empty_like(x)
    share[order] = first / (size[place] - 1).clamp(min=1).to(x.dtype)
    return share


def _ranks(x: Tensor, is_usable: Tensor, group: Tensor) -> Tensor:
    """Place of each usable row of a group by falling x, from 0, earlier rows first, float64."""
    _, place, size = torch.unique(group, return_inverse=True, return_counts=True)
    order = torch.where(is_usable, x, -torch.inf).argsort(descending=True, stable=True)
    order = order[(2 * place + (~is_usable).long())[order].argsort(stable=True)]
    start = (size.cumsum(0) - size)[place[order]]
    ranks = torch.empty_like(x)
    ranks[order] = (torch.arange(len(order), device=x.device) - start).to(x)
    return ranks


_RULES: dict[str, Rule] = {
    "all": Rule(
        lambda stats, _: torch.zeros_like(stats.entropy, dtype=torch.float64),
        needs_teacher=False,
    ),
    "random": Rule(
        lambda _, context: context.uniform,
        is_random=True,
        log_weight=lambda stats, _: torch.zeros_like(stats.entropy, dtype=torch.float64),
        needs_teacher=False,
    ),
    "entropy": Rule(lambda stats, _: stats.entropy.double(), needs_teacher=False),
    "entropy_sample": _sampled(lambda stats, _: stats.entropy.double(), needs_teacher=False),
    "soft_or": Rule(soft_or),
    "soft_or_sample": _sampled(soft_or),
    "q3": Rule(q3),
    "divergence": Rule(lambda stats, _: stats.reverse_kl.double()),
    "forward_divergence": Rule(lambda stats, _: stats.forward_kl.double()),
    "lowest_logprob": Rule(lambda stats, _: -stats.log_p.double(), needs_teacher=False),
    "bottom": Rule(lambda stats, context: -soft_or(stats, context)),
    "probability_gap": probability_gap(),
    "extreme_advantage": extreme_advantage(),
    "first_n": Rule(lambda _, context: -context.position.double(), needs_teacher=False),
    "teachability": Rule(teachability, ("top_divergence", "compatibility")),
    "gradient_norm": _extra("gradient_norm"),
    "local_oracle": _extra("local_oracle"),
    "local_gain": _extra("local_gain"),
}
_RULES["influence"] = influence()
RULES = {name: replace(rule, name=name) for name, rule in _RULES.items()}
"""The selection rules by name, with the default options; `all` keeps every token whatever the
budget."""


def importance(
    stats: TokenStats,
    rule: str | Rule,
    normalization: str = "minmax_p98",
    uniform: Tensor | None = None,
    position: Tensor | None = None,
    group: Tensor | None = None,
) -> Tensor:
    """Score of every row under a rule; the highest are worth training on. Without unit.

    With ĥ the normalized entropy and δ̂ the normalized reverse KL of the batch:

    * `entropy` H; `divergence` reverse_kl; `forward_divergence` forward_kl;
    * `soft_or` ĥ + δ̂ − ĥδ̂; `bottom` its negative; `q3` forward_kl·(1 − ĥ);
    * `entropy_sample`, `soft_or_sample` log score + Gumbel noise; `random` noise;
    * `lowest_logprob` −log p of the sampled token; `probability_gap` |q − p| of it;
    * `extreme_advantage` −min of its rank by log q − log p from above and from below;
    * `first_n` −position; `teachability` D̂·Ĉ; `all` 0;
    * `influence` r + u − ru, r the rank of the sampled gradient's signal, u the score of `soft_or`,
      and r + u for rows whose r or u is 1;
    * `gradient_norm` Σ_v (∂reverse_kl/∂z_v)²;
    * `local_oracle` |g|²/(gᵀHg), g = p − q, H = diag(p) − ppᵀ, TIP's local oracle weight: a step
      length, which ranks solved tokens first;
    * `local_gain` min(|g|⁴/(2 gᵀHg), forward_kl), what that step gains, nats.

    Args:
        stats: statistics of the whole global batch, N rows, with the extras the rule needs.
        rule: a key of `RULES`, or a rule with options, such as `probability_gap(b=0.5)`.
        normalization: one of `NORMALIZATIONS`. The paper's `minmax_p98` clips the entropy at its
            98th percentile and leaves the divergence unclipped.
        uniform: numbers in (0, 1), float64 `[N]`, for the random rules.
        position: index of each row within its completion `[N]`, for `first_n`.
        group: the rows of one budget, by a number each `[N]`, for `extreme_advantage` and
            `influence`; None for one group.

    Returns:
        float64 `[N]`; NaN or infinite where a statistic is.

    Raises:
        ValueError: unknown rule or normalization, or something the rule needs is not given.

    Source: TIP (arXiv 2604.14084), sections 3 and 4.
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}.")
    chosen, name = require_rule(rule), str(rule)
    missing = [name for name in chosen.extras if name not in stats.extras]
    if missing:
        raise ValueError(f"rule {name!r} needs token_stats(..., extras={chosen.extras}).")
    if chosen.needs_teacher and not stats.has_teacher:
        raise ValueError(f"rule {name!r} compares with the teacher; give token_stats a teacher.")
    if chosen.is_random and uniform is None:
        raise ValueError(f"rule {name!r} samples at random and needs `uniform`, one per row.")
    if name == "first_n" and position is None:
        raise ValueError("rule 'first_n' needs `position`, one per row.")
    return chosen.score(stats, _context(stats, normalization, uniform, position, group))


def log_sampling_weight(
    stats: TokenStats, rule: str | Rule, normalization: str = "minmax_p98"
) -> Tensor | None:
    """log P, up to a constant, with which a rule samples a row `[N]`; None for others."""
    weight = require_rule(rule).log_weight
    return None if weight is None else weight(stats, _context(stats, normalization))


def require_rule(rule: str | Rule) -> Rule:
    """The rule of that name, or the given one.

    Raises:
        ValueError: there is none.
    """
    if isinstance(rule, Rule):
        return rule
    if rule not in RULES:
        raise ValueError(f"rule must be one of {tuple(RULES)}, got {rule!r}.")
    return RULES[rule]


def _context(
    stats: TokenStats,
    normalization: str,
    uniform: Tensor | None = None,
    position: Tensor | None = None,
    group: Tensor | None = None,
) -> Context:
    unused = torch.full_like(stats.entropy, 0.5, dtype=torch.float64)
    return Context(
        normalization,
        unused if uniform is None else uniform,
        unused if position is None else position,
        torch.zeros_like(unused, dtype=torch.int64) if group is None else group,
    )
