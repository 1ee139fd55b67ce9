"""The mathematics of on-policy distillation on rows `[N, …]`; torch and nothing else.

May import no other room.
"""

from tutelage.core._block import TeacherLogits
from tutelage.core.counter import counter_uniform
from tutelage.core.divergence import forward_kl, jsd, reverse_kl
from tutelage.core.entropy import entropy, normalized_entropy
from tutelage.core.extras import EXTRAS
from tutelage.core.lazy import LazyLogits
from tutelage.core.objective import Objective, composite_objective, distillation_objective
from tutelage.core.partial import PartialLogits, bounds
from tutelage.core.quadrants import quadrant_table, quadrants
from tutelage.core.rules import NORMALIZATIONS, RULES, importance
from tutelage.core.selection import TokenSelection, select_tokens
from tutelage.core.stats import TokenStats, token_stats

__all__ = [
    "EXTRAS",
    "NORMALIZATIONS",
    "RULES",
    "LazyLogits",
    "Objective",
    "PartialLogits",
    "TeacherLogits",
    "TokenSelection",
    "TokenStats",
    "bounds",
    "composite_objective",
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
