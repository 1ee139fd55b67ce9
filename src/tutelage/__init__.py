"""On-policy distillation of language models, token by token.

A student language model writes completions; a bigger frozen teacher supervises every token of
them. `tutelage.core` holds the mathematics (torch only), `tutelage.run` the training loop.
"""

from tutelage.core import (
    LazyLogits,
    TokenStats,
    distillation_objective,
    entropy,
    forward_kl,
    jsd,
    quadrants,
    reverse_kl,
    select_tokens,
    token_stats,
)
from tutelage.errors import TutelageError

__version__ = "0.1.0"

__all__ = [
    "LazyLogits",
    "TokenStats",
    "TutelageError",
    "distillation_objective",
    "entropy",
    "forward_kl",
    "jsd",
    "quadrants",
    "reverse_kl",
    "select_tokens",
    "token_stats",
]
