"""Which tokens to train on: the highest scores of a rule, within an exact budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from tutelage.core.rules import Rule, gumbel, importance, log_sampling_weight, require_rule
from tutelage.core.stats import TokenStats


@dataclass(frozen=True)
class TokenSelection:
    """The kept rows and what the choice was based on."""

    rows: Tensor
    """Kept rows `[K]`, int64, ascending."""
    importance: Tensor
    """Score of every row `[N]`, float64; the highest are kept."""
    num_nonfinite: int
    """Rows whose score was NaN or infinite: never kept, always counted."""
    weights: Tensor
    """Loss weight of each kept row `[K]`, float64: 1, or 1/π with `correct_sampling`."""

    @property
    def mask(self) -> Tensor:
        """`[N]` boolean, True where the row is kept."""
        mask = torch.zeros(len(self.importance), dtype=torch.bool, device=self.rows.device)
        mask[self.rows] = True
        return mask


def select_tokens(
    stats: TokenStats,
    completion: Tensor,
    rule: str | Rule = "soft_or",
    keep: float = 0.5,
    scope: str = "completion",
    normalization: str = "minmax_p98",
    uniform: Tensor | None = None,
    position: Tensor | None = None,
    correct_sampling: bool = False,
    num_tokens: int | None = None,
    is_stop: Tensor | None = None,
) -> TokenSelection:
    """The rows a rule keeps: the top ⌊keep·m⌋ of each completion of m tokens, at least 1.

    Scores are normalised over all given rows (give the global batch); ties go to the earlier
    row; rows with a non-finite score are never kept. The budget counts all rows of a completion,
    those that cannot be kept too; `extreme_advantage` of both ends has that budget at each.

    With `correct_sampling` a row kept by a sampling rule weighs 1/π, π being its probability to
    be kept given the other rows' noise, so that ``Σ_kept weight·g`` is an unbiased estimate of
    ``Σ g`` over all rows that can be sampled (usable, P > 0): with κ the first key that is not
    kept, π = 1 − exp(−exp(log P − κ)).

    Args:
        stats: statistics of N rows, with the extras the rule needs.
        completion: completion index of each row, int64 `[N]`.
        rule: a key of `RULES`, or a rule with options; `all` ignores `keep`.
        keep: fraction of tokens to keep, in (0, 1].
        scope: "completion" for a budget per completion, "batch" for one budget over all rows.
        normalization: see `importance`.
        uniform: see `importance`.
        position: see `importance`.
        correct_sampling: weigh rows of a sampling rule by 1/π.
        num_tokens: budget of each group in tokens, at least 1, instead of `keep`.
        is_stop: boolean `[N]`, True where the sampled token ends a text: such rows are not kept by
            a rule that leaves them out, `probability_gap`; None if there are none.

    Returns:
        `TokenSelection`.

    Raises:
        ValueError: `keep` outside (0, 1], `num_tokens` below 1, an unknown scope, rule or
            normalization, or `correct_sampling` with a rule that does not sample.

    Example:
        >>> stats = TokenStats(*torch.tensor([[0.1, 0.9, 0.5, 0.2]]).expand(6, 4))
        >>> select_tokens(stats, torch.tensor([0, 0, 1, 1]), "entropy", keep=0.5).rows
        tensor([1, 2])

    Source: TIP (arXiv 2604.14084), section 4 and appendix A.3; the weights are those of
    sampling without replacement by Gumbel keys (Kool et al. 2019, section 4.1).
    """
    if not 0.0 < keep <= 1.0:
        raise ValueError(
            f"keep must be in (0, 1], got {keep}. Use keep = 1.0 to train on every token."
        )
    if num_tokens is not None and num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}.")
    if scope not in ("completion", "batch"):
        raise ValueError(f"scope must be 'completion' or 'batch', got {scope!r}.")
    chosen = require_rule(rule)
    group = completion if scope == "completion" else torch.zeros_like(completion)
    score = importance(stats, chosen, normalization, uniform, position, group)
    log_weight = log_sampling_weight(stats, chosen, normalization)
    if correct_sampling and log_weight is None:
        raise ValueError(f"correct_sampling needs a rule that samples, got {chosen.name!r}.")
    # A sampling rule gives −inf to rows of probability 0: they come last, but are no fault.
    is_usable = torch.isfinite(score) | ((score == -torch.inf) & (log_weight is not None))
    is_usable &= stats.is_finite()
    num_nonfinite = int((~is_usable).sum())
    if is_stop is not None and chosen.leaves_out_stops:
        is_usable = is_usable & ~is_stop
    budget = float(keep) if num_tokens is None else num_tokens
    budget = 1.0 if chosen.name == "all" else budget
    ranking = _Ranking.of(score, group, budget, is_usable, chosen.num_ends)
    weights = torch.ones(len(ranking.rows), dtype=torch.float64, device=score.device)
    if correct_sampling and log_weight is not None:
        keys = gumbel(score) if chosen.name == "random" else score
        weights = ranking.inverse_probabilities(keys, log_weight)
    return TokenSelection(ranking.rows, score, num_nonfinite, weights)


def _budgets(group: Tensor, keep: float | int, num_ends: int) -> tuple[Tensor, Tensor]:
    """⌊keep·m⌋ (at least 1) of every group, or `keep` rows if it is a whole number, at each end.

    Also the place of each row's group.

    `keep` is read as the decimal number that was written: ⌊0.29·100⌋ is 29, though the float
    product is 28.999…
    """
    _, place, size = torch.unique(group, return_inverse=True, return_counts=True)
    if isinstance(keep, int):
        return size.clamp(max=keep * num_ends), place
    share = Fraction(str(keep))
    # Python integers: the numerator of 0.3333333333333333 times 4096 tokens overflows int64.
    budget = [min(m, max(1, math.floor(share * m)) * num_ends) for m in size.tolist()]
    return torch.tensor(budget, dtype=torch.int64, device=group.device), place


@dataclass(frozen=True)
class _Ranking:
    """Rows in order of group, then score, and where each group's budget ends."""

    rows: Tensor
    """Kept rows, ascending."""
    order: Tensor
    start: Tensor
    budget: Tensor
    size: Tensor
    place: Tensor
    is_usable: Tensor

    @staticmethod
    def of(
        score: Tensor, group: Tensor, keep: float | int, is_usable: Tensor, num_ends: int
    ) -> _Ranking:
        """Ranks the usable rows of each group and keeps the highest within its budget."""
        budget, place = _budgets(group, keep, num_ends)
        ranked = torch.where(is_usable, score, -torch.inf)
        # Stable sorts, last key first: by group and usable rows, then high scores, then position.
        order = ranked.argsort(descending=True, stable=True)
        order = order[(2 * place + (~is_usable).long())[order].argsort(stable=True)]
        size = torch.bincount(place, minlength=len(budget))
        start = size.cumsum(0) - size
        rank = torch.arange(len(order), device=order.device) - start[place[order]]
        is_kept = (rank < budget[place[order]]) & is_usable[order]
        rows = order[is_kept].sort().values
        return _Ranking(rows, order, start, budget, size, place, is_usable)

    def inverse_probabilities(self, keys: Tensor, log_weight: Tensor) -> Tensor:
        """1/π of each kept row: 1 where all usable rows of its group are kept."""
        has_next = self.budget < self.size
        after = (self.start + self.budget).clamp(max=max(len(self.order) - 1, 0))
        has_next &= self.is_usable[self.order[after]]
        threshold = torch.where(has_next, keys[self.order[after]], -torch.inf)
        threshold = threshold[self.place[self.rows]]
        excess = log_weight[self.rows] - threshold
        # Nothing competes with a row whose next one is of probability 0: −inf − −inf is no number.
        is_certain = threshold == -torch.inf
        return torch.where(is_certain, 1.0, 1 / -torch.expm1(-excess.exp()))
