"""Tables and numbers with intervals as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SCALE = {"points": 100.0}
"""What a unit's numbers are multiplied by."""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def signed(triple: Sequence[float], digits: int = 1) -> str:
    """A difference with its sign and its interval."""
    value, low, high = triple
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]".replace("-", "−")


def unsigned(triple: Sequence[float], digits: int) -> str:
    """A value with its interval."""
    value, low, high = triple
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]".replace("-", "−")


def percent(triple: Sequence[float]) -> str:
    """A share with its interval."""
    return f"{unsigned([100 * x for x in triple], 1)} %"


def difference(comparison: dict[str, Any]) -> str:
    """A comparison's difference with its interval and unit."""
    scale, i = SCALE.get(comparison["unit"], 1.0), comparison["interval"]
    triple = [scale * i[key] for key in ("value", "low", "high")]
    return f"{signed(triple, 1 if scale == 100 else 3)} {comparison['unit']}"
