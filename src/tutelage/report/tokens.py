"""Recorded tokens as rows: their quadrants, and what rules keep of them.

The page's script does the same for whatever is chosen there; tests compare the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from tutelage.report.records import TokenRecord

DEFAULT_CUTS = (0.5, 0.5)
"""Cuts of entropy and divergence in nats where a run has none of its own."""
QUADRANTS = {
    1: "high entropy, high KL",
    2: "high entropy, low KL",
    3: "low entropy, high KL",
    4: "low entropy, low KL",
}
Snapshot = tuple[int, str]
"""Step, and kind of completion."""


@dataclass(frozen=True)
class Row:
    """One recorded token with finite statistics, in nats."""

    record: TokenRecord
    index: int
    entropy: float
    reverse_kl: float

    def is_kept(self, rule: str) -> bool:
        """Whether the rule keeps the token."""
        return self.index in self.record.kept[rule]


def snapshots(tokens: Sequence[TokenRecord]) -> dict[Snapshot, list[TokenRecord]]:
    """Completions by step and kind, in the order of recording."""
    found: dict[Snapshot, list[TokenRecord]] = {}
    for record in tokens:
        found.setdefault((record.step, record.kind), []).append(record)
    return found


def rows_of(records: Sequence[TokenRecord]) -> list[Row]:
    """Tokens whose entropy and divergence are known."""
    return list(_rows(records))


def _rows(records: Sequence[TokenRecord]) -> Iterator[Row]:
    for record in records:
        for index, (entropy, kl) in enumerate(zip(record.entropy, record.reverse_kl, strict=True)):
            if entropy is not None and kl is not None:
                yield Row(record, index, entropy, kl)


def fixed_cuts(config: dict[str, Any]) -> tuple[float, float] | None:
    """The run's own cuts of entropy and divergence in nats; None where it cuts at medians."""
    match config.get("quadrant_thresholds"):
        case [int() | float() as entropy, int() | float() as divergence]:
            return entropy, divergence
    return None


def cuts_of(rows: Sequence[Row], config: dict[str, Any]) -> tuple[float, float]:
    """Where the quadrants of these rows meet: the run's cuts, or the medians of the rows."""
    if fixed := fixed_cuts(config):
        return fixed
    return median(r.entropy for r in rows), median(r.reverse_kl for r in rows)


def quadrant(row: Row, cuts: tuple[float, float]) -> int:
    """1 to 4: high is what lies above the cut."""
    return 4 - 2 * (row.entropy > cuts[0]) - (row.reverse_kl > cuts[1])


def kept_share(rows: Sequence[Row], rule: str) -> float | None:
    """Share of rows that the rule keeps, in [0, 1]; None of no rows."""
    return sum(row.is_kept(rule) for row in rows) / len(rows) if rows else None


def jaccard(rows: Sequence[Row], one: str, other: str) -> float | None:
    """|A ∩ B| / |A ∪ B| of the rows that two rules keep; None where both keep none."""
    pairs = [(row.is_kept(one), row.is_kept(other)) for row in rows]
    either = sum(a or b for a, b in pairs)
    return sum(a and b for a, b in pairs) / either if either else None


def shared_rules(records: Sequence[TokenRecord]) -> list[str]:
    """Rules whose choice is known of every completion, in the order of recording."""
    return [rule for rule in records[0].kept if all(rule in r.kept for r in records)]
