"""Entropy of rows of log-probabilities."""

from __future__ import annotations

import math

from torch import Tensor


def entropy(log_p: Tensor) -> Tensor:
    """Shannon entropy in nats per row.

    ``H = −Σ_v p(v) log p(v)``, with ``0·log 0 = 0`` masked before the arithmetic

    Args:
        log_p: log-probabilities `[N, V]`.

    Returns:
        `[N]`, between 0 and ln V.

    Example:
        >>> import torch
        >>> round(entropy(torch.tensor([[0.5, 0.5, 0.0]]).log()).item(), 4)
        0.6931
    """
    log_p = log_p.masked_fill(log_p == -math.inf, 0.0)
    # A masked entry counts as probability 1 times log 1 = 0: it adds nothing.
    return -(log_p.exp() * log_p).sum(-1)


def normalized_entropy(log_p: Tensor) -> Tensor:
    """Entropy as a share of its maximum, `H / ln V`, per row and without unit.

    Args:
        log_p: log-probabilities `[N, V]`, V ≥ 2.

    Returns:
        `[N]`, between 0 and 1.

    Source: TIP (arXiv 2604.14084), section 3.
    """
    return entropy(log_p) / math.log(log_p.shape[-1])
