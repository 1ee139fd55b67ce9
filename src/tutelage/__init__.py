"""On-policy distillation of language models, token by token.

A student language model generates completions; a bigger frozen teacher gives a KL target for every
token of them. `tutelage.core` holds the mathematics (torch only), `tutelage.train` the loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tutelage.errors import TutelageError

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    """The mathematics, imported when it is first asked for: the command's help needs no torch."""
    if name != "core" and name not in __all__:
        raise AttributeError(f"module 'tutelage' has no attribute {name!r}")
    import tutelage.core as mathematics

    return mathematics if name == "core" else getattr(mathematics, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "core"})
