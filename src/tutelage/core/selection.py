"""Which tokens to train on: TIP's rules, their controls, and the quadrants they are judged by."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from tutelage.core.stats import TokenStats

RULES = (
    "all",
    "random",
    "entropy",
    "entropy_sample",
    "soft_or",
    "q3",
    "divergence",
    "bottom",
)
"""Names of the selection rules; `all` keeps every token whatever `keep` says."""

NORMALIZATIONS = ("minmax_p98", "minmax", "minmax_p98_both", "quantile_05_95")
"""How entropy and divergence are brought to [0, 1] over the global batch."""

STOCHASTIC_RULES = ("random", "entropy_sample")
"""Rules that draw one uniform number a token."""


@dataclass(frozen=True)
class TokenSelection:
    """The kept rows and what the choice was based on."""

    rows: Tensor
    """Kept rows `[K]`, int64, ascending."""
    importance: Tensor
    """Score of every row `[N]`, float64; the highest are kept."""
    num_nonfinite: int
    """Rows whose score was NaN or infinite: never kept, always counted."""

    @property
    def mask(self) -> Tensor:
        """`[N]` boolean, True where the row is kept."""
        mask = torch.zeros(len(self.importance), dtype=torch.bool, device=self.rows.device)
        mask[self.rows] = True
        return mask


def _quantile(x: Tensor, share: float) -> Tensor:
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
        return _scale(x, _quantile(x, 0.05), _quantile(x, 0.95))
    is_clipped = method == "minmax_p98_both" or (method == "minmax_p98" and is_entropy)
    return _scale(x, finite.min(), _quantile(x, 0.98) if is_clipped else finite.max())


def _soft_or(stats: TokenStats, method: str) -> Tensor:
    h = _normalize(stats.entropy.double(), method, is_entropy=True)
    d = _normalize(stats.reverse_kl.double(), method, is_entropy=False)
    return h + d - h * d


def _q3(stats: TokenStats, method: str) -> Tensor:
    return stats.forward_kl.double() * (
        1 - _normalize(stats.entropy.double(), method, is_entropy=True)
    )


def _entropy_sample(stats: TokenStats, uniform: Tensor) -> Tensor:
    # The top k of log h + Gumbel noise is a sample of k rows without replacement, P ∝ h.
    return stats.entropy.double().log() - (-uniform.log()).log()


def importance(
    stats: TokenStats,
    rule: str,
    normalization: str = "minmax_p98",
    uniform: Tensor | None = None,
) -> Tensor:
    """Score of every row under a rule; the highest are worth training on. Without unit.

    With ĥ the normalised entropy and δ̂ the normalised reverse KL of the batch:
    `entropy` H; `entropy_sample` log H + Gumbel noise; `soft_or` ĥ + δ̂ − ĥδ̂;
    `q3` forward_kl·(1 − ĥ); `divergence` reverse_kl; `bottom` −soft_or; `random` noise; `all` 0.

    Args:
        stats: statistics of the whole global batch, N rows.
        rule: one of `RULES`.
        normalization: one of `NORMALIZATIONS`. The paper's `minmax_p98` clips the entropy at its
            98th percentile and leaves the divergence unclipped.
        uniform: numbers in (0, 1), float64 `[N]`, for `random` and `entropy_sample`.

    Returns:
        float64 `[N]`; NaN or infinite where a statistic is.

    Raises:
        ValueError: unknown rule or normalization, or a stochastic rule without `uniform`.

    Source: TIP (arXiv 2604.14084), sections 3 and 4.
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}.")
    if uniform is None:
        if rule in STOCHASTIC_RULES:
            raise ValueError(f"rule {rule!r} draws at random and needs `uniform`, one per row.")
        uniform = torch.full_like(stats.entropy, 0.5, dtype=torch.float64)
    scores: dict[str, Callable[[], Tensor]] = {
        "all": lambda: torch.zeros_like(uniform),
        "random": lambda: uniform,
        "entropy": lambda: stats.entropy.double(),
        "entropy_sample": lambda: _entropy_sample(stats, uniform),
        "soft_or": lambda: _soft_or(stats, normalization),
        "q3": lambda: _q3(stats, normalization),
        "divergence": lambda: stats.reverse_kl.double(),
        "bottom": lambda: -_soft_or(stats, normalization),
    }
    if rule not in scores:
        raise ValueError(f"rule must be one of {RULES}, got {rule!r}.")
    return scores[rule]()


