"""Logits that are never materialised: hidden states and the head that would project them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tutelage.core.products import product_
from tutelage.core.shared_ids import SharedIds


@dataclass(frozen=True)
class LazyLogits:
    """Stands for `[N, V]` logits at the cost of `[N, D]` hidden states.

    ``z = softcap·tanh(scale·(hidden @ weightᵀ + bias) / softcap)``, without `softcap` just
    ``scale·(…)``. Selecting tokens is `logits[rows]`; a padded vocabulary is cut by `logits.cut`.

    Example:
        >>> lazy = LazyLogits(torch.ones(3, 2), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> lazy[torch.tensor([0])].block(0, 1)
        tensor([[1., 2.]])
    """

    hidden: Tensor
    """Last hidden states `[N, D]`, after the model's final norm."""
    weight: Tensor
    """Head `[V, D]`, possibly the model's embedding table."""
    bias: Tensor | None = None
    """Head bias `[V]`."""
    scale: float = 1.0
    """Multiplier of the raw logits; 1/temperature goes here too."""
    softcap: float | None = None
    """Bound of the logits (Gemma's final_logit_softcapping); None for no bound."""
    swap: tuple[int, int] | None = None
    """Two ids that trade places: maps a teacher's stop token onto the student's."""
    one_class: tuple[int, ...] = ()
    """Of a student: two or more ids, ascending, that count as one in every statistic and objective,
    on both sides (`core.id_class`); `block` still has a logit for each."""
    shared: SharedIds | None = None
    """Of a student: what it shares with a teacher that has another vocabulary. Both are compared
    over that, by top-k terms with the student's support."""

    def __post_init__(self) -> None:
        if self.hidden.ndim != 2 or self.weight.ndim != 2:
            raise ValueError(
                f"hidden must be [N, D] and weight [V, D], got {tuple(self.hidden.shape)} "
                f"and {tuple(self.weight.shape)}."
            )
        if self.hidden.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"hidden and weight must share D, got {self.hidden.shape[1]} "
                f"and {self.weight.shape[1]}."
            )

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> LazyLogits:
        return replace(self, hidden=self.hidden[rows])

    @property
    def vocab_size(self) -> int:
        """V, the number of logits in a row."""
        return self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the logits: float64 if the hidden states are, else float32."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    def cut(self, vocab_size: int) -> LazyLogits:
        """The same logits over the first `vocab_size` ids (a view, nothing is copied)."""
        if not 0 < vocab_size <= self.vocab_size:
            raise ValueError(f"cannot cut a vocabulary of {self.vocab_size} to {vocab_size} ids.")
        if vocab_size == self.vocab_size:
            return self  # slicing would make backward copy a whole weight gradient
        bias = None if self.bias is None else self.bias[:vocab_size]
        return replace(self, weight=self.weight[:vocab_size], bias=bias)

    def to(self, device: torch.device | str) -> LazyLogits:
        """The same logits with the hidden states on `device` (the head stays where it is)."""
        return replace(self, hidden=self.hidden.to(device))

    def matched(self) -> LazyLogits:
        """The same logits with the head cast to the dtype of the hidden states once, for a pass.

        (`block` would cast it again for every chunk: float32 weights under bfloat16 arithmetic.)
        """
        if self.weight.dtype == self.hidden.dtype:
            return self
        return replace(self, weight=self.weight.detach().to(self.hidden.dtype))

    def block(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Logits of rows `start:stop`, `[stop − start, V]`, written into `out` when it is given."""
        hidden = self.hidden[start:stop]
        if out is None and torch.is_grad_enabled() and _needs_grad(hidden, self.weight, self.bias):
            return self._differentiable(hidden)
        if out is None:
            out = torch.empty(
                len(hidden), self.vocab_size, dtype=self.dtype, device=self.hidden.device
            )
        return self.project(hidden, out)

    def project(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Logits of other hidden states `[M, D]`, written into `out` `[M, V]`, without gradient."""
        if self.weight.dtype == self.dtype == hidden.dtype:
            product_(out, hidden, self.weight)
        else:
            out.copy_(hidden @ self.weight.t().to(hidden.dtype))
        if self.bias is not None:
            out.add_(self.bias)
        if self.scale != 1.0:
            out.mul_(self.scale)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.swap is not None:
            first, second = self.swap
            kept = out[:, first].clone()
            out[:, first] = out[:, second]
            out[:, second] = kept
        return out

    def _differentiable(self, hidden: Tensor) -> Tensor:
        """The same logits as an ordinary part of the autograd graph."""
        logits = (hidden @ self.weight.t().to(hidden.dtype)).to(self.dtype)
        logits = logits if self.bias is None else logits + self.bias
        logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.swap is None:
            return logits
        order = torch.arange(self.vocab_size, device=logits.device)
        order[list(self.swap)] = order[list(reversed(self.swap))]
        return logits[:, order]


def _needs_grad(*tensors: Tensor | None) -> bool:
    return any(x is not None and x.requires_grad for x in tensors)
