"""The mathematics of on-policy distillation: rows in, numbers out. Imports torch only."""

from tutelage.core.counter import counter_uniform
from tutelage.core.divergence import forward_kl, jsd, reverse_kl
from tutelage.core.entropy import entropy, normalized_entropy
from tutelage.core.lazy import LazyLogits
from tutelage.core.objective import Objective, distillation_objective
from tutelage.core.selection import (
    NORMALIZATIONS,
    RULES,
    TokenSelection,
    importance,
    quadrant_table,
    quadrants,
    select_tokens,
)
from tutelage.core.stats import TokenStats, token_stats

__all__ = [
    "NORMALIZATIONS",
    "RULES",
    "LazyLogits",
    "Objective",
    "TokenSelection",
    "TokenStats",
    "counter_uniform",
    "distillation_objective",
    "entropy",
    "forward_kl",
    "importance",
    "jsd",
    "normalized_entropy",
    "quadrant_table",
    "quadrants",
    "reverse_kl",
    "select_tokens",
    "token_stats",
]