def select_tokens(
    stats: TokenStats,
    completion: Tensor,
    rule: str = "soft_or",
    keep: float = 0.5,
    scope: str = "completion",
    normalization: str = "minmax_p98",
    uniform: Tensor | None = None,
) -> TokenSelection:
    """The rows a rule keeps: the top ⌊keep·m⌋ of each completion of m tokens, at least 1.

    Scores are normalised over all given rows (give the global batch); ties go to the earlier
    row; rows with a non-finite score are never kept.

    Args:
        stats: statistics of N rows.
        completion: completion index of each row, int64 `[N]`.
        rule: one of `RULES`; `all` ignores `keep`.
        keep: fraction of tokens to keep, in (0, 1].
        scope: "completion" for a budget per completion, "batch" for one budget over all rows.
        normalization: see `importance`.
        uniform: see `importance`.

    Returns:
        `TokenSelection`.

    Raises:
        ValueError: `keep` outside (0, 1], unknown scope, rule or normalization.

    Example:
        >>> stats = TokenStats(*torch.tensor([[0.1, 0.9, 0.5, 0.2]]).expand(6, 4))
        >>> select_tokens(stats, torch.tensor([0, 0, 1, 1]), "entropy", keep=0.5).rows
        tensor([1, 2])

    Source: TIP (arXiv 2604.14084), section 4.
    """
    if not 0.0 < keep <= 1.0:
        raise ValueError(
            f"keep must be in (0, 1], got {keep}. Use keep = 1.0 to train on every token."
        )
    if scope not in ("completion", "batch"):
        raise ValueError(f"scope must be 'completion' or 'batch', got {scope!r}.")
    score = importance(stats, rule, normalization, uniform)
    is_usable = torch.isfinite(score) | (score == -torch.inf if rule == "entropy_sample" else False)
    is_usable &= torch.isfinite(stats.stack()).all(0)
    group = completion if scope == "completion" else torch.zeros_like(completion)
    rows = _top(score, group, 1.0 if rule == "all" else keep, is_usable)
    return TokenSelection(rows, score, int((~is_usable).sum()))


def _budgets(group: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """⌊keep·m⌋ (at least 1) of every group, and the group's place for each row.

    `keep` is read as the decimal number that was written: ⌊0.29·100⌋ is 29, though the float
    product is 28.999…
    """
    _, place, size = torch.unique(group, return_inverse=True, return_counts=True)
    share = Fraction(str(keep))
    # Python integers: the numerator of 0.3333333333333333 times 4096 tokens overflows int64.
    budget = [max(1, math.floor(share * m)) for m in size.tolist()]
    return torch.tensor(budget, dtype=torch.int64, device=group.device), place


def _top(score: Tensor, group: Tensor, keep: float, is_usable: Tensor) -> Tensor:
    """Indices, ascending, of the highest usable scores of each group within its budget."""
    budget, place = _budgets(group, keep)
    ranked = torch.where(is_usable, score, -torch.inf)
    # Stable sorts, last key first: by group, then usable rows, then high scores, then position.
    order = ranked.argsort(descending=True, stable=True)
    order = order[(~is_usable[order]).long().argsort(stable=True)]
    order = order[place[order].argsort(stable=True)]
    start = torch.zeros_like(budget)
    start[1:] = torch.bincount(place, minlength=len(budget)).cumsum(0)[:-1]
    rank = torch.arange(len(order), device=order.device) - start[place[order]]
    is_kept = (rank < budget[place[order]]) & is_usable[order]
    return order[is_kept].sort().values


def quadrants(
    entropy: Tensor, divergence: Tensor, thresholds: str | tuple[float, float] = "median"
) -> Tensor:
    """TIP's quadrant of every row, 1 to 4.

    Q1 both high, Q2 uncertain but agreeing, Q3 overconfident and wrong, Q4 solved; high means
    strictly above the threshold.

    Args:
        entropy: student entropy `[N]`, nats.
        divergence: reverse KL `[N]`, nats.
        thresholds: "median" of the given rows on both axes, or (entropy, divergence) in nats.
            The paper states none; every report says which were used.

    Returns:
        int64 `[N]` of 1, 2, 3, 4.

    Raises:
        ValueError: thresholds are neither "median" nor two numbers.

    Source: TIP (arXiv 2604.14084), section 3; median thresholds as in TA-OPD's code.
    """
    if thresholds == "median":
        limits = (_quantile(entropy, 0.5), _quantile(divergence, 0.5))
    elif isinstance(thresholds, tuple) and len(thresholds) == 2:
        limits = thresholds  # type: ignore[assignment]
    else:
        raise ValueError(f"thresholds must be 'median' or two numbers in nats, got {thresholds!r}.")
    is_uncertain, is_wrong = entropy > limits[0], divergence > limits[1]
    return 4 - 2 * is_uncertain.long() - is_wrong.long()


def quadrant_table(
    quadrant: Tensor, divergence: Tensor, is_kept: Tensor
) -> dict[str, dict[str, float]]:
    """Per quadrant: share of the tokens, share of the divergence, and share of it that is kept.

    Args:
        quadrant: 1 to 4, `[N]`.
        divergence: reverse KL `[N]`, nats.
        is_kept: boolean `[N]`.

    Returns:
        {"q1": {"share", "kl_mass", "kept_share"}, …, "q4": …}; the shares of a column that has
        nothing to share (no tokens, no divergence, no tokens of the quadrant) are 0.
    """
    total, mass = max(len(quadrant), 1), float(divergence.sum())
    table = {}
    for number in (1, 2, 3, 4):
        here = quadrant == number
        size = int(here.sum())
        table[f"q{number}"] = {
            "share": size / total,
            "kl_mass": float(divergence[here].sum()) / mass if mass > 0 else 0.0,
            "kept_share": int(is_kept[here].sum()) / size if size else 0.0,
        }
    return table
