"""A teacher of which only the likeliest ids of each row are known, and what that bounds.

Servers of language models give the log-probabilities of the k likeliest ids and of the sampled one.
All other ids share the tail, 1 minus the sum of these: a distribution over k (or k + 1) ids and one
bucket, whose entropy and divergences are at most those of the whole distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TAIL_RESOLUTION = 2.0**-24
"""The least mass of unknown ids that rounded float32 log-probabilities can tell from none."""


@dataclass(frozen=True)
class PartialLogits:
    """N rows over V ids of which the k likeliest and the sampled one are known.

    Takes the teacher's place in objectives and statistics: entropy, forward and reverse KL are then
    those over the known ids and one bucket for the rest, lower bounds of the true ones (`bounds`);
    the log-probability of the sampled token is exact, and so is a divergence over at most k ids and
    a bucket (`TopKForwardKL`, `TopKReverseKL`).
    """

    ids: Tensor
    """The k likeliest ids `[N, k]`, the likeliest first, int64."""
    log_q: Tensor
    """Their log-probabilities `[N, k]`, nats."""
    tokens: Tensor
    """Sampled ids `[N]`, which may be among the likeliest."""
    token_log_q: Tensor
    """Their log-probabilities `[N]`, nats."""
    vocab_size: int
    """V, above every id."""

    def __post_init__(self) -> None:
        n = len(self.tokens)
        if self.ids.shape != self.log_q.shape or self.ids.ndim != 2 or len(self.ids) != n:
            raise ValueError(
                f"ids and log_q must both be [N, k] with N = {n}, got {tuple(self.ids.shape)} and "
                f"{tuple(self.log_q.shape)}."
            )
        if not 1 <= self.ids.shape[1] <= self.vocab_size:
            raise ValueError(f"k must be from 1 to {self.vocab_size}, got {self.ids.shape[1]}.")

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> PartialLogits:
        return self._with(lambda x: x[rows])

    @property
    def k(self) -> int:
        """The likeliest ids known of each row."""
        return self.ids.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the logits: float64 if the log-probabilities are, else float32."""
        return torch.float64 if self.log_q.dtype == torch.float64 else torch.float32

    @property
    def is_token_extra(self) -> Tensor:
        """Whether the sampled token is none of the k likeliest `[N]`."""
        return (self.ids != self.tokens[:, None]).all(1)

    @property
    def num_unknown(self) -> Tensor:
        """Ids that nothing is known of `[N]`."""
        return self.vocab_size - self.k - self.is_token_extra.long()

    @property
    def known_mass(self) -> Tensor:
        """Probability of the known ids `[N]`, float64; over 1 by what rounding adds."""
        extra = self.token_log_q.double().exp() * self.is_token_extra
        return self.log_q.double().exp().sum(1) + extra

    @property
    def log_tail(self) -> Tensor:
        """Log-mass of all unknown ids together `[N]`, float64; −inf where none is unknown.

        At least `TAIL_RESOLUTION`, lest rounded probabilities with a sum of 1 make a divergence
        infinite, and at most as much for each as the k-th likeliest has.
        """
        log_mass = (1.0 - self.known_mass).clamp(min=TAIL_RESOLUTION).log()
        most = self.log_q[:, -1].double() + self.num_unknown.double().log()
        return torch.minimum(log_mass, most)

    def entropy_bounds(self) -> tuple[Tensor, Tensor]:
        """The least and the largest entropy of the whole distribution `[N]`, float64, nats.

        ``H_S − t log t ≤ H ≤ H_S + t log(R/t)``, S the known ids, t the mass of the R others.
        """
        extra = self.token_log_q.double().exp() * self.is_token_extra
        known = _product(self.log_q.double().exp(), self.log_q.double()).sum(1)
        known = known + _product(extra, self.token_log_q.double())
        tail = self.log_tail.exp()
        low = _product(tail, self.log_tail) + known
        return -low, -low + _product(tail, self.num_unknown.double().log())

    def to(self, device: torch.device | str) -> PartialLogits:
        """The same rows on another device."""
        return self._with(lambda x: x.to(device))

    def _with(self, change: Callable[[Tensor], Tensor]) -> PartialLogits:
        parts = (self.ids, self.log_q, self.tokens, self.token_log_q)
        ids, log_q, tokens, token_log_q = map(change, parts)
        return PartialLogits(ids, log_q, tokens, token_log_q, self.vocab_size)

    def block(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Log-probabilities of rows `start:stop`, `[stop − start, V]`, the tail spread evenly."""
        here = self[start:stop]
        if out is None:
            shape = (len(here), self.vocab_size)
            out = torch.empty(shape, dtype=self.dtype, device=self.ids.device)
        # Where no id is unknown the even share is not used: every place is written below.
        each = here.log_tail - here.num_unknown.clamp(min=1).double().log()
        out.copy_(each[:, None].to(out.dtype).expand_as(out))
        known = torch.where(here.is_token_extra, here.token_log_q, out.new_zeros(()))
        out.scatter_(1, here.tokens[:, None], known[:, None].to(out.dtype))
        return out.scatter_(1, here.ids, here.log_q.to(out.dtype))


@dataclass(frozen=True)
class Bounds:
    """Between what the true numbers of N rows lie, float64 `[N]` each, nats."""

    entropy: tuple[Tensor, Tensor]
    """Of the teacher."""
    forward_kl: tuple[Tensor, Tensor]
    reverse_kl: tuple[Tensor, Tensor]
    """The upper one is infinite where an id is unknown: its teacher probability may be 0."""


def bounds(log_p: Tensor, teacher: PartialLogits, tolerance: float = 0.0) -> Bounds:
    """Least and largest entropy and divergences of teachers that agree with what is known.

    With S the known ids, t the teacher's and P the student's mass on the R unknown ids, c the
    probability of the k-th likeliest and p_min the student's least probability of an unknown id:

    * ``H_S − t log t ≤ H(q) ≤ H_S + t log(R/t)``;
    * ``F_S + t log(t/P) ≤ KL(q‖p) ≤ F_S + t log(min(t, c)/p_min)``;
    * ``R_S + max(P log(P/t), Σ p log(p/c)) ≤ KL(p‖q)``, without an upper bound where R > 0.

    Args:
        log_p: the student's log-probabilities `[N, V]`, nats.
        teacher: the same rows and ids.
        tolerance: what t, 1 minus the sum of the known probabilities, may be off by.

    Returns:
        `Bounds` of N rows.

    Raises:
        ValueError: the two differ in rows or ids.

    Source: coarse-graining (the log-sum inequality); EOPD's gate needs the first.
    """
    if log_p.shape != (len(teacher), teacher.vocab_size):
        raise ValueError(
            f"log_p must be [N, V] = {(len(teacher), teacher.vocab_size)}, got "
            f"{tuple(log_p.shape)}."
        )
    log_p = log_p.double()
    ids = torch.cat([teacher.ids, teacher.tokens[:, None]], 1)
    log_q = torch.cat([teacher.log_q, teacher.token_log_q[:, None]], 1).double()
    # A sampled token that is among the likeliest is counted there.
    counts = torch.ones_like(log_q)
    counts[:, -1] = teacher.is_token_extra.double()
    q, log_p_known = log_q.exp() * counts, log_p.gather(1, ids)
    entropy = -_product(q, log_q).sum(1)
    forward = _product(q, log_q - log_p_known).sum(1)
    reverse = _product(log_p_known.exp() * counts, log_p_known - log_q).sum(1)
    rest = log_p.scatter(1, ids, -torch.inf)
    log_rest, p_rest = rest.logsumexp(1), rest.exp()
    num, log_cap = teacher.num_unknown.double(), teacher.log_q[:, -1].double()
    least = log_p.scatter(1, ids, torch.inf).amin(1)  # +inf where no id is unknown
    most_mass = num * log_cap.exp()
    low = torch.minimum((1.0 - q.sum(1) - tolerance).clamp(min=0.0), most_mass)
    high = torch.minimum((1.0 - q.sum(1) + tolerance).clamp(min=0.0), most_mass)
    even, alike = (x.clamp(low, high) for x in (num / torch.e, log_rest.exp() / torch.e))

    def of_entropy(t: Tensor, ids_of_tail: Tensor) -> Tensor:
        return _product(t, ids_of_tail.log() - t.log())

    def of_forward(t: Tensor, log_other: Tensor, cap: Tensor) -> Tensor:
        return _product(t, torch.minimum(t.log(), cap) - log_other)

    one, no_cap = torch.ones_like(num), torch.full_like(num, torch.inf)
    tail = _product(p_rest, rest).sum(1)
    over_cap = tail - _product(log_rest.exp(), log_cap)
    over_tail = _product(log_rest.exp(), log_rest - high.log())
    return Bounds(
        (
            entropy + torch.minimum(of_entropy(low, one), of_entropy(high, one)),
            entropy + of_entropy(even, num),
        ),
        (
            forward + of_forward(alike, log_rest, no_cap),
            forward
            + torch.maximum(of_forward(low, least, log_cap), of_forward(high, least, log_cap)),
        ),
        (
            reverse + torch.maximum(over_cap, over_tail),
            torch.where(num > 0, torch.inf, reverse),
        ),
    )


def _product(weight: Tensor, x: Tensor) -> Tensor:
    """weight·x, and 0 where the weight is 0, whatever x is."""
    return weight * torch.where(weight == 0, 0.0, x)
